"""Every vLLM symbol Gimbal patches, subclasses or calls into, with the signature it expects.

The one list that says what a new vLLM version can break. Signatures are compared by parsing
vLLM's source, never by importing it, so that ``gimbal doctor --vllm-source`` can check a wheel
that is not installed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seam:
    """One symbol of vLLM.

    Attributes:
        module: dotted module below ``vllm``, for example ``v1.engine.core_client``.
        symbol: qualified name inside the module, for example ``DPLBAsyncMPClient.__init__``.
        parameters: parameter names in order, ``*`` marks as in a signature; empty for a class or
            a module-level name, where only existence is checked.
        level: the Gimbal level (or ``cpu_backend``) that stops working without it.
        why: what Gimbal does with it.
        patched: True when Gimbal replaces it, False when it only calls or subclasses it.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    level: str
    why: str
    patched: bool = True


SEAMS: tuple[Seam, ...] = (
    # --- signals, dispatch and control
    Seam(
        "v1.engine.utils",
        "CoreEngineProcManager.__init__",
        (
            "self",
            "local_engine_count",
            "start_index",
            "local_start_index",
            "vllm_config",
            "local_client",
            "handshake_address",
            "executor_class",
            "log_stats",
            "client_handshake_address",
            "tensor_queue",
        ),
        "dispatch",
        "before it starts the engines: names the board and makes it",
    ),
    Seam(
        "config.scheduler",
        "SchedulerConfig.get_scheduler_cls",
        ("self",),
        "dispatch",
        "the class it returns is built with signals, and the queue, in front",
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.schedule",
        ("self", "throttle_prefills"),
        "dispatch",
        "overridden: a step was put together",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "dispatch",
        "overridden: a step is done",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.add_request",
        ("self", "request"),
        "dispatch",
        "overridden: the engine takes a request",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler._enqueue_waiting_request",
        ("self", "request"),
        "dispatch",
        "overridden: a request waits",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler._preempt_request",
        ("self", "request", "timestamp", "drop_stale_output"),
        "dispatch",
        "overridden: a request goes back to waiting",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler._handle_stopped_request",
        ("self", "request"),
        "dispatch",
        "overridden: a turn of a streaming session ends",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler._free_request",
        ("self", "request", "delay_free_blocks"),
        "dispatch",
        "overridden: a request is over",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.has_requests",
        ("self",),
        "dispatch",
        "overridden: an engine without work says so",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.shutdown",
        ("self",),
        "dispatch",
        "overridden: lets go of the board",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.get_request_counts",
        ("self",),
        "dispatch",
        "read for every snapshot",
        patched=False,
    ),
    Seam(
        "v1.core.kv_cache_manager",
        "KVCacheManager.get_computed_blocks",
        (),
        "dispatch",
        "called once per waiting request for its cached tokens",
        patched=False,
    ),
    Seam(
        "v1.core.block_pool",
        "BlockPool.get_num_free_blocks",
        ("self",),
        "dispatch",
        "read for every snapshot",
        patched=False,
    ),
    Seam(
        "v1.engine.core",
        "EngineCoreProc._handle_request_preproc_error",
        ("self", "request"),
        "dispatch",
        "followed by counting the request as taken",
    ),
    Seam(
        "v1.engine.core",
        "EngineCoreProc._handle_mm_cache_miss",
        ("self", "request", "err"),
        "dispatch",
        "followed by counting the request as taken",
    ),
    Seam(
        "v1.engine.core_client",
        "DPLBAsyncMPClient.__init__",
        (
            "self",
            "vllm_config",
            "executor_class",
            "log_stats",
            "client_addresses",
            "client_count",
            "client_index",
            "renderer",
        ),
        "dispatch",
        "followed by attaching the front end",
    ),
    Seam(
        "v1.engine.core_client",
        "DPLBAsyncMPClient.get_core_engine_for_request",
        ("self", "request"),
        "dispatch",
        "the decision; called in turn with the rank set",
    ),
    Seam(
        "v1.engine.core_client",
        "DPLBAsyncMPClient.process_engine_outputs",
        ("self", "outputs"),
        "dispatch",
        "tells which requests are over",
    ),
    Seam(
        "v1.engine",
        "EngineCoreRequest",
        (),
        "dispatch",
        "prompt, session, pinned rank and priority of a request",
        patched=False,
    ),
    Seam(
        "utils",
        "length_from_prompt_token_ids_or_embeds",
        ("prompt_token_ids", "prompt_embeds"),
        "dispatch",
        "counts prompt tokens as the engine will",
        patched=False,
    ),
    Seam(
        "plugins.endpoint_plugins.interface",
        "EndpointPlugin",
        (),
        "control",
        "protocol of the routes /gimbal/status and /gimbal/control",
        patched=False,
    ),
    Seam(
        "v1.engine.async_llm",
        "AsyncLLM.reset_prefix_cache",
        ("self", "reset_running_requests", "reset_connector"),
        "control",
        "called between two compared runs",
        patched=False,
    ),
    # --- serve: gimbal serve runs vLLM's own server
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.subparser_init",
        ("self", "subparsers"),
        "serve",
        "builds the parser of vLLM's serve command",
        patched=False,
    ),
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.validate",
        ("self", "args"),
        "serve",
        "checks the parsed arguments",
        patched=False,
    ),
    Seam(
        "entrypoints.cli.serve",
        "ServeSubcommand.cmd",
        ("args",),
        "serve",
        "serves until stopped",
        patched=False,
    ),
    Seam(
        "logger",
        "configure_logging_from_args",
        ("args",),
        "serve",
        "as vLLM's console script does before it serves",
        patched=False,
    ),
    Seam(
        "utils.argparse_utils",
        "FlexibleArgumentParser.parse_args",
        ("self", "args", "namespace"),
        "serve",
        "parses vLLM's flags, dotted and from --config files too",
        patched=False,
    ),
    Seam(
        "utils.system_utils",
        "get_mp_context",
        (),
        "serve",
        "asked for spawn, which the zygote answers with forks on CPU",
        patched=False,
    ),
    # --- cpu_backend: vLLM's missing CPU expert parallelism
    Seam(
        "engine.arg_utils",
        "EngineArgs.create_engine_config",
        ("self", "usage_context", "headless"),
        "cpu_backend",
        "lets enable_eplb pass on CPU and names Gimbal's worker class",
    ),
    Seam(
        "config.parallel",
        "current_platform",
        (),
        "cpu_backend",
        "replaced while one configuration is built: enable_eplb asks it for is_cuda_alike",
    ),
    Seam(
        "platforms.cpu",
        "CpuPlatform.get_device_communicator_cls",
        ("cls",),
        "cpu_backend",
        "answers with the communicator that has all_gatherv and reduce_scatterv",
    ),
    Seam(
        "distributed.device_communicators.cpu_communicator",
        "CpuCommunicator.__init__",
        ("self", "cpu_group", "device", "device_group", "unique_name", "use_all2all"),
        "cpu_backend",
        "base of that communicator",
        patched=False,
    ),
    Seam(
        "model_executor.layers.fused_moe.experts.cpu_moe",
        "CPUUnquantizedExperts.apply",
        (
            "self",
            "output",
            "hidden_states",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "activation",
            "global_num_experts",
            "expert_map",
            "a1q_scale",
            "a2_scale",
            "workspace13",
            "workspace2",
            "expert_tokens_meta",
            "apply_router_weight_on_input",
        ),
        "cpu_backend",
        "computes only the pairs whose expert is local when there is an expert map",
    ),
    Seam(
        "_custom_ops",
        "cpu_fused_moe",
        (
            "out",
            "input",
            "w13",
            "w2",
            "w13_bias",
            "w2_bias",
            "topk_weights",
            "topk_ids",
            "act",
            "isa",
            "skip_weighted",
        ),
        "cpu_backend",
        "the expert kernel",
        patched=False,
    ),
    Seam(
        "model_executor.layers.fused_moe.router.base_router",
        "eplb_map_to_physical_and_record",
        (
            "topk_ids",
            "expert_load_view",
            "logical_to_physical_map",
            "logical_replica_count",
            "record_enabled",
            "num_unpadded_tokens",
        ),
        "cpu_backend",
        "a no-op on CPU: maps to physical experts and counts the load",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.__init__",
        ("self", "parallel_config", "device"),
        "cpu_backend",
        "gets a device index, which the asynchronous worker asserts",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.step",
        ("self", "is_dummy", "is_profile", "log_stats"),
        "cpu_backend",
        "followed by counting the experts that moved and a look at the asynchronous worker",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.add_model",
        ("self", "model", "model_config", "model_name"),
        "cpu_backend",
        "called by the CPU model runner, which vLLM leaves without EPLB state",
        patched=False,
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.start_async_loop",
        ("self", "rank_mapping", "is_profile"),
        "cpu_backend",
        "called by the CPU model runner",
        patched=False,
    ),
    *(
        Seam(
            f"distributed.eplb.{module}",
            "torch",
            (),
            "cpu_backend",
            "events, streams and device index of the host instead of an accelerator's",
        )
        for module in ("eplb_state", "eplb_utils", "eplb_communicator", "async_worker")
    ),
    Seam(
        "model_executor.models.interfaces",
        "get_mixture_of_experts_model",
        ("model",),
        "cpu_backend",
        "finds the MoE model that EPLB is created for",
        patched=False,
    ),
    Seam(
        "v1.worker.cpu_worker",
        "CPUWorker.init_device",
        ("self",),
        "cpu_backend",
        "subclassed: activates the backend, then builds the model runner",
        patched=False,
    ),
    Seam(
        "v1.worker.cpu_worker",
        "CPUModelRunner",
        (),
        "cpu_backend",
        "the name init_device builds the model runner from; ours while it runs",
    ),
    Seam(
        "v1.worker.cpu_model_runner",
        "CPUModelRunner.load_model",
        ("self", "load_dummy_weights"),
        "cpu_backend",
        "subclassed: creates the EPLB state after loading",
        patched=False,
    ),
    # --- placement: routing statistics, policy and commit of expert migrations
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.add_model",
        ("self", "model", "model_config", "model_name"),
        "placement",
        "gives the state a controller and makes it the policy",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.step",
        ("self", "is_dummy", "is_profile", "log_stats"),
        "placement",
        "notes age and kind of every recorded step; watches the asynchronous worker",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState.rearrange",
        ("self", "is_profile", "rank_mapping", "use_last_expert_load"),
        "placement",
        "tells a rearrangement of ours from profile runs and elastic scaling; times it",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState._allreduce_list",
        ("self", "tensor_list"),
        "placement",
        "gathers rows per rank where vLLM sums them",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "EplbState._should_record_current_step",
        ("self", "log_stats"),
        "placement",
        "whether the coming step is written to the load window",
        patched=False,
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "_commit_eplb_maps",
        ("model_state", "new_physical_to_logical_map"),
        "placement",
        "carries the load window over and writes the rank's own replica tables",
    ),
    Seam(
        "distributed.eplb.eplb_state",
        "_commit_eplb_maps_for_layer",
        ("model_state", "new_physical_to_logical_map", "layer"),
        "placement",
        "the same for one layer of an asynchronous rearrangement",
    ),
    Seam(
        "distributed.eplb.policy.default",
        "DefaultEplbPolicy.rebalance_experts",
        (
            "cls",
            "weight",
            "num_replicas",
            "num_groups",
            "num_nodes",
            "num_ranks",
            "old_global_expert_indices",
        ),
        "placement",
        "plans profile runs, elastic scaling, and everything once the level is off",
        patched=False,
    ),
    Seam(
        "distributed.eplb.policy",
        "EPLB_POLICIES",
        (),
        "placement",
        "vLLM's policy by name",
        patched=False,
    ),
    Seam(
        "distributed.parallel_state",
        "get_eplb_group",
        (),
        "placement",
        "the group that votes on a map",
        patched=False,
    ),
    Seam(
        "distributed.parallel_state",
        "get_ep_group",
        (),
        "placement",
        "the group whose rows are gathered",
        patched=False,
    ),
    Seam(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner.execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
        "placement",
        "reads how many tokens of the step prefill and decode",
    ),
    Seam(
        "v1.worker.gpu_model_runner",
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
        "placement",
        "sends the engine's expert pressure with the step's output",
    ),
    Seam(
        "v1.engine.core_client",
        "AsyncMPClient.call_utility_all_async",
        ("self", "method", "*args"),
        "placement",
        "asks the workers of every engine for their routing statistics",
        patched=False,
    ),
    Seam(
        "v1.worker.worker_base",
        "WorkerBase",
        (),
        "placement",
        "gains the method `gimbal_routing` for collective_rpc",
    ),
    # --- queue: the engine's waiting queue and prefill budget
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler.schedule",
        ("self", "throttle_prefills"),
        "queue",
        "sets the step's token budget and the caps of running prefills around it",
        patched=False,
    ),
    Seam(
        "v1.core.sched.scheduler",
        "Scheduler._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        "queue",
        "caps the chunk of a running prefill that yields to shorter newcomers",
    ),
    Seam(
        "v1.core.sched.request_queue",
        "create_request_queue",
        ("policy",),
        "queue",
        "the queue that takes over when Gimbal's fails",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.add_request",
        ("self", "request"),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.prepend_request",
        ("self", "request"),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.remove_request",
        ("self", "request"),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.prepend_requests",
        ("self", "requests"),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.remove_requests",
        ("self", "requests"),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.pop_request",
        ("self",),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.peek_request",
        ("self",),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.__bool__",
        ("self",),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.__len__",
        ("self",),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.request_queue",
        "RequestQueue.__iter__",
        ("self",),
        "queue",
        "implemented by Gimbal's waiting queue",
        patched=False,
    ),
    Seam(
        "v1.core.sched.interface",
        "PauseState",
        (),
        "queue",
        "a paused scheduler admits nobody a prefill could yield to",
        patched=False,
    ),
    Seam(
        "v1.core.block_pool",
        "BlockPool.get_num_free_blocks",
        ("self",),
        "queue",
        "whether a request's KV blocks are there",
        patched=False,
    ),
    Seam(
        "v1.core.kv_cache_manager",
        "KVCacheManager.get_computed_blocks",
        (),
        "queue",
        "blocks of a shared prefix that a request need not allocate",
        patched=False,
    ),
    Seam(
        "v1.metrics.loggers",
        "StatLoggerManager.__init__",
        (
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        "queue",
        "gains a logger of waiting times by prompt size",
    ),
    Seam(
        "v1.metrics.loggers",
        "PerEngineStatLoggerAdapter",
        (),
        "queue",
        "carries that logger",
        patched=False,
    ),
    Seam(
        "v1.metrics.stats",
        "FinishedRequestStats",
        (),
        "queue",
        "queue time and uncached tokens of a finished request",
        patched=False,
    ),
)


