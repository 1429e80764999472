"""A local Ray Serve with fake replicas that publish rows as engines do, and load on it.

    python -m tests.integrations.ray_replicas SCENARIO ROUTER FILE

writes one JSON object to FILE. A replica serves one prompt after the other, each in proportion to
its tokens: the service time of prefill and nothing else, no model and no vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from gimbal.board.clock import now_us
from gimbal.board.published import RowPublisher, Source
from gimbal.core.endpoints import parse_endpoints
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field
from gimbal.integrations.ray_serve import GimbalRouter, published_at

US_PER_TOKEN = 50.0
STEP_TOKENS = 512
REPLICAS = 3
CHOICES: list[dict[str, Any]] = []


class Watched(GimbalRouter):
    """The router, with what it chose and what the choice took."""

    async def choose_replicas(
        self, candidate_replicas: Any, pending_request: Any = None
    ) -> list[list[Any]]:
        started = time.perf_counter()
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        took_ms = 1e3 * (time.perf_counter() - started)
        sources = self._reader.sources()
        rows = self._reader.rows(sources)
        busy = rows[:, Field.WAITING_REQUESTS] + rows[:, Field.RUNNING_REQUESTS] > 0
        # Ray pickles the class by value: its globals are copies.
        import_module("tests.integrations.ray_replicas").CHOICES.append(
            {
                "id": pending_request.metadata.internal_request_id,
                "replica": ranks[0][0].replica_id.unique_id,
                "ms": took_ms,
                "ages_ms": (self._reader.ages_us(sources)[busy] / 1e3).tolist(),
                "known": len(sources),
            }
        )
        return ranks


class Replica:
    """One engine's prefill, and its row."""

    def __init__(self) -> None:
        import numpy as np

        self.name = serve.get_replica_context().replica_id.unique_id
        (endpoint,) = parse_endpoints("@tcp://127.0.0.1:0", "publish_to")
        self.publisher = RowPublisher([endpoint], Source(self.name, 0))
        self.row = np.zeros(ROW_WIDTH)
        self.row[Field.EPOCH] = time.time_ns() // 1000
        self.row[Field.STEP_TOKEN_BUDGET] = STEP_TOKENS
        self.row[Field.PREFILL_US_PER_TOKEN] = US_PER_TOKEN
        self.row[Field.PREFILL_TOKENS_PER_S] = 1e6 / US_PER_TOKEN
        self.row[[Field.KV_BLOCKS_TOTAL, Field.KV_BLOCK_TOKENS]] = 100_000, 16
        self.row[Field.MAX_RUNNING_REQUESTS] = 256
        self.turn = asyncio.Lock()
        self.publish()

    def publish(self) -> None:
        self.row[Field.SEQUENCE] += 1
        self.row[Field.TIMESTAMP_US] = now_us()
        self.publisher.publish(self.row, self.row[Field.TIMESTAMP_US])

    def record_replica_metadata(self) -> dict[str, Any]:
        return published_at(self.publisher.addresses[0], self.name)

    async def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        return await self.prefill(len(request["prompt_token_ids"]))

    async def prefill(self, tokens: int) -> dict[str, Any]:
        """Serves a prompt; called by this name it is one that routers do not see."""
        row = self.row
        row[[ACCEPTED_REQUESTS, ACCEPTED_TOKENS]] += 1, tokens
        row[[Field.WAITING_REQUESTS, Field.WAITING_PREFILL_TOKENS]] += 1, tokens
        self.publish()
        async with self.turn:
            row[[Field.WAITING_REQUESTS, Field.WAITING_PREFILL_TOKENS]] -= 1, tokens
            row[[Field.RUNNING_REQUESTS, Field.RUNNING_PREFILL_TOKENS]] = 1, tokens
            for start in range(0, tokens, STEP_TOKENS):
                step = min(STEP_TOKENS, tokens - start)
                row[Field.STEP_PREFILL_TOKENS] = row[Field.STEP_TOKENS] = step
                self.publish()
                await asyncio.sleep(step * US_PER_TOKEN / 1e6)
                row[Field.RUNNING_PREFILL_TOKENS] -= step
            row[[Field.RUNNING_REQUESTS, Field.STEP_PREFILL_TOKENS, Field.STEP_TOKENS]] = 0.0
            self.publish()
        return {"replica": self.name, "pid": os.getpid()}


