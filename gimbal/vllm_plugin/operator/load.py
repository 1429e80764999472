"""``GET /get_load``: one integer for routers that choose between servers.

vllm-router's policy ``power_of_two`` asks every worker for it and adds the requests that it has in
flight there itself. vLLM serves no such route, and Gimbal only where `get_load` is set: before two
servers that router chose better by its own count alone (docs/routers.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse

from gimbal.board.clock import now_us
from gimbal.core.contracts import EngineLoads
from gimbal.core.dispatch.server_load import server_load

if TYPE_CHECKING:
    from gimbal.vllm_plugin.operator.routes import Operator


async def load_route(request: Request) -> JSONResponse:
    """``{"load": 12}``; 503 where nothing is known or to be said: a router then goes by its own."""
    operator: Operator | None = request.app.state.gimbal_operator
    if operator is None:
        return JSONResponse({"error": "Gimbal is off in this server"}, 503)
    if not operator.config.get_load:
        return JSONResponse({"error": "get_load is not set in Gimbal's configuration"}, 503)
    try:
        load = server_load(loads_of(operator))
    except (OSError, ValueError):
        load = None
    if load is None:
        return JSONResponse({"error": "no engine has published its state"}, 503)
    return JSONResponse({"load": load})


def loads_of(operator: Operator) -> EngineLoads:
    """What the server's front end knows; where none dispatches, what its engines publish."""
    board = operator.reader.read()
    if operator.front_end is not None:
        return operator.front_end.dispatcher.loads(board, now_us())
    none = np.zeros(len(board))
    return EngineLoads(board, none, none, none, none, none, none, none)
