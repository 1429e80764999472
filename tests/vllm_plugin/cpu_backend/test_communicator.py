"""The two collectives between real gloo processes, with unequal batches and an empty rank."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gimbal.vllm_plugin.cpu_backend.communicator import (
    ExpertParallelCommunicator,
    pack_rows,
    unpack_rows,
)


def batch(rank, rows):
    g = torch.Generator().manual_seed(rank)
    hidden = torch.randn(rows, 16, generator=g).bfloat16()
    return [hidden, torch.rand(rows, 3, generator=g), torch.randint(0, 9, (rows, 3), generator=g)]


def partial_sums(rank, rows):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(100 + rank)).bfloat16()


def worker(rank, sizes, port):
    world = len(sizes)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    comm = ExpertParallelCommunicator.__new__(ExpertParallelCommunicator)
    comm.world_size, comm.rank_in_group, comm.device_group = world, rank, dist.group.WORLD
    together = comm.all_gatherv(batch(rank, sizes[rank]), 0, sizes)
    for i, got in enumerate(together):
        assert torch.equal(got, torch.cat([batch(r, n)[i] for r, n in enumerate(sizes)]))
    alone = comm.all_gatherv(batch(rank, sizes[rank])[0], sizes=sizes)
    assert torch.equal(alone, together[0])
    total = sum(partial_sums(r, sum(sizes)).float() for r in range(world))
    start = sum(sizes[:rank])
    want = total[start : start + sizes[rank]].bfloat16()
    assert torch.equal(comm.reduce_scatterv(partial_sums(rank, sum(sizes)), 0, sizes), want)
    if len(set(sizes)) == 1:
        assert torch.equal(comm.reduce_scatterv(partial_sums(rank, sum(sizes)), 0), want)
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[3, 3], [1, 40], [5, 0], [2, 7, 1, 4]])
def test_unequal_batches_between_processes(sizes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forked, because a spawned process would import torch and vLLM again.
    mp.start_processes(worker, (sizes, port), nprocs=len(sizes), start_method="fork")


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_packing_keeps_every_byte(rows):
    tensors = [*batch(1, rows), torch.arange(rows, dtype=torch.int32)]
    for got, want in zip(unpack_rows(pack_rows(tensors), tensors), tensors, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_other_dimensions_are_refused():
    comm = ExpertParallelCommunicator.__new__(ExpertParallelCommunicator)
    with pytest.raises(NotImplementedError, match="dim 0, not 1"):
        comm.all_gatherv(torch.ones(2, 2), dim=1)
    with pytest.raises(NotImplementedError, match="dim 0, not 1"):
        comm.reduce_scatterv(torch.ones(2, 2), dim=1)
