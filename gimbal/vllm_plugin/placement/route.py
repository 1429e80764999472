"""The HTTP side of ``gimbal stats``: one route on the API server."""

from __future__ import annotations

import io

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.placement.stats import to_file
from gimbal.workloads.routing import write_routing

RPC_TIMEOUT_S = 30.0
"""A worker answers between two steps: seconds on a busy CPU server."""


async def routing_route(request: Request) -> Response:
    """``GET /gimbal/routing``: the recording as ``.npz``; asks every worker of every engine."""
    operator = request.app.state.gimbal_operator
    if operator is None:
        return JSONResponse({"error": "Gimbal is not enabled on this server"}, 404)
    core = operator.engine_client.engine_core
    engines = await core.call_utility_all_async(
        "collective_rpc", "gimbal_routing", RPC_TIMEOUT_S, (), {}
    )
    answers = [worker for workers in engines for worker in workers]
    try:
        recording = to_file(answers)
    except InputError as error:
        return JSONResponse({"error": str(error)}, 409)
    buffer = io.BytesIO()
    write_routing(buffer, recording)
    return Response(buffer.getvalue(), media_type="application/octet-stream")
