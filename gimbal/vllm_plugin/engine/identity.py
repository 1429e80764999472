"""Which server a process belongs to: the name of its board.

vLLM gives no identity that every process of a server knows (with several API servers each makes
its own ``VllmConfig``). The process that launches the engines is the parent of them all, so it
draws a run id there and leaves it in the environment, which engines and API servers inherit. Ray
starts engines elsewhere and gives them the variables that vLLM is asked to copy. Where nobody drew
a run id, the ``instance_id`` of the ``VllmConfig`` serves.

Behind an external load balancer every rank is a server of its own, and still steps with the others.
Those of one host share a board: its name comes from where their group meets.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import secrets
import time
from functools import wraps
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from gimbal.board.file import Board, board_path, sweep
from gimbal.core.errors import InputError
from gimbal.core.snapshot import MAX_ENGINES, MAX_FRONT_ENDS
from gimbal.vllm_plugin import bridge

logger = logging.getLogger("vllm.gimbal")

RUN_ID = "GIMBAL_RUN_ID"
"""Environment variable with the server's run id; set by the launcher, never by a user."""
TRACE_SALT = "GIMBAL_TRACE_SALT"
"""Environment variable with the secret that the traces of a server's API servers share."""
RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""vLLM's: comma-separated names of environment variables that Ray's actors get as well."""


def server_identity(vllm_config: Any) -> str:
    """What every process of this server, and none of another, derives the board's name from."""
    run_id = os.environ.get(RUN_ID)
    if run_id:
        return run_id
    return re.sub(r"_dp\d+$", "", str(vllm_config.instance_id))


def server_board_path(vllm_config: Any) -> Path:
    """The board of this process's server."""
    return board_path(server_identity(vllm_config))


def server_board(vllm_config: Any) -> Board:
    """That board, opened or made. Raises OSError as `Board`."""
    common = bool(vllm_config.parallel_config.data_parallel_external_lb)
    return Board(server_board_path(vllm_config), common=common)


def why_dispatch_cannot_act(vllm_config: Any, client_count: int = 1) -> str | None:
    """Why dispatch cannot act in this server, or None."""
    parallel = vllm_config.parallel_config
    if bridge.rust_front_end(os.environ):
        return (
            "vLLM's Rust front end chooses the engine (VLLM_USE_RUST_FRONTEND=1), and serves no "
            "/gimbal; queue and placement act"
        )
    if parallel.data_parallel_size <= 1:
        return "there is one engine only (--data-parallel-size 1)"
    if parallel.data_parallel_external_lb:
        return "an external load balancer chooses the engine (--data-parallel-external-lb)"
    if client_count > MAX_FRONT_ENDS:
        said = f"{client_count} API servers: signals tell at most {MAX_FRONT_ENDS} apart"
        return f"{said} (--api-server-count {MAX_FRONT_ENDS})"
    return too_many_engines(vllm_config)


def too_many_engines(vllm_config: Any) -> str | None:
    """Why this server has no signals, or None; on an engine's side as on a front end's."""
    parallel = vllm_config.parallel_config
    # An engine of a dense model has a group of its own, and its place among the others.
    engines = max(parallel.data_parallel_size, getattr(parallel, "data_parallel_index", 0) + 1)
    if engines > MAX_ENGINES:
        return f"{engines} engines: the signal board holds {MAX_ENGINES}"
    return None


def _run_id(parallel: Any) -> str:
    """One that no other server has; the same for all ranks on this host that are servers of their
    own. Hosts that share a /dev/shm, as containers may, have networks of their own."""
    if not parallel.data_parallel_external_lb:
        return f"{os.getpid()}-{time.time_ns()}"
    network = os.stat("/proc/self/ns/net").st_ino if os.path.exists("/proc/self/ns/net") else 0
    return f"{parallel.data_parallel_master_ip}:{parallel.data_parallel_rpc_port}-{network}"


def launch_board(vllm_config: Any) -> None:
    """Draws a run id and makes the board before the engines start; this process removes it, unless
    it is other servers' too."""
    os.environ[RUN_ID] = _run_id(vllm_config.parallel_config)
    os.environ[TRACE_SALT] = secrets.token_hex(32)
    copied = [name for name in os.environ.get(RAY_COPIES, "").split(",") if name.strip()]
    os.environ[RAY_COPIES] = ",".join(dict.fromkeys([*copied, RUN_ID]))
    for path in sweep():
        logger.info("Gimbal: removed the board %s of a server that is gone", path)
    board = server_board(vllm_config)
    close_at_exit(board)
    logger.info("Gimbal: signal board at %s", board.path)


def close_at_exit(what: Any) -> None:
    """Calls its ``close``, also where a process ends without atexit handlers, as children of
    multiprocessing do."""
    Finalize(None, what.close, exitpriority=0)


def _prepare(vllm_config: Any) -> None:
    """In the process that starts the engines, just before it does; raises InputError only."""
    try:
        if bridge.gimbal_config(vllm_config) is None:
            return
        launch_board(vllm_config)
    except InputError:
        raise
    except Exception:
        logger.exception("Gimbal: no signal board; dispatch falls back to in-flight work")
    try:
        if bridge.level_config(vllm_config, "dispatch") is not None:
            servers = getattr(vllm_config.parallel_config, "_api_process_count", 1)
            reason = why_dispatch_cannot_act(vllm_config, servers)
            if reason is not None:
                logger.warning("Gimbal: the dispatch level cannot act: %s", reason)
        config = bridge.gimbal_config(vllm_config)
        if config is not None and config.trace_records:
            reason = why_dispatch_cannot_act(vllm_config)
            if reason is not None:
                logger.warning("Gimbal: trace_records: no request is recorded: %s", reason)
    except Exception:
        logger.exception("Gimbal: whether the dispatch level can act is not known")


def install() -> None:
    """Hooks the start of the engine processes, and of the actors of Ray's that are engines."""
    from vllm.v1.engine.utils import CoreEngineActorManager, CoreEngineProcManager

    CoreEngineProcManager.__init__ = _after_the_board(CoreEngineProcManager.__init__)
    CoreEngineActorManager.__init__ = _after_the_board(CoreEngineActorManager.__init__)


def _after_the_board(init: Any) -> Any:
    signature = inspect.signature(init)

    @wraps(init)
    def manager_init(self: Any, *args: Any, **kwargs: Any) -> None:
        _prepare(signature.bind(self, *args, **kwargs).arguments["vllm_config"])
        init(self, *args, **kwargs)

    return manager_init