@dataclass(frozen=True, slots=True)
class SeamProblem:
    """A seam that does not look as expected in one vLLM source tree."""

    seam: Seam
    found: str


def check_seams(vllm_root: Path, seams: tuple[Seam, ...] | None = None) -> list[SeamProblem]:
    """Compares `seams` with the sources below `vllm_root` (the folder that holds ``v1/``)."""
    problems = []
    trees: dict[Path, ast.Module] = {}
    for seam in SEAMS if seams is None else seams:
        base = vllm_root.joinpath(*seam.module.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if not path.exists():
            problems.append(SeamProblem(seam, f"no module {seam.module}"))
            continue
        if path not in trees:
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
        node = _find(trees[path], seam.symbol.split("."))
        if node is None:
            problems.append(SeamProblem(seam, "no such symbol"))
        elif seam.parameters:
            found = _parameters(node)
            if found != seam.parameters:
                problems.append(SeamProblem(seam, f"({', '.join(found)})"))
    return problems


def _find(node: ast.AST, path: list[str]) -> ast.AST | None:
    """The definition, assignment or import named by `path`, directly below `node` or in if/try."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if name == path[0]:
                return child if len(path) == 1 else _find(child, path[1:])
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            if len(path) == 1 and any(isinstance(t, ast.Name) and t.id == path[0] for t in targets):
                return child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            if len(path) == 1 and any((a.asname or a.name) == path[0] for a in child.names):
                return child
        elif isinstance(child, ast.If | ast.Try) and (found := _find(child, path)) is not None:
            return found
    return None


def _parameters(node: ast.AST) -> tuple[str, ...]:
    """Parameter names of a function, with ``*args``, ``*`` and ``**kwargs`` marks."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ("<not a function>",)
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    if args.vararg is not None:
        names.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        names.append("*")
    names += [a.arg for a in args.kwonlyargs]
    if args.kwarg is not None:
        names.append(f"**{args.kwarg.arg}")
    return tuple(names)
