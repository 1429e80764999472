"""A server of any size without engines: real routes, a real dispatcher, invented rows and answers.

python tests/vllm_plugin/operator/synthetic.py 8123 64     # and look at /gimbal
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np

from gimbal.board.file import Board
from gimbal.core.config import DispatchConfig, parse_config
from gimbal.core.contracts import DispatchRequest
from gimbal.core.dispatch.dispatcher import Dispatcher
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ROW_WIDTH, Field
from gimbal.vllm_plugin.dispatch.recent import Recent
from gimbal.vllm_plugin.operator import routes
from gimbal.vllm_plugin.placement.rows import PLANES, Sources, row_length

_RECORD = {
    "time_s": 100.0,
    "committed": True,
    "reason": "gain 812.4 us per step pays for a stall of 0.21 s",
    "predicted_gain_us_per_step": 812.4,
    "predicted_stall_us": 210000.0,
    "realized_gain_us_per_step": 640.2,
    "stall_us": 233000.0,
    "moved_slots": 420,
    "received_experts": 388,
    "balance_before": 0.61,
    "balance_after": 0.88,
    "local_share_before": 0.02,
    "local_share_after": 0.11,
}


class Rows:
    """Rows [engines, ROW_WIDTH] that go on from reading to reading as those of a busy server."""

    first = torn = 0

    def __init__(self, engines: int) -> None:
        self.engines = engines
        self.random = np.random.default_rng(7)
        self.load = self.random.uniform(0.4, 1.0, engines)
        self.load[: max(1, engines // 20)] = 3.5  # some stand out
        self.rows = np.zeros((engines, ROW_WIDTH))
        self.steps = 0

    def read(self, now_s: float | None = None) -> np.ndarray:
        return self.rows.copy()

    def advance(self) -> None:
        """A sample's time later."""
        self.steps += 1
        rows, noise = self.rows, self.random.uniform(0.6, 1.4, self.engines)
        work = self.load * noise * (1.5 + np.sin(self.steps / 20.0))
        late = 1.0 * (self.steps > 100)
        fixed = {
            Field.TIMESTAMP_US: time.monotonic_ns() / 1e3,
            Field.EPOCH: 1.0,
            Field.KV_BLOCKS_TOTAL: 8000.0,
            Field.KV_BLOCK_TOKENS: 16.0,
            Field.STEP_TOKEN_BUDGET: 2048.0,
            Field.PREFILL_US_PER_TOKEN: 11.0,
            Field.STEP_BASE_US: 21000.0,
            Field.DECODE_US_PER_REQUEST: 60.0,
            Field.PREFILL_TOKENS_PER_S: 41000.0,
            Field.MAX_RUNNING_REQUESTS: 256.0,
            Field.QUEUE_OLDEST_BOUND_US: 9e5,
            Field.PLACEMENT_PROPOSALS: 3.0 + late,
            Field.PLACEMENT_COMMITS: 1.0 + late,
            Field.PLACEMENT_RECEIVED_EXPERTS: 388.0 * (1 + late),
            Field.PLACEMENT_RECEIVED_BYTES: 9.1e9 * (1 + late),
            Field.PLACEMENT_PREDICTED_GAIN_US: 812.4,
            Field.PLACEMENT_REALIZED_GAIN_US: 640.2,
            Field.PLACEMENT_STALL_US: 233000.0,
            Field.PLACEMENT_BALANCE: 0.88,
            Field.PLACEMENT_LOCAL_SHARE: 0.11,
        }
        for field, value in fixed.items():
            rows[:, field] = value
        moving = {
            Field.WAITING_REQUESTS: np.round(4 * work),
            Field.WAITING_PREFILL_TOKENS: np.round(2100 * work),
            Field.RUNNING_REQUESTS: np.round(30 + 20 * work),
            Field.RUNNING_PREFILL_TOKENS: np.round(900 * noise),
            Field.DECODING_REQUESTS: np.round(28 + 18 * work),
            Field.RUNNING_TOKENS: np.round(30000 + 20000 * work),
            Field.KV_BLOCKS_USED: np.minimum(8000.0, np.round(2500 + 1300 * work)),
            Field.STEP_TIME_US: 26000 + 4000 * work,
            Field.EXPERT_PRESSURE_US: 180 * noise,
            Field.QUEUE_OLDEST_WAIT_US: 2.5e5 * work,
        }
        for field, value in moving.items():
            rows[:, field] = value
        rows[:, Field.SEQUENCE] += 70
        rows[:, Field.QUEUE_OVERTAKES] += np.round(2 * noise)
        rows[:, Field.PREEMPTIONS] += self.random.uniform(size=self.engines) < 0.01
        rows[:, ACCEPTED_REQUESTS] += np.round(9 * noise)


