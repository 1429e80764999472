"""A group of ranks, each in a thread, through the hooks of vLLM's EPLB state: 24 steps of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import faults
import numpy as np
import torch
from fakes import EXPERTS, LAYERS, WINDOW, VllmPolicy, fill_tables, model_state, record, skewed

from gimbal.core.guard import LevelGuard
from gimbal.testing import placement
from gimbal.vllm_plugin.placement import hook
from gimbal.vllm_plugin.placement.member import Member, member_of
from gimbal.vllm_plugin.placement.stats import gimbal_experts_map, gimbal_routing
from gimbal.vllm_plugin.placement.window import to_logical

RANKS, REDUNDANT, STEPS, INTERVAL = 2, 2, 24, 3
FIRST = placement(LAYERS, EXPERTS + REDUNDANT, EXPERTS)  # made once: no walk shall fail in it
TIMEOUT_S = 20.0
CONFIG = {
    "levels": ["placement", "feedback"],
    "placement": {"backend": "all2all", "gate": 0.0, "half_life_steps": 4.0},
}
_here = threading.local()


class Collectives:
    """Everybody's values to everybody; a rank that is in another collective ends them all.

    Attributes:
        names: of the collectives that each rank took part in.
    """

    def __init__(self) -> None:
        self.names: list[list[str]] = [[] for _ in range(RANKS)]
        self._barrier = threading.Barrier(RANKS, timeout=TIMEOUT_S)
        self._slots: list[Any] = [None] * RANKS

    def exchange(self, name: str, value: Any) -> list[Any]:
        rank = _here.rank
        if name != "check":
            self.names[rank].append(name)
        self._slots[rank] = name, value
        self._barrier.wait()
        slots = list(self._slots)
        self._barrier.wait()
        names = {other for other, _ in slots}
        assert len(names) == 1, f"ranks are in different collectives: {sorted(names)}"
        return [other for _, other in slots]

    def abort(self) -> None:
        self._barrier.abort()


def plain_commit(state: Any, new: Any) -> None:
    state.physical_to_logical_map.copy_(new)
    fill_tables(state)


def plain_commit_layer(state: Any, new: Any, layer: int) -> None:
    state.physical_to_logical_map[layer] = new
    fill_tables(state)


class PlainState:
    """What the level touches of vLLM's ``EplbState``, in vLLM's order of calls."""

    commit = staticmethod(plain_commit)
    commit_layer = staticmethod(plain_commit_layer)

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.parallel_config = SimpleNamespace(
            data_parallel_size=RANKS,
            all2all_backend="deepep_high_throughput",
            # So long does a gain last for the gate; a rearrangement comes every `INTERVAL` steps.
            eplb_config=SimpleNamespace(window_size=WINDOW, step_interval=100_000),
        )
        self.model_states: dict[str, Any] = {}
        self.policy: Any = None
        self.is_async = False
        self.async_worker = SimpleNamespace(is_alive=lambda: True)
        self.expert_load_window_step = 0
        self.since = 0
        self.sums: Any = None
        self.layers: list[Any] = []  # of an asynchronous rearrangement, still to be committed

    def add_model(self, model: Any, model_config: Any) -> None:
        state = model_state(FIRST)
        fill_tables(state)
        state.model, state.model_name = model, "demo"
        self.model_states[model_config.compute_hash()] = state
        self.policy = VllmPolicy

    @property
    def state(self) -> Any:
        return self.model_states["demo"]

    def _should_record_current_step(self, log_stats: bool = False) -> bool:
        return True

    def step(
        self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
    ) -> None:
        state = self.state
        if not is_dummy:
            record(state, self.expert_load_window_step, self.routed)
            self.expert_load_window_step = (self.expert_load_window_step + 1) % WINDOW
        self.since += 1
        if state.rebalanced:
            self._move_a_layer()
        elif self.since >= INTERVAL:
            self.since = 0
            self.rearrange()

    def rearrange(
        self,
        is_profile: bool = False,
        rank_mapping: Any = None,
        use_last_expert_load: bool = False,
    ) -> None:
        state = self.state
        index = state.physical_to_logical_map.long()
        with faults.by_the_test():
            raw = to_logical(state.expert_load_window, index, EXPERTS).sum(dim=0)
        everybody = self.collectives.exchange("check", raw)
        (self.sums,) = self._allreduce_list([raw.clone()])
        assert torch.equal(self.sums, torch.stack(everybody).sum(dim=0).to(raw.dtype))
        if self.is_async:
            state.rebalanced = True
        else:
            self.commit(state, self._new_map())

    def _new_map(self) -> Any:
        old = self.state.physical_to_logical_map.clone()
        return self.policy.rebalance_experts(self.sums, old.shape[1], 1, 1, RANKS, old)

    def _move_a_layer(self) -> None:
        """vLLM's worker thread plans; its main thread then commits a layer per step."""
        if not self.layers:
            self.layers = list(self._new_map())
        self.commit_layer(self.state, self.layers.pop(0), LAYERS - len(self.layers) - 1)
        self.state.rebalanced = bool(self.layers)

    def _allreduce_list(self, tensors: list[Any]) -> list[Any]:
        everybody = self.collectives.exchange("all_reduce", tensors)
        return [torch.stack(one).sum(dim=0) for one in zip(*everybody, strict=True)]


class State(PlainState):
    """The same with every hook of the level."""

    add_model = hook._add_model(PlainState.add_model)
    step = hook._step(PlainState.step)
    rearrange = hook._rearrange(PlainState.rearrange)
    _allreduce_list = hook._allreduce_list(PlainState._allreduce_list)
    commit = staticmethod(hook._commit(plain_commit))
    commit_layer = staticmethod(hook._commit_layer(plain_commit_layer))


