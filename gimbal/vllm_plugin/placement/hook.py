"""Ties `controller` to vLLM's ``EplbState``; inert unless the level `placement` is on.

Every patch looks for a controller on the state it is called with and leaves vLLM alone when there
is none.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
from typing import Any

from gimbal.core.guard import LevelGuard
from gimbal.core.placement.planner import ModelFacts, Planner, planner_for
from gimbal.vllm_plugin.bridge import level_config
from gimbal.vllm_plugin.engine import news
from gimbal.vllm_plugin.placement.agreement import gather_over
from gimbal.vllm_plugin.placement.compiling import warm_up
from gimbal.vllm_plugin.placement.controller import Controller
from gimbal.vllm_plugin.placement.sending import SendMeter
from gimbal.vllm_plugin.placement.view import ModelView, Place

logger = logging.getLogger("vllm.gimbal")

LEVEL = "placement"


def install() -> None:
    """Patches the EPLB state and the model runner, once per process."""
    from vllm.distributed.eplb import eplb_state as module

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
    from vllm.v1.worker.worker_base import WorkerBase

    from gimbal.vllm_plugin.placement.stats import gimbal_experts_map, gimbal_routing

    WorkerBase.gimbal_routing = gimbal_routing
    WorkerBase.gimbal_experts_map = gimbal_experts_map


def controller_of(state: Any) -> Controller | None:
    """The controller of an ``EplbState`` or an ``EplbModelState``."""
    found: Controller | None = getattr(state, "_gimbal_controller", None)
    return found


def _add_model(original: Any) -> Any:
    @functools.wraps(original)
    def add_model(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, model_config, *args, **kwargs)
        attach(self, model_config)

    return add_model


def attach(state: Any, model_config: Any) -> None:
    """Gives `state` a controller when the level is on, and shows it the model just added."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    config = None if vllm_config is None else level_config(vllm_config, LEVEL)
    if config is None:
        return
    controller = controller_of(state)
    if controller is None:
        controller = _new_controller(state, config.placement)
        controller.feedback = "feedback" in config.levels
        state._gimbal_controller = controller
        patch_model_runners()
    model_state = state.model_states[model_config.compute_hash()]
    model_state._gimbal_controller = controller
    planner = planner_for(config.placement, _facts(state, model_state, model_config))
    meter = _meter(planner, controller.place) if controller.feedback else None
    controller.models.append(ModelView(model_state, planner, meter))
    controller.naive |= any(map(routes_all_tokens, model_state.model.moe_layers))
    controller.models[-1].ready = False
    threading.Thread(target=_warm_up, args=(controller.models[-1],), daemon=True).start()
    state.policy = controller


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


def _new_controller(state: Any, config: Any) -> Controller:
    from vllm.distributed.eplb.policy import EPLB_POLICIES
    from vllm.distributed.parallel_state import get_ep_group, get_eplb_group, get_node_count

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
        config=config,
        place=place,
        guard=LevelGuard(LEVEL),
        vote=gather_over(lambda: get_eplb_group().cpu_group),
        fallback=EPLB_POLICIES[parallel.eplb_config.policy],
        window_size=parallel.eplb_config.window_size,
    )


def _facts(state: Any, model_state: Any, model_config: Any) -> ModelFacts:
    weights = model_state.model.expert_weights[0]
    text = model_config.hf_text_config
    parallel = state.parallel_config
    return ModelFacts(
        expert_bytes=float(sum(w[0].numel() * w.element_size() for w in weights)),
        top_k=int(getattr(text, "num_experts_per_tok", 0) or 1),
        hidden_bytes=float(model_config.get_hidden_size() * 2),
        on_cpu=model_state.expert_load_window.device.type == "cpu",
        all2all_backend=str(parallel.all2all_backend),
        step_interval=int(parallel.eplb_config.step_interval),
    )


def routes_all_tokens(layer: Any) -> bool:
    """Whether this MoE layer gathers router logits first, so that every rank routes every token."""
    for owner in (layer, getattr(layer, "runner", None)):
        for name in ("do_naive_dispatch_combine", "is_monolithic"):
            if bool(getattr(owner, name, False)):
                return True
    return False


def _step(original: Any) -> Any:
    @functools.wraps(original)
    def step(
        self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False
    ) -> None:
        controller = controller_of(self)
        if controller is None or is_profile:
            original(self, is_dummy, is_profile, log_stats)
            return
        controller.step += 1
        slot = None
        if not is_dummy and self._should_record_current_step(log_stats=log_stats):
            slot = self.expert_load_window_step
            controller.recorded(slot)
        moving = self.is_async and any(m.rebalanced for m in self.model_states.values())
        start = time.perf_counter()
        original(self, is_dummy, is_profile, log_stats)
        controller.measure(slot)
        if moving:
            controller.stalled_more((time.perf_counter() - start) * 1e6)
        controller.watch(self)

    return step


