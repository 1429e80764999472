"""``GET /gimbal``, ``GET /gimbal/status`` and ``POST /gimbal/control`` on vLLM's own API server.

The first is a page for people, drawn from ``/gimbal/view`` and, when it is asked for experts,
``/gimbal/experts``; the second is for programs. All are read-only. Control switches what
decides on a running server, so that two policies can be compared in turns without a restart; it
answers only with ``admin: true`` in the configuration. A control message goes through the board,
where every front end and engine of the server sees it before its next decision or step. vLLM loads
endpoint plugins only when ``VLLM_PLUGINS`` names them; ``gimbal serve`` sees to that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

import gimbal
from gimbal.board.control import encoded_control
from gimbal.board.slots import BoardReader
from gimbal.core.config import LEVELS, GimbalConfig, modernized, parse_config
from gimbal.core.contracts import FloatArray
from gimbal.core.dispatch import POLICIES
from gimbal.core.errors import InputError, nearest, one_line
from gimbal.core.queue import ORDERINGS
from gimbal.core.snapshot import Field
from gimbal.vllm_plugin import bridge, versions
from gimbal.vllm_plugin.dispatch.engine_header import EngineHeader
from gimbal.vllm_plugin.dispatch.hook import FrontEnd, front_end_of
from gimbal.vllm_plugin.engine.identity import close_at_exit, server_board
from gimbal.vllm_plugin.engine.remote import spans_hosts
from gimbal.vllm_plugin.operator.engine_metrics import ReadAtScrape, metrics_at_scrape
from gimbal.vllm_plugin.operator.front_ends import Shared
from gimbal.vllm_plugin.operator.load import load_route
from gimbal.vllm_plugin.operator.messages import RefusedError, read_message
from gimbal.vllm_plugin.operator.page import PAGE_HEADERS, page
from gimbal.vllm_plugin.operator.watcher import Watcher
from gimbal.vllm_plugin.placement.route import SharedAnswers, experts_route, routing_route

SWITCHABLE = ("dispatch", "queue", "feedback")
"""Levels that can be switched while the server runs, if it was started with them."""
FOLLOW_S = 3.0
"""How long an answer waits for engines of other hosts to hold what it says."""
_KEYS = ("levels", "policy", "policy_options", "queue_ordering", "queue", "reset")
_QUEUE_FIXED = ("ordering", "priority_tokens")
"""Keys of section `queue` that a message's ``queue`` may not hold: `queue_ordering` says the one,
and the classes of requests that wait already depend on the other."""


class GimbalEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "gimbal"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes, and the header that names a request's engine."""
        router = APIRouter(prefix="/gimbal")
        router.add_api_route("", _page, methods=["GET"], include_in_schema=False)
        router.add_api_route("/status", _status, methods=["GET"])
        router.add_api_route("/view", _view, methods=["GET"], include_in_schema=False)
        router.add_api_route("/control", _control, methods=["POST"])
        router.add_api_route("/routing", routing_route, methods=["GET"])
        router.add_api_route("/experts", experts_route, methods=["GET"], include_in_schema=False)
        app.include_router(router)
        app.add_api_route("/get_load", load_route, methods=["GET"])
        app.add_middleware(EngineHeader)
        app.add_middleware(ReadAtScrape)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Finds the server's configuration and board."""
        config = None
        if engine_client is not None and versions.running_is_supported():
            config = bridge.gimbal_config(engine_client.vllm_config)
        state.gimbal_authentication = _authentication(args)
        state.gimbal_operator = None
        if config is not None:
            has_key = state.gimbal_authentication is not None
            state.gimbal_operator = Operator(engine_client, config, has_key)
            state.gimbal_operator.watcher.start()
        state.gimbal_engine_metrics = metrics_at_scrape(state.gimbal_operator)