def start(router: str) -> Any:
    """The deployment, by Gimbal's router or by Ray's own; answers its handle."""
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=80 << 20,
    )  # fmt: skip
    config = (
        RequestRouterConfig(request_router_class=Watched)
        if router == "gimbal"
        else RequestRouterConfig()
    )
    made = serve.deployment(
        num_replicas=REPLICAS,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        request_router_config=config,
    )(Replica)
    return serve.run(
        made.bind(), name="app", route_prefix=None, logging_config={"log_level": "ERROR"}
    )


def prompt(tokens: int, seed: int) -> dict[str, Any]:
    drawn = random.Random(seed)
    return {"prompt_token_ids": [drawn.randrange(1000) for _ in range(tokens)]}


async def one(handle: Any, tokens: int, seed: int) -> dict[str, Any]:
    """One request: who served it in how long, or what it died of."""
    started = time.perf_counter()
    try:
        answer = await asyncio.wait_for(handle.remote(prompt(tokens, seed)), 60)
    except Exception as error:
        return {"error": type(error).__name__, "s": time.perf_counter() - started}
    return {**answer, "s": time.perf_counter() - started}


async def warm(handle: Any) -> list[dict[str, Any]]:
    """Until every replica has served, and the router has heard of them all."""
    answers: list[dict[str, Any]] = []
    while len({a["replica"] for a in answers if "replica" in a}) < REPLICAS:
        answers += await asyncio.gather(*(one(handle, 256, i) for i in range(2 * REPLICAS)))
    return answers


async def pressure(handle: Any) -> dict[str, Any]:
    """One replica has work that only its row tells of; who gets the next prompts?"""
    await warm(handle)
    CHOICES.clear()
    long = asyncio.ensure_future(handle.prefill.remote(60_000))
    await asyncio.sleep(0.5)
    short = await asyncio.gather(*(one(handle, 512, i) for i in range(2, 22)))
    return {"long": await long, "short": short, "choices": CHOICES}


async def killed(handle: Any) -> dict[str, Any]:
    """A replica is killed under load, with a burst in flight."""
    victim = (await warm(handle))[-1]
    tasks = []
    for i in range(200):
        tasks.append(asyncio.create_task(one(handle, 512, i)))
        await asyncio.sleep(0.0 if 100 < i <= 130 else 0.012)
        if i == 130:
            await asyncio.sleep(0.1)
            os.kill(victim["pid"], signal.SIGKILL)
            unfinished = sum(not task.done() for task in tasks)
    answers = await asyncio.gather(*tasks)
    after = await asyncio.gather(*(one(handle, 256, i) for i in range(20)))
    return {"victim": victim, "unfinished": unfinished, "answers": answers, "after": after}


async def load(handle: Any) -> dict[str, Any]:
    """Poisson arrivals at 70 % of capacity, one prompt in ten sixteen times as long."""
    await warm(handle)
    CHOICES.clear()
    drawn = random.Random(7)
    tokens = [4096 if drawn.random() < 0.1 else 256 for _ in range(600)]
    rate = 0.7 * REPLICAS * 1e6 / US_PER_TOKEN / (sum(tokens) / len(tokens))
    tasks = []
    for i, count in enumerate(tokens):
        tasks.append(asyncio.create_task(one(handle, count, i)))
        await asyncio.sleep(drawn.expovariate(rate))
    return {"answers": await asyncio.gather(*tasks), "tokens": tokens, "choices": CHOICES}


def main() -> None:
    scenario = {"pressure": pressure, "killed": killed, "load": load}[sys.argv[1]]
    handle = start(sys.argv[2])
    try:
        found = asyncio.run(scenario(handle))
        Path(sys.argv[3]).write_text(json.dumps(found))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    from tests.integrations import ray_replicas

    ray_replicas.main()  # under its own name, so that what Ray pickles is found again
