"""vLLM's real client class without sockets, and requests for it; a server with fake engines."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from gimbal.board.clock import now_us
from gimbal.board.file import Board, board_path
from gimbal.board.slots import SlotWriter
from gimbal.core.config import parse_config
from gimbal.core.snapshot import ACCEPTED_REQUESTS, ACCEPTED_TOKENS, ROW_WIDTH, Field
from gimbal.vllm_plugin.dispatch.hook import FrontEnd

ORIGINAL = DPLBAsyncMPClient.get_core_engine_for_request
FINISH = DPLBAsyncMPClient.process_engine_outputs


def book_keeping(client: Any, engines: int) -> None:
    """Gives `client` the part of vLLM's client that dispatch touches, all engines idle."""
    client.client_count, client.client_index = 1, 0
    client.reqs_in_flight = {}
    client.engine_inflight = Counter()
    client.streaming_reqs = set()  # 0.33
    client.engine_ranks_managed = list(range(engines))
    client.core_engines = [rank.to_bytes(2, "little") for rank in range(engines)]
    client.lb_engines = [[0, 0, 0.0] for _ in range(engines)]
    client.eng_start_index = 0


def served(model: str) -> Any:
    """The part of vLLM's configuration that names the model."""
    return SimpleNamespace(model_config=SimpleNamespace(served_model_name=model))


def request_of(name: str, prompt: list[int], **fields: Any) -> EngineCoreRequest:
    """vLLM's request for one token; `fields` replace what is given here."""
    values: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": prompt,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=1),
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(values | fields))


def request(name: str, tokens: int = 10, **fields: Any) -> EngineCoreRequest:
    """A request whose prompt begins like no other name's."""
    first = 100_000 * sum(name.encode())
    return request_of(name, list(range(first, first + tokens)), **fields)


class Client(DPLBAsyncMPClient):
    """The part of the client that dispatch touches, with two engines."""

    def __init__(self) -> None:
        self.vllm_config = served("demo")
        book_keeping(self, 2)


class Server:
    """Two fake engines, their board and one front end."""

    def __init__(self, folder: Path, monkeypatch: Any, **dispatch: Any) -> None:
        self.board = Board(board_path("server", folder))
        self.writers = [SlotWriter(self.board, rank) for rank in range(2)]
        self.rows = np.zeros((2, ROW_WIDTH))
        self.client = Client()
        config = parse_config({"levels": ["dispatch"], "dispatch": dispatch})
        self.front_end = FrontEnd(self.client, config, self.board)
        monkeypatch.setattr(self.front_end, "_start_refresh", lambda: None)
        self.publish()

    def publish(self, age_s: float = 0.0, **fields: list[float]) -> None:
        """Both engines publish; `fields` gives both engines' values by field name."""
        self.rows[:, Field.SEQUENCE] += 1
        self.rows[:, Field.EPOCH] = 1
        self.rows[:, Field.TIMESTAMP_US] = now_us() - age_s * 1e6
        for name, values in fields.items():
            self.rows[:, Field[name]] = values
        for writer, row in zip(self.writers, self.rows, strict=True):
            writer.publish(row)

    def accept(self, engine: int, tokens: int) -> None:
        self.rows[engine, ACCEPTED_REQUESTS] += 1
        self.rows[engine, ACCEPTED_TOKENS] += tokens

    def send(self, name: str, tokens: int = 10, **fields: Any) -> int:
        sent = request(name, tokens, **fields)
        engine = self.front_end.route(self.client, sent, ORIGINAL)
        assert sent.data_parallel_rank == fields.get("data_parallel_rank")
        return self.client.core_engines.index(engine)

    def finish(self, *names: str) -> None:
        self.front_end.finished(names)
        outputs = EngineCoreOutputs(finished_requests=set(names))
        asyncio.run(FINISH(self.client, outputs))