class PlainRunner:
    """What the level touches of vLLM's model runner."""

    def __init__(self, state: State) -> None:
        self.eplb_state = state

    def execute_model(self, scheduler_output: Any) -> None:
        self.ran = scheduler_output

    def sample_tokens(self, grammar_output: Any) -> Any:
        return SimpleNamespace(req_ids=["a"])


class Runner(PlainRunner):
    execute_model = hook._execute_model(PlainRunner.execute_model)
    sample_tokens = hook._sample_tokens(PlainRunner.sample_tokens)


class Life:
    """One group's steps; what came of them.

    Attributes:
        members: of the ranks.
        collectives: that they were in.
        maps: per rank, the map in force after every step.
    """

    def __init__(self) -> None:
        self.collectives = Collectives()
        self.states = [State(self.collectives) for _ in range(RANKS)]
        self.maps: list[list[Any]] = [[] for _ in range(RANKS)]
        self.left_at: list[int] = []  # collectives so far when a rank had its policy back
        self._errors: list[BaseException] = []

    @property
    def members(self) -> list[Member]:
        return [member for state in self.states if (member := member_of(state)) is not None]

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._rank, args=(rank,), name=f"rank{rank}")
            for rank in range(RANKS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            first = [e for e in self._errors if not isinstance(e, threading.BrokenBarrierError)]
            raise (first or self._errors)[0]

    def wrong(self) -> str | None:
        """What is not as it must be at the end."""
        names = self.collectives.names
        if names[0] != names[1]:
            return f"collectives differ: {names}"
        for step, maps in enumerate(zip(*self.maps, strict=True)):
            if any(not torch.equal(maps[0], other) for other in maps):
                return f"maps differ after step {step}"
            for layer in maps[0].tolist():
                if set(layer) != set(range(EXPERTS)):
                    return f"no map after step {step}: {layer}"
        off = {member.off for member in self.members}
        if len(off) != 1:
            return "some ranks are off, and some are not"
        if off == {True}:
            if any(state.policy is not VllmPolicy for state in self.states):
                return "off, and the policy is not vLLM's"
            if set(names[0][max(self.left_at) :]) - {"all_reduce"}:
                return f"off, and the ranks still vote: {names[0]}"
        elif any(member.guard.disabled or member.controller is None for member in self.members):
            return "a rank is off, and the group does not know"
        return None

    def _rank(self, rank: int) -> None:
        _here.rank = rank
        try:
            self._serve(rank, self.states[rank])
        except BaseException as error:
            self._errors.append(error)
            self.collectives.abort()

    def _serve(self, rank: int, state: State) -> None:
        state.add_model(_model(), _model_config())
        runner, left = Runner(state), False
        worker = SimpleNamespace(model_runner=runner)
        for step in range(STEPS):
            state.is_async = step >= STEPS // 2 or state.state.rebalanced
            state.routed = np.roll(skewed(RANKS)[rank], 2 * (step // 8), axis=1)
            runner.execute_model(_scheduled())
            state.step(log_stats=False)
            runner.sample_tokens(None)
            self.maps[rank].append(state.state.physical_to_logical_map.clone())
            self._check_tables(state.state)
            if step % 6 == 5:
                assert isinstance(gimbal_routing(worker), dict)
                assert gimbal_experts_map(worker)["physical_to_logical"]
            if not left and state.policy is VllmPolicy:
                left = True
                self.left_at.append(len(self.collectives.names[rank]))

    @staticmethod
    def _check_tables(state: Any) -> None:
        """A token of an expert goes to a slot that holds it, whatever entry its hash picks."""
        for layer, slots in enumerate(state.physical_to_logical_map.tolist()):
            for expert in range(EXPERTS):
                count = int(state.logical_replica_count[layer, expert])
                entries = state.logical_to_physical_map[layer, expert, :count].tolist()
                assert entries
                assert {slots[entry] for entry in entries} == {expert}


def _model() -> Any:
    weights = [[torch.zeros(EXPERTS, 50_000)]]
    return SimpleNamespace(expert_weights=weights, moe_layers=[SimpleNamespace()])


def _model_config() -> Any:
    return SimpleNamespace(
        compute_hash=lambda: "demo",
        hf_text_config=SimpleNamespace(num_experts_per_tok=2),
        get_hidden_size=lambda: 256,
    )


def _scheduled() -> Any:
    return SimpleNamespace(num_scheduled_tokens={"a": 7, "b": 1}, scheduled_spec_decode_tokens={})


def in_one_process(monkeypatch: Any, alive: Callable[[], Collectives]) -> None:
    """vLLM's groups and configuration are those of this module; `alive` tells whose turn it is."""
    import vllm.config
    from vllm.distributed import parallel_state

    config = SimpleNamespace(additional_config={"gimbal": CONFIG})
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(parallel_state, "get_node_count", lambda: 1)
    monkeypatch.setattr(
        parallel_state,
        "get_ep_group",
        lambda: SimpleNamespace(rank_in_group=_here.rank, world_size=RANKS),
    )
    monkeypatch.setattr(hook, "_all_gather", lambda row: torch.stack(alive().exchange("rows", row)))
    monkeypatch.setattr(hook, "gather_over", lambda _: lambda vote: alive().exchange("vote", vote))
    monkeypatch.setattr(hook, "LevelGuard", lambda level: LevelGuard(level, max_consecutive=3))
    monkeypatch.setattr(hook, "_warm_up", lambda view: setattr(view, "ready", True))
