"""Ties `member` and `controller` to vLLM's ``EplbState``; inert unless the level is on.

Every patch looks for a member on the state it is called with and leaves vLLM alone when there is
none. It calls vLLM's function once, and what is Gimbal's behind the member's guard.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from typing import Any

from gimbal.core.config import GimbalConfig
from gimbal.core.guard import LevelGuard
from gimbal.core.model import ModelConfig, count_top_k
from gimbal.core.placement.planner import ModelFacts, Planner, planner_for
from gimbal.vllm_plugin.bridge import level_config
from gimbal.vllm_plugin.engine import news
from gimbal.vllm_plugin.placement.agreement import gather_over
from gimbal.vllm_plugin.placement.compiling import warm_up
from gimbal.vllm_plugin.placement.controller import Controller
from gimbal.vllm_plugin.placement.member import Member, join, member_of
from gimbal.vllm_plugin.placement.sending import SendMeter
from gimbal.vllm_plugin.placement.view import ModelView, Place

logger = logging.getLogger("vllm.gimbal")

LEVEL = "placement"


def install() -> None:
    """Patches the EPLB state and the model runner, once per process."""
    from vllm.distributed.eplb import eplb_state as module
    from vllm.v1.worker.worker_base import WorkerBase

    from gimbal.vllm_plugin.placement.stats import gimbal_experts_map, gimbal_routing

    state = module.EplbState
    if getattr(state, "gimbal_placement", False):
        return
    state.gimbal_placement = True
    state.add_model = _add_model(state.add_model)
    state.step = _step(state.step)
    state.rearrange = _rearrange(state.rearrange)
    state._allreduce_list = _allreduce_list(state._allreduce_list)
    module._commit_eplb_maps = _commit(module._commit_eplb_maps)
    module._commit_eplb_maps_for_layer = _commit_layer(module._commit_eplb_maps_for_layer)
    WorkerBase.gimbal_routing = gimbal_routing
    WorkerBase.gimbal_experts_map = gimbal_experts_map


def _add_model(original: Any) -> Any:
    @functools.wraps(original)
    def add_model(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, model_config, *args, **kwargs)
        attach(self, model_config)

    return add_model


def attach(state: Any, model_config: Any) -> None:
    """Makes `state` a member when the level is on, and shows it the model just added.

    All ranks become members or none, as all have one configuration. What else fails costs this
    rank its controller, and it takes part without.
    """
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    config = None if vllm_config is None else level_config(vllm_config, LEVEL)
    if config is None:
        return
    member = member_of(state)
    if member is None:
        member = Member(LevelGuard(LEVEL), gather_over(_eplb_cpu_group), state.policy)
        join(state, member)
        member.controller = member.guard.run("attach", _new_controller, state, config, member.guard)
        member.guard.run("model runner", patch_model_runners)
    state.policy = member
    model_state = state.model_states[model_config.compute_hash()]
    join(model_state, member)
    controller = member.controller
    if controller is not None:
        arguments = controller, state, model_state, model_config
        member.controller = member.guard.run("attach", _with_model, *arguments)


def _eplb_cpu_group() -> Any:
    from vllm.distributed.parallel_state import get_eplb_group

    return get_eplb_group().cpu_group


def _with_model(
    controller: Controller, state: Any, model_state: Any, model_config: Any
) -> Controller:
    """`controller`, which knows one model more; its planner is compiled in a thread."""
    planner = planner_for(controller.config, _facts(state, model_state, model_config))
    meter = _meter(planner, controller.place) if controller.feedback else None
    view = ModelView(model_state, planner, meter, ready=False)
    controller.models.append(view)
    threading.Thread(target=_warm_up, args=(view,), daemon=True).start()
    return controller


def _meter(planner: Planner, place: Place) -> SendMeter | None:
    """None where placement decides no byte, or there is nobody to send to."""
    nodes = place.ranks // place.ranks_per_node
    sources = place.ranks // place.ranks_per_source
    wire_us = planner.wire_us_per_pair(nodes)
    if not wire_us or sources < 2:
        return None
    return SendMeter(wire_us, place.source, sources, place.ranks_per_source)


def _warm_up(view: ModelView) -> None:
    try:
        logger.info("Gimbal placement: ready to plan after %.1f s", warm_up(view.planner))
    except Exception:
        logger.exception("Gimbal placement: planning fails on a toy problem")
    view.ready = True  # a planner that cannot plan fails where failures are counted


def _new_controller(state: Any, config: GimbalConfig, guard: LevelGuard) -> Controller:
    from vllm.distributed.parallel_state import get_ep_group, get_node_count

    group = get_ep_group()
    parallel = state.parallel_config
    nodes = get_node_count()
    place = Place(
        rank=group.rank_in_group,
        ranks=group.world_size,
        ranks_per_source=group.world_size // parallel.data_parallel_size,
        ranks_per_node=max(1, group.world_size // nodes),
    )
    return Controller(
        config=config.placement,
        place=place,
        guard=guard,
        window_size=parallel.eplb_config.window_size,
        feedback="feedback" in config.levels,
    )


def _facts(state: Any, model_state: Any, model_config: Any) -> ModelFacts:
    weights = model_state.model.expert_weights[0]
    text = ModelConfig(vars(model_config.hf_text_config), "the model's configuration")
    parallel = state.parallel_config
    return ModelFacts(
        expert_bytes=float(sum(w[0].numel() * w.element_size() for w in weights)),
        top_k=count_top_k(text),
        hidden_bytes=float(model_config.get_hidden_size() * 2),
        on_cpu=model_state.expert_load_window.device.type == "cpu",
        all2all_backend=str(parallel.all2all_backend),
        step_interval=int(parallel.eplb_config.step_interval),
    )


def _taking_part(state: Any) -> Member | None:
    """The member of `state`; None once all ranks have left placement to vLLM's own policy."""
    member = member_of(state)
    if member is None or not member.off:
        return member
    if state.policy is member:
        state.policy = member.fallback
    return None