def _authentication(args: Namespace) -> Any:
    """vLLM's own check of ``--api-key`` or ``VLLM_API_KEY``; None on a server without a key.

    vLLM applies it to its API paths only, and switching policies should need no less.
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(None, keys) if keys else None


class Operator:
    """What an operator sees and may change, in one API server."""

    def __init__(self, engine_client: Any, config: GimbalConfig, has_key: bool = False) -> None:
        self.engine_client = engine_client
        self.config = config
        self.has_key = has_key
        self.switchable = [level for level in SWITCHABLE if level in config.levels]
        self.answers = SharedAnswers()
        self.front_end: FrontEnd | None = front_end_of(engine_client.engine_core)
        if self.front_end is not None:
            self.board, self.reader = self.front_end.board, self.front_end.reader
        else:
            parallel = engine_client.vllm_config.parallel_config
            self.board = server_board(engine_client.vllm_config)
            close_at_exit(self.board)
            # Behind an external load balancer the others have servers of their own.
            ranks = getattr(engine_client.engine_core, "engine_ranks_managed", None)
            ranks = ranks or range(parallel.data_parallel_size)
            self.reader = BoardReader(self.board, len(ranks), ranks[0])
        core, shared = engine_client.engine_core, None
        if getattr(core, "client_count", 1) > 1:
            shared = Shared(self.board.path, core.client_index)
            close_at_exit(shared)
        self.watcher = Watcher(self, shared)

    def status(self, rows: FloatArray | None = None) -> dict[str, Any]:
        """Everything as JSON; engines in rank order, their row by lower-case field name.

        A number of an engine that is none is null. `rows` are those read just now, if they were.
        Raises OSError or ValueError when the board cannot be read.
        """
        front_end, control = self.front_end, self.board.read_control()
        now_us = time.monotonic_ns() / 1e3
        engines: list[dict[str, Any]] = []
        for index, row in enumerate((self.reader.read() if rows is None else rows).tolist()):
            entry: dict[str, Any] = {field.name.lower(): row[field] for field in Field}
            entry["engine"] = self.reader.first + index
            entry["age_us"] = now_us - row[Field.TIMESTAMP_US] if row[Field.SEQUENCE] else None
            if front_end is not None:
                ledger = front_end.dispatcher.ledger
                entry["unacknowledged_requests"] = ledger.unacked[0, index]
                entry["unacknowledged_tokens"] = ledger.unacked[1, index]
                entry["inflight_requests"] = ledger.inflight[0, index]
                entry["inflight_tokens"] = ledger.inflight[1, index]
            engines.append({k: v if math.isfinite(v or 0) else None for k, v in entry.items()})
        return {
            "version": gimbal.__version__,
            "config": dataclasses.asdict(self.config),
            "control": control,
            "policies": self._policies(control),
            "engines": engines,
            "dispatch": None if front_end is None else front_end.status(),
            "board": {
                "path": str(self.board.path),
                "recoveries": self.board.recoveries,
                "torn_reads": self.reader.torn,
            },
        }

    def _policies(self, control: Mapping[str, Any]) -> dict[str, str | None]:
        """Names in force by level; None where vLLM decides because the level does not act."""
        config, levels = self.config, control.get("levels", self.config.levels)
        dispatch = None if self.front_end is None else self.front_end.status()
        return {
            "dispatch": dispatch["policy"] if dispatch and dispatch["enabled"] else None,
            "ordering": _ordering(control, config) if "queue" in levels else None,
            "placer": config.placement.placer if "placement" in levels else None,
        }

    async def control(self, values: Any) -> dict[str, Any]:
        """Checks and publishes `values`; returns what is in force now.

        Where the queues of other hosts' engines are to follow, also ``followed`` and
        ``not_followed``: the ranks of the engines that hold it within `FOLLOW_S`, and of the rest.
        Raises InputError naming the key that is wrong, ValueError when the board cannot hold it,
        OSError when the board cannot be written.
        """

        def change(control: dict[str, Any]) -> dict[str, Any]:
            changed = check_control(values, self.config, control)
            if values.get("reset"):
                changed["resets"] = control.get("resets", 0) + 1
            return changed

        # Nothing is reset for a message that cannot be published.
        encoded_control(change(self.board.read_control()))
        if values.get("reset"):
            await self.engine_client.reset_prefix_cache()
        # The caches take their time: what others have published meanwhile stays in force.
        version, control = self.board.update_control(change)
        if self.front_end is not None:
            self.front_end.follow_control()
        if "queue" in self.config.levels and spans_hosts(self.engine_client.vllm_config):
            return control | await self._who_follows(version)
        return control

    async def _who_follows(self, version: int) -> dict[str, list[int]]:
        end_s = time.monotonic() + FOLLOW_S
        while True:
            first, held = self.reader.first, self.board.held(self.reader.first, self.reader.engines)
            behind = [first + i for i, number in enumerate(held) if number < version]
            if not behind or time.monotonic() > end_s:
                break
            await asyncio.sleep(0.02)
        ranks = range(first, first + len(held))
        return {"followed": [r for r in ranks if r not in behind], "not_followed": behind}


def check_control(
    values: Any, config: GimbalConfig, control: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the board holds after the message `values`; `control` is what it holds now.

    Options belong to the policy or ordering that they were given with, and go with it. Raises
    InputError naming the key that is wrong.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"control: a JSON object is expected, got {type(values).__name__}")
    for key in values:
        if key not in _KEYS:
            raise InputError(f"control: unknown key {key!r}{nearest(key, _KEYS)}")
    if not isinstance(values.get("reset", False), bool):
        raise InputError(f"control: reset: true or false is expected, got {values['reset']!r}")
    kept = dict(control or {})
    if "levels" in values:
        kept["levels"] = _check_levels(values["levels"], config)
    if "policy" in values or "policy_options" in values:
        _take_policy(kept, values, config)
    if "queue_ordering" in values or "queue" in values:
        _take_queue(kept, values, config)
    return kept


def _take_policy(kept: dict[str, Any], values: Mapping[str, Any], config: GimbalConfig) -> None:
    """The dispatch policy of a message, with its options, into `kept`."""
    own = config.dispatch
    name = values.get("policy", kept.get("policy", own.policy))
    options = values.get("policy_options")
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"control: policy_options: a mapping is expected, got {options!r}")
    chosen = options if options is not None else own.options if name == own.policy else {}
    POLICIES.check(name, chosen, "control", "policy", "policy_options")
    kept.pop("policy_options", None)
    if "policy" in values:
        kept["policy"] = name
    if options is not None:
        kept["policy_options"] = dict(options)


def _ordering(control: Mapping[str, Any], config: GimbalConfig) -> str:
    return str(control.get("ordering", config.queue.ordering))


def _take_queue(kept: dict[str, Any], values: Mapping[str, Any], config: GimbalConfig) -> None:
    """The ordering of a message and its changes of section `queue` into `kept`."""
    own = config.queue
    name = values.get("queue_ordering", _ordering(kept, config))
    if "queue" in values:
        changes = _check_queue(values["queue"], name)
    else:
        changes = dict(kept.get("queue", {}))
        if name != _ordering(kept, config):
            changes.pop("options", None)
    options = changes.get("options", own.options if name == own.ordering else {})
    ORDERINGS.check(name, options, "control", "queue_ordering", "queue.options")
    if "queue_ordering" in values:
        kept["ordering"] = name
    if changes or "queue" in values:
        kept["queue"] = changes


def _check_queue(changes: Any, ordering: object) -> dict[str, Any]:
    """Keys of section `queue` that differ from the server's configuration from now on.

    Their ``options``, which are those of `ordering`, are the caller's to check.
    """
    if not isinstance(changes, Mapping):
        raise InputError(f"control: queue: a mapping is expected, got {changes!r}")
    for key in _QUEUE_FIXED:
        if key in changes:
            raise InputError(f"control: queue: {key} cannot be changed here")
    named = {"queue": {**changes, "ordering": ordering}}
    section = modernized(named, "control")["queue"]
    del section["ordering"]
    options = section.pop("options", None)
    checked = dataclasses.asdict(parse_config({"queue": section}, "control").queue)
    kept = {key: checked[key] for key in section}
    if options is None:
        return kept
    if not isinstance(options, Mapping):
        raise InputError(f"control: queue.options: a mapping is expected, got {options!r}")
    return kept | {"options": dict(options)}


def _check_levels(levels: Any, config: GimbalConfig) -> list[str]:
    if not isinstance(levels, list):
        raise InputError(f"control: levels: a list is expected, got {levels!r}")
    for level in levels:
        if level not in LEVELS:
            raise InputError(f"control: levels: unknown {level!r}{nearest(str(level), LEVELS)}")
        if level not in config.levels:
            raise InputError(f"control: levels: the server was started without {level!r}")
    for level in config.levels:
        if level not in levels and level not in SWITCHABLE:
            raise InputError(f"control: levels: {level!r} cannot be switched off while running")
    return [level for level in LEVELS if level in levels]


async def _page() -> HTMLResponse:
    return HTMLResponse(page(), headers=PAGE_HEADERS)


class _Json(JSONResponse):
    """ASCII, so that no text of a configuration or a policy fails to be sent."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _error(status: int, error: object) -> _Json:
    """One line, whatever the request said and however much of it."""
    return _Json({"error": one_line(error)}, status)


