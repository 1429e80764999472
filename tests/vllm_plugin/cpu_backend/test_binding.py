from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gimbal.vllm_plugin.cpu_backend.binding import bind_workers, usable_cores


@pytest.mark.parametrize(
    ("cpus", "engines", "workers", "expected"),
    [
        ([0, 1], 2, 1, "0|1"),
        ([0, 1], 2, 2, "0|0|1|1"),
        ([4, 6], 1, 1, "4,6"),
        ([0], 2, 1, "0|0"),
        ([0, 1, 2, 3], 2, 1, "0,1|2,3"),
        ([0, 1, 2, 3, 4], 2, 1, "1,2|3,4"),
        ([0, 1, 2], 2, 2, "0|0|1|2"),
        (list(range(9)), 2, 2, "1,2|3,4|5,6|7,8"),
    ],
)
def test_examples(cpus: list[int], engines: int, workers: int, expected: str) -> None:
    assert bind_workers(cpus, engines, workers) == expected


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_worker_has_cores_and_engines_share_none_while_they_last(
    count: int, engines: int, workers: int
) -> None:
    lists = [
        set(part.split(",")) for part in bind_workers(range(count), engines, workers).split("|")
    ]
    assert len(lists) == engines * workers
    assert all(lists)
    of_engine = [set.union(*lists[i * workers : (i + 1) * workers]) for i in range(engines)]
    if count >= engines:
        assert sum(map(len, of_engine)) == len(set.union(*of_engine))
    if count >= engines * workers:
        assert sum(map(len, lists)) == len(set.union(*lists))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_usable_cores_are_among_the_allowed_ones() -> None:
    cores = usable_cores()
    assert cores
    assert set(cores) <= os.sched_getaffinity(0)