def _step(original: Any) -> Any:
    @functools.wraps(original)
    def step(
        self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
    ) -> None:
        member = None if is_profile else _taking_part(self)
        controller = None if member is None else member.acting
        if controller is None:
            original(self, is_dummy, is_profile, log_stats)
            return
        controller.step += 1  # here, as ranks must count alike
        run = controller.guard.run
        note = run("step not noted", controller.step_begins, self, is_dummy, log_stats)
        original(self, is_dummy, is_profile, log_stats)
        run("step not closed", controller.step_ended, self, note)

    return step


def _rearrange(original: Any) -> Any:
    @functools.wraps(original)
    def rearrange(
        self: Any,
        is_profile: bool = False,
        rank_mapping: Any = None,
        use_last_expert_load: bool = False,
    ) -> Any:
        member = _taking_part(self)
        if member is None:
            return original(self, is_profile, rank_mapping, use_last_expert_load)
        member.begin(not is_profile and rank_mapping is None and not use_last_expert_load)
        start = time.perf_counter()
        try:
            return original(self, is_profile, rank_mapping, use_last_expert_load)
        finally:
            member.end()
            controller = member.acting
            if controller is not None and not self.is_async and not is_profile:
                elapsed_us = (time.perf_counter() - start) * 1e6
                member.guard.run("stall not noted", controller.stalled, elapsed_us)

    return rearrange


def _allreduce_list(original: Any) -> Any:
    @functools.wraps(original)
    def _allreduce_list(self: Any, tensor_list: list[Any]) -> list[Any]:
        member = member_of(self)
        if member is None or member.mode != "gather":
            result: list[Any] = original(self, tensor_list)
            return result
        return member.gather(tensor_list, _all_gather)

    return _allreduce_list


def _all_gather(vector: Any) -> Any:
    """[ranks, n] from every rank's [n], in rank order, over the expert-parallel group."""
    from torch.distributed import all_gather_single
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group().device_group
    # In place: a list of parts would be held beside the rows that are made of them.
    gathered = vector.new_empty(group.size() * vector.numel())
    all_gather_single(gathered, vector, group=group)
    return gathered.view(group.size(), -1)


def _commit(original: Any) -> Any:
    @functools.wraps(original)
    def _commit_eplb_maps(model_state: Any, new_physical_to_logical_map: Any) -> None:
        old = _map_in_force(model_state, slice(None))
        original(model_state, new_physical_to_logical_map)
        _committed(model_state, old, 0)

    return _commit_eplb_maps


