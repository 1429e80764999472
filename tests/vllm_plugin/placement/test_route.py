"""``GET /gimbal/routing``: what several askers share, and where the work is done."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from fastapi import FastAPI

from gimbal.vllm_plugin.placement import route
from gimbal.vllm_plugin.placement.route import Answer, SharedAnswers, routing_route


class Site:
    """The route on an app whose workers answer when told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.release = asyncio.Event()
        self.answer: Any = [
            [{"physical_to_logical": [[0, 1]]}],
            [{"physical_to_logical": [[0, 1]]}],
        ]
        core = SimpleNamespace(call_utility_all_async=self.call)
        self.app = FastAPI()
        self.app.state.gimbal_operator = SimpleNamespace(
            engine_client=SimpleNamespace(engine_core=core), answers=SharedAnswers()
        )
        self.app.add_api_route("/gimbal/routing", routing_route, methods=["GET"])

    async def call(self, rpc: str, method: str, *_: Any) -> Any:
        self.calls.append(method)
        await self.release.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def get(self, query: str = "") -> Any:
        import httpx

        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(f"/gimbal/routing{query}")

    async def asked(self, *queries: str) -> list[asyncio.Task[Any]]:
        """One request per query, all of them waiting for the workers."""
        tasks = [asyncio.create_task(self.get(query)) for query in queries]
        for _ in range(200):
            await asyncio.sleep(0)
        return tasks


def test_those_who_ask_meanwhile_share_one_answer(monkeypatch: Any) -> None:
    threads: list[threading.Thread] = []

    def write(file: Any, recording: Any) -> None:
        threads.append(threading.current_thread())
        file.write(b"recording")

    monkeypatch.setattr(route, "to_file", lambda answers: None)
    monkeypatch.setattr(route, "write_routing", write)

    async def ask() -> None:
        site = Site()
        tasks = await site.asked("", "?map=1", "", "?map=1", "")
        assert sorted(site.calls) == ["gimbal_experts_map", "gimbal_routing"]
        tasks[0].cancel()
        site.release.set()
        answers = await asyncio.gather(*tasks[1:])
        assert [a.status_code for a in answers] == [200] * 4
        assert answers[0].json() == {"ranks": 2, "physical_to_logical": [[0, 1]]}
        assert [answers[i].content for i in (1, 3)] == [b"recording"] * 2
        assert answers[1].headers["content-type"] == "application/octet-stream"
        assert len(threads) == 1
        assert threads[0] is not threading.main_thread(), "the loop serves requests meanwhile"
        await site.get("?map=1")
        assert site.calls.count("gimbal_experts_map") == 2, "what is done is asked for again"

    asyncio.run(ask())


def test_every_engine_is_asked_where_vllm_hands_on_one_answer_only() -> None:
    """As vLLM 0.31, which has no ``call_utility_all_async``."""

    async def ask() -> None:
        site = Site()

        async def of_one(rpc: str, method: str, *_: Any, engine: bytes) -> Any:
            site.calls.append(f"{method} of {engine.decode()}")
            return [{"physical_to_logical": [[0, 1]]}]

        site.app.state.gimbal_operator.engine_client.engine_core = SimpleNamespace(
            _call_utility_async=of_one, core_engines=[b"0", b"1"]
        )
        answer = await site.get("?map=1")
        assert answer.status_code == 200
        assert site.calls == ["gimbal_experts_map of 0", "gimbal_experts_map of 1"]

    asyncio.run(ask())


def test_what_the_workers_lack_is_a_conflict() -> None:
    async def ask() -> None:
        site = Site()
        site.release.set()
        site.answer = [[{}], [{}]]
        for query in ("", "?map=1"):
            answer = await site.get(query)
            assert answer.status_code == 409
            assert "--enable-eplb" in answer.json()["error"]

    asyncio.run(ask())


def test_a_failure_is_shared_as_well_and_not_kept() -> None:
    async def ask() -> None:
        site = Site()
        site.answer = RuntimeError("the engine is gone")
        tasks = await site.asked("", "")
        site.release.set()
        assert [a.status_code for a in await asyncio.gather(*tasks)] == [500, 500]
        assert site.calls == ["gimbal_routing"]
        assert not site.app.state.gimbal_operator.answers._making

    asyncio.run(ask())


def test_an_answer_nobody_waits_for_any_more_is_made_and_forgotten() -> None:
    async def ask() -> None:
        shared, release, made = SharedAnswers(), asyncio.Event(), []

        async def make() -> Answer:
            await release.wait()
            made.append(1)
            return Answer(b"{}")

        only = asyncio.create_task(shared.get("a", make))
        await asyncio.sleep(0)
        only.cancel()
        release.set()
        while shared._making:
            await asyncio.sleep(0)
        assert made == [1]

    asyncio.run(ask())
