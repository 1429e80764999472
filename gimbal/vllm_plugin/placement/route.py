"""The HTTP side of ``gimbal stats``: one route on the API server."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.placement.stats import map_in_force, to_file
from gimbal.workloads.routing import write_routing

ANSWER_TIMEOUT_S = 30.0
"""A worker answers between two steps: seconds on a busy CPU server."""


async def routing_route(request: Request) -> Response:
    """``GET /gimbal/routing``: the recording as ``.npz``; asks every worker of every engine.

    With ``?map=1`` only the map in force, as JSON, which a server without the level has as well.
    """
    operator = request.app.state.gimbal_operator
    if operator is None:
        return JSONResponse({"error": "Gimbal is not enabled on this server"}, 404)
    core = operator.engine_client.engine_core
    only_map = bool(request.query_params.get("map"))
    method = "gimbal_experts_map" if only_map else "gimbal_routing"
    # Without a limit in the engine: vLLM would leave an answer that comes after it in the channel,
    # and take it for the output of the next step.
    asked = asyncio.ensure_future(
        core.call_utility_all_async("collective_rpc", method, None, (), {})
    )
    try:
        engines = await asyncio.wait_for(asyncio.shield(asked), ANSWER_TIMEOUT_S)
    except TimeoutError:
        asked.add_done_callback(lambda late: late.cancelled() or late.exception())
        error = f"the workers did not answer within {ANSWER_TIMEOUT_S:.0f} s"
        return JSONResponse({"error": error}, 504)
    answers: list[dict[str, Any]] = [worker for workers in engines for worker in workers]
    try:
        if only_map:
            return JSONResponse(map_in_force(answers))
        recording = to_file(answers)
    except InputError as error:
        return JSONResponse({"error": str(error)}, 409)
    buffer = io.BytesIO()
    write_routing(buffer, recording)
    return Response(buffer.getvalue(), media_type="application/octet-stream")