def _commit_layer(original: Any) -> Any:
    @functools.wraps(original)
    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: Any, layer: int
    ) -> None:
        old = _map_in_force(model_state, slice(layer, layer + 1))
        original(model_state, new_physical_to_logical_map, layer)
        _committed(model_state, old, layer)

    return _commit_eplb_maps_for_layer


def _map_in_force(model_state: Any, layers: slice) -> Any:
    """A copy of it; None where nobody will ask."""
    member = member_of(model_state)
    if member is None or member.acting is None:
        return None
    return member.guard.run("old map", lambda: model_state.physical_to_logical_map[layers].clone())


def _committed(model_state: Any, old: Any, first_layer: int) -> None:
    """The commit stands whatever fails here: vLLM's own tables are already in force."""
    member = member_of(model_state)
    controller = None if member is None or old is None else member.acting
    if controller is not None:
        arguments = model_state, old, first_layer, old.shape[0]
        controller.guard.run("replica tables", controller.committed, *arguments)


MODEL_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""Modules of vLLM's two model runners; the second ("V2") is what it takes on GPUs by default."""


def patch_model_runners() -> None:
    """Patches the runners this worker has imported: it has built its own before its model."""
    for name in MODEL_RUNNERS:
        module = sys.modules.get(name)
        if module is not None:
            patch_model_runner(module.GPUModelRunner)


def patch_model_runner(runner: type) -> None:
    """Notes each step's prefill and decode tokens, and sends news with its output."""
    original = runner.execute_model  # type: ignore[attr-defined]
    if getattr(original, "gimbal_placement", False):
        return
    runner.execute_model = _execute_model(original)  # type: ignore[attr-defined]
    runner.sample_tokens = _sample_tokens(runner.sample_tokens)  # type: ignore[attr-defined]


def _execute_model(original: Any) -> Any:
    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        member = member_of(self.eplb_state)
        if member is not None and (controller := member.acting) is not None:
            batch = member.guard.run("batch", batch_tokens, scheduler_output)
            controller.batch = batch or (0, 0)
        return original(self, scheduler_output, *args, **kwargs)

    execute_model.gimbal_placement = True  # type: ignore[attr-defined]
    return execute_model


def _sample_tokens(original: Any) -> Any:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        member = member_of(self.eplb_state)
        if member is not None:
            member.guard.run("news", attach_news, member, output)
        return output

    return sample_tokens


def attach_news(member: Member, output: Any) -> None:
    """Sends this engine's pressure, figures and fallbacks to its scheduler with a step's output.

    The output object travels to the engine process whole, so a value on it needs no channel of
    its own. Outputs without requests are shared constants and stay as they are.
    """
    fallbacks, controller = sum(member.guard.counts.values()), member.controller
    pressed = controller is not None and controller.pressure_news
    figured = controller is not None and controller.rebalance_log.unsent
    ended = member.acting is None and not member.off_sent
    if not pressed and not figured and not ended and fallbacks == member.fallbacks_sent:
        return
    inner = output
    for name in ("_model_runner_output", "model_runner_output"):  # still on its way from the device
        inner = getattr(output, name, inner)
    if not getattr(inner, "req_ids", None):
        return
    if controller is not None and pressed:
        setattr(inner, news.PRESSURE_US, controller.pressure_us)
        controller.pressure_news = False
    if controller is not None and figured:
        # First: an asynchronous rearrangement may add to them meanwhile, in its thread.
        controller.rebalance_log.unsent = False
        setattr(inner, news.PLACEMENT, dict(controller.rebalance_log.figures))
    if fallbacks != member.fallbacks_sent:
        setattr(inner, news.FALLBACKS, fallbacks)
        member.fallbacks_sent = fallbacks
    if ended:
        setattr(inner, news.OFF, True)
        member.off_sent = True


def batch_tokens(scheduler_output: Any) -> tuple[int, int]:
    """(prefill, decode) tokens of a step.

    A request that runs one token, plus those a speculator proposed for it, decodes. The last
    single token of a prefill chunk is counted as a decode: one token.
    """
    scheduled = scheduler_output.num_scheduled_tokens
    proposed = scheduler_output.scheduled_spec_decode_tokens
    decode = 0
    for request, tokens in scheduled.items():
        if tokens == 1 or (proposed and tokens == 1 + len(proposed.get(request, ()))):
            decode += tokens
    return sum(scheduled.values()) - decode, decode