async def _status(request: Request) -> JSONResponse:
    operator: Operator | None = request.app.state.gimbal_operator
    if operator is None:
        return _Json({"version": gimbal.__version__, "config": None, "engines": []})
    try:
        return _Json(operator.status())
    except (OSError, ValueError) as error:
        return _error(503, f"the signal board cannot be read: {error}")


async def _view(request: Request) -> JSONResponse:
    """What the live page draws; ``?span=fine&after=N`` leaves out samples that it has."""
    operator: Operator | None = request.app.state.gimbal_operator
    if operator is None:
        return _Json({"version": gimbal.__version__, "levels": None})
    span, number = request.query_params.get("span", "fine"), request.query_params.get("after", "-1")
    if span not in operator.watcher.history.spans:
        return _error(400, "view: span: expected fine or coarse")
    if not re.fullmatch(r"-?[0-9]{1,15}", number):
        return _error(400, "view: after: expected a whole number")
    try:
        return _Json(operator.watcher.view(span, int(number)))
    except (OSError, ValueError) as error:
        return _error(503, f"the signal board cannot be read: {error}")


async def _control(request: Request) -> JSONResponse:
    operator: Operator | None = request.app.state.gimbal_operator
    authentication = request.app.state.gimbal_authentication
    if authentication is not None and not authentication.verify_token(request.headers):
        return _error(401, "Unauthorized")
    if operator is None or not operator.config.admin:
        return _error(403, "needs `admin: true` in Gimbal's configuration")
    try:
        return _Json(await operator.control(await read_message(request)))
    except RefusedError as refused:
        return _error(refused.status, refused)
    except ValueError as error:  # InputError is one
        return _error(400, error)
    except OSError as error:
        return _error(503, f"the signal board cannot be written: {error}")
