"""vLLM engines as replicas of Ray Serve: Gimbal chooses the replica by what the engines publish.

    pip install '.[vllm,ray]'
    python examples/ray_serve/engines.py MODEL --replicas 4
    curl -N localhost:8000 -d '{"prompt_token_ids": [1, 2, 3], "max_tokens": 16}'

`Front` takes HTTP, one JSON object per request, and answers a line per step: the token ids that
came and how many of the prompt were in the engine's cache. `Engine` is the model. Ray Serve LLM is
not needed; its deployments bring request types of their own.
"""

from __future__ import annotations

import argparse
import json
import socket
import uuid
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.requests import Request
from starlette.responses import StreamingResponse

from gimbal.core.snapshot import ROUTER
from gimbal.integrations.ray_serve import published_at

GIMBAL = RequestRouterConfig(
    request_router_class="gimbal.integrations.ray_serve:GimbalRouter",
    request_router_kwargs={"dispatch": {"policy": "gimbal"}, "marks": True},
)


class Engine:
    """One replica: a vLLM engine that publishes its row under the replica's name.

    Args:
        model: as vLLM names it.
        flags: more of vLLM's engine arguments.
    """

    def __init__(self, model: str, flags: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.name = serve.get_replica_context().replica_id.unique_id
        with socket.socket() as probe:
            probe.bind(("", 0))
            self.port = probe.getsockname()[1]
        gimbal = {"publish_to": f"@tcp://*:{self.port}", "publish_name": self.name}
        section = {"gimbal": gimbal | flags.pop("gimbal", {})}
        arguments = AsyncEngineArgs(model=model, additional_config=section, **flags)
        self.engine = AsyncLLM.from_engine_args(arguments)

    def __del__(self) -> None:
        """Ray Serve stops a replica: what the engine has in shared memory goes with it."""
        if hasattr(self, "engine"):
            self.engine.shutdown()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where routers find the engine's rows."""
        address = ray.util.get_node_ip_address()
        return published_at(f"tcp://{address}:{self.port}", self.name)

    async def __call__(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Token ids as they come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        router = {ROUTER: request[ROUTER]} if ROUTER in request else None
        parameters = SamplingParams(
            max_tokens=request.get("max_tokens", 64),
            temperature=request.get("temperature", 1.0),
            ignore_eos=request.get("ignore_eos", False),
            output_kind=RequestOutputKind.DELTA,
            extra_args=router,
        )
        prompt = {"prompt_token_ids": request["prompt_token_ids"]}
        async for output in self.engine.generate(prompt, parameters, uuid.uuid4().hex):
            tokens = list(output.outputs[0].token_ids)
            yield {"token_ids": tokens, "cached": output.num_cached_tokens, "replica": self.name}


class Front:
    """HTTP in front of the engines: what a proxy hands on has no prompt yet."""

    def __init__(self, engines: Any) -> None:
        self.engines = engines.options(stream=True)

    async def __call__(self, http: Request) -> StreamingResponse:
        request = await http.json()

        async def lines() -> AsyncIterator[str]:
            async for part in self.engines.remote(request):
                yield json.dumps(part) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")


def engines(
    model: str,
    flags: dict[str, Any],
    replicas: int,
    router: RequestRouterConfig = GIMBAL,
    engine: type[Engine] = Engine,
    **options: Any,
) -> Any:
    """The deployment of `replicas` engines, chosen by `router`; `options` are Ray Serve's."""
    deployment = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=256,
        request_router_config=router,
        **options,
    )
    return deployment(engine).bind(model, flags)


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=1.0, help="of a replica")
    parser.add_argument(
        "--flags", type=json.loads, default={}, help="vLLM's engine arguments, JSON"
    )
    args = parser.parse_args()
    needs = {"ray_actor_options": {"num_gpus": args.gpus}}
    served = engines(args.model, args.flags, args.replicas, **needs)
    serve.run(serve.deployment(Front).bind(served), blocking=True)


if __name__ == "__main__":
    main()