def expert_answers(ranks: int, layers: int, experts: int) -> list[dict[str, Any]]:
    """What the workers of `ranks` engines of one rank say (`stats.gimbal_routing`)."""
    random = np.random.default_rng(3)
    popular = random.pareto(3.0, (layers, experts)) + 0.5
    slots = np.tile(np.arange(experts, dtype="<i4"), (layers, 1))
    before = slots.copy()
    now = np.stack([random.permutation(layer) for layer in slots])
    answers = []
    for rank in range(ranks):
        row = np.zeros(row_length(layers, experts))
        planes = row[: PLANES * layers * experts].reshape(PLANES, layers, experts)
        planes[:2] = np.round(100 * popular * random.uniform(0.5, 1.5, popular.shape))
        planes[3] = 50.0
        row[-4:-2] = 100.0
        model = {
            "local_pairs": 10,
            "pairs": 100,
            "name": "synthetic",
            "layers": layers,
            "experts": experts,
            "sources": Sources.PER_RANK.name,
            "row": row.tobytes(),
            "physical_to_logical": now.astype("<i4").tobytes(),
            "replaced": before.tobytes(),
        }
        answers.append(
            {
                "rank": rank,
                "ranks": ranks,
                "ranks_per_source": 1,
                "step": 1000,
                "proposed": 4,
                "committed": 2,
                "last": _RECORD,
                "fallbacks": {},
                "level_on": True,
                "pressure_us": 0.0,
                "straggling_us": [],
                "models": [model],
            }
        )
    return answers


class Server:
    """A server's routes in `app`.

    Args:
        folder: for its board.
        engines: as many engines, each one rank of the experts.
        config: section `gimbal` of its configuration.
        key: its API key.
        clients: API servers, of which this is the one `index`.
    """

    def __init__(
        self,
        folder: Path,
        engines: int = 64,
        layers: int = 58,
        experts: int = 256,
        config: dict[str, Any] | None = None,
        key: str | None = None,
        clients: int = 1,
        index: int = 0,
    ) -> None:
        self.rows = Rows(engines)
        self.config = parse_config(config or {"admin": True})
        self.board = Board(folder / "gimbal-synthetic.board")
        self.dispatcher = Dispatcher(engines, DispatchConfig())
        self.recent, self.counts = Recent(), Counter[tuple[int, str, str]]()
        self.off, self.policy, self.first = False, "gimbal", 0
        self.fallbacks: dict[str, int] = {}
        self.reader = self.rows
        self.key = key
        answers = expert_answers(engines, layers, experts)

        async def all_say(*_: Any) -> list[Any]:
            return [[answer] for answer in answers]

        core = SimpleNamespace(
            call_utility_all_async=all_say,
            client_count=clients,
            client_index=index,
            _gimbal_front_end=self,
        )
        self.client = SimpleNamespace(
            engine_core=core,
            vllm_config=SimpleNamespace(
                additional_config={"gimbal": config or {"admin": True}},
                instance_id="x",
                parallel_config=SimpleNamespace(
                    data_parallel_size=engines,
                    data_parallel_size_local=engines,
                    local_engines_only=False,
                    data_parallel_external_lb=False,
                ),
            ),
        )

    # What the routes ask of a front end.

    def status(self) -> dict[str, Any]:
        return {
            "enabled": not self.off,
            "switched_itself_off": self.off,
            "policy": self.policy,
            "decisions": [
                {"engine": e, "policy": p, "reason": r, "count": c}
                for (e, p, r), c in sorted(self.counts.items())
            ],
            "fallbacks": self.fallbacks,
            "kv_events": None,
        }

    def follow_control(self) -> None:
        pass

    def request(self, number: int) -> None:
        """Dispatches one request by the rows as they are."""
        tokens = 200 + 137 * (number % 29)
        request = DispatchRequest(f"r{number}", tokens, time.monotonic_ns() / 1e3)
        rows = self.rows.read()
        now_us = time.monotonic_ns() / 1e3
        prompt = [number % 5, *range(number, number + tokens - 1)]
        decision = self.dispatcher.dispatch(request, prompt, rows, now_us)
        self.recent.note(self.policy, tokens, decision)
        self.counts[decision.engine, self.policy, decision.reason] += 1

    def live(self, samples: int) -> None:
        """As if the server had been watched for `samples` samples already."""
        watcher = self.app.state.gimbal_operator.watcher
        for _ in range(samples):
            self.rows.advance()
            self.request(sum(self.counts.values()))
            watcher.sample()
        spread = watcher.history.spans["fine"]
        for age, sample in enumerate(reversed(spread)):
            sample["t"] = round(time.time() - 2.0 * age, 1)
            wave = 1.5 + np.sin(sample["t"] / 40.0)
            sample["ttft"] = [round(140 * wave, 1), round(420 * wave, 1)]
            sample["tpot"] = [round(27 + 3 * wave, 2), round(34 + 6 * wave, 2)]

    async def start(self) -> Any:
        """The application, its state ready."""
        from fastapi import FastAPI

        self.app = FastAPI()
        plugin = routes.GimbalEndpoints()
        plugin.attach_router(self.app)
        args = Namespace(api_key=[self.key] if self.key else None)
        await plugin.init_state(self.client, self.app.state, args)
        return self.app


async def serve(port: int, engines: int, folder: Path, samples: int = 300, **options: Any) -> None:
    """Serves until it is cancelled; the rows go on every two seconds."""
    import uvicorn

    server = Server(folder, engines, **options)
    app = await server.start()
    server.live(samples)
    site = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    serving = asyncio.create_task(site.serve())
    while not serving.done():
        await asyncio.sleep(1.0)
        server.rows.advance()
        server.request(sum(server.counts.values()))
    await serving


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), Path(scratch)))