def _rearrange(original: Any) -> Any:
    @functools.wraps(original)
    def rearrange(
        self: Any,
        is_profile: bool = False,
        rank_mapping: Any = None,
        use_last_expert_load: bool = False,
    ) -> Any:
        controller = controller_of(self)
        if controller is None:
            return original(self, is_profile, rank_mapping, use_last_expert_load)
        controller.begin(not is_profile and rank_mapping is None and not use_last_expert_load)
        start = time.perf_counter()
        try:
            return original(self, is_profile, rank_mapping, use_last_expert_load)
        finally:
            controller.end()
            if not self.is_async and not is_profile:
                controller.stalled((time.perf_counter() - start) * 1e6)

    return rearrange


def _allreduce_list(original: Any) -> Any:
    @functools.wraps(original)
    def _allreduce_list(self: Any, tensor_list: list[Any]) -> list[Any]:
        controller = controller_of(self)
        if controller is None or controller.mode != "gather":
            result: list[Any] = original(self, tensor_list)
            return result
        return controller.gather(tensor_list, _all_gather)

    return _allreduce_list


def _all_gather(vector: Any) -> Any:
    """[ranks, n] from every rank's [n], in rank order, over the expert-parallel group."""
    import torch
    from torch.distributed import all_gather
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group().device_group
    parts = [torch.empty_like(vector) for _ in range(group.size())]
    all_gather(parts, vector, group=group)
    return torch.stack(parts)


def _commit(original: Any) -> Any:
    @functools.wraps(original)
    def _commit_eplb_maps(model_state: Any, new_physical_to_logical_map: Any) -> None:
        controller = controller_of(model_state)
        if controller is None:
            original(model_state, new_physical_to_logical_map)
            return
        old = model_state.physical_to_logical_map.clone()
        original(model_state, new_physical_to_logical_map)
        _committed(controller, model_state, old, 0)

    return _commit_eplb_maps


def _commit_layer(original: Any) -> Any:
    @functools.wraps(original)
    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: Any, layer: int
    ) -> None:
        controller = controller_of(model_state)
        if controller is None:
            original(model_state, new_physical_to_logical_map, layer)
            return
        old = model_state.physical_to_logical_map[layer : layer + 1].clone()
        original(model_state, new_physical_to_logical_map, layer)
        _committed(controller, model_state, old, layer)

    return _commit_eplb_maps_for_layer


def _committed(controller: Controller, model_state: Any, old: Any, first_layer: int) -> None:
    """The commit stands whatever fails here: vLLM's own tables are already in force."""
    try:
        controller.committed(model_state, old, first_layer, old.shape[0])
    except Exception as error:
        controller.guard.fell_back("replica tables", error)


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

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        controller = controller_of(self.eplb_state)
        if controller is not None:
            controller.batch = batch_tokens(scheduler_output)
        return original(self, scheduler_output, *args, **kwargs)

    execute_model.gimbal_placement = True  # type: ignore[attr-defined]
    runner.execute_model = execute_model  # type: ignore[attr-defined]
    runner.sample_tokens = _sample_tokens(runner.sample_tokens)  # type: ignore[attr-defined]


def _sample_tokens(original: Any) -> Any:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        controller = controller_of(self.eplb_state)
        if controller is not None:
            attach_news(controller, output)
        return output

    return sample_tokens


def attach_news(controller: Controller, output: Any) -> None:
    """Sends this engine's pressure and fallbacks to its scheduler with a step's output.

    The output object travels to the engine process whole, so a value on it needs no channel of
    its own. Outputs without requests are shared constants and stay as they are.
    """
    fallbacks = sum(controller.guard.counts.values())
    if not controller.pressure_news and fallbacks == controller.fallbacks_sent:
        return
    inner = output
    for name in ("_model_runner_output", "model_runner_output"):  # still on its way from the device
        inner = getattr(output, name, inner)
    if not getattr(inner, "req_ids", None):
        return
    if controller.pressure_news:
        setattr(inner, news.PRESSURE_US, controller.pressure_us)
        controller.pressure_news = False
    if fallbacks != controller.fallbacks_sent:
        setattr(inner, news.FALLBACKS, fallbacks)
        controller.fallbacks_sent = fallbacks


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
