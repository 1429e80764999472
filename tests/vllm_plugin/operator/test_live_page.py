"""The live page in a browser: 64 engines and 58 x 256 experts, by pointer, keyboard and reader.

Needs Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parent))
from browser import CHROMIUM, Page, browser
from synthetic import Server

from gimbal.bench.servers import free_port
from gimbal.vllm_plugin.operator import watcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
Check = Callable[[Page, Server], Awaitable[None]]


@contextlib.asynccontextmanager
async def served(server: Server, port: int) -> AsyncIterator[None]:
    """`server` on `port`, with ten minutes behind it."""
    import uvicorn

    app = await server.start()
    server.live(300)
    site = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))

    async def engines_go_on() -> None:
        while not site.should_exit:
            server.rows.advance()
            await asyncio.sleep(0.2)

    serving = asyncio.gather(site.serve(), engines_go_on())
    while not site.started:
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        site.should_exit = True
        await serving


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a check on the page of a server; the page must not have raised anything."""
    monkeypatch.setattr(watcher, "EVERY_S", 0.3)

    def run(check: Callable[[Page, Server], Coroutine[Any, Any, None]], **options: Any) -> None:
        async def show() -> None:
            server, port = Server(tmp_path, **options), free_port()
            async with served(server, port), browser(tmp_path / "profile") as page:
                await page.open(f"http://127.0.0.1:{port}/gimbal")
                await page.until("document.documentElement.dataset.scriptMs")
                await check(page, server)
                assert page.errors == []
                foreign = [a for a in page.asked if not a.startswith(f"http://127.0.0.1:{port}/")]
                assert foreign == []

        asyncio.run(show())

    return run


def test_64_engines_and_58_x_256_experts(shown: Callable[..., None]) -> None:
    async def check(page: Page, server: Server) -> None:
        assert await page.value("document.querySelectorAll('#strip button').length") == 64
        outliers = await page.value("$('outliers').textContent")
        assert "engine 0" in outliers
        assert "times the median" in outliers
        await page.value("$('ask').click()")
        await page.until("!$('heats').hidden")
        sizes = "[...document.querySelectorAll('canvas')].map(c => [c.width, c.height])"
        assert await page.value(sizes) == [[64, 58], [64, 58], [256, 58]]
        assert "put in force" in await page.value("$('last').textContent")
        # Nothing is cut off, at any width, in either theme.
        for width in (390, 1024, 1920):
            for dark in (False, True):
                await page.look(width, dark)
                await page.value("redraw()")
                assert await page.value("document.documentElement.scrollWidth <= innerWidth")
        # The work of one update, which no load of the machine changes: elements and text.
        assert await page.value("document.querySelectorAll('*').length") < 2000

    shown(check)


def test_it_goes_on_and_explains(shown: Callable[..., None]) -> None:
    async def check(page: Page, server: Server) -> None:
        before = await page.value("taken")
        await page.until(f"taken > {before} + 1")
        server.request(999)
        asked = server.recent.explained(0)[0]["prompt_tokens"]
        await page.until(f"view.recent[0].prompt_tokens === {asked}")
        await page.value("document.querySelector('#recent summary').click()")
        terms = await page.until("document.querySelector('#recent details[open] table').innerText")
        for term in ("queue", "prefill", "interference", "runner-up", "difference"):
            assert term in terms
        # It stays open, and where it is, while newer ones come.
        await page.value("$('hold').click()")
        key = await page.value("document.querySelector('#recent details[open]').dataset.key")
        server.request(1000)
        await page.until(f"taken > {await page.value('taken')} + 1")
        assert (
            await page.value("document.querySelector('#recent details[open]').dataset.key") == key
        )
        # A reload loses nothing.
        await page.call("Page.reload")
        await page.until("typeof samples !== 'undefined' && samples.length >= 300")

    shown(check, engines=4, layers=3, experts=8)


def test_the_keyboard_reaches_everything(shown: Callable[..., None]) -> None:
    async def check(page: Page, server: Server) -> None:
        focused = "document.activeElement.getAttribute('aria-label') || ''"
        await page.value("document.querySelector('#strip button').focus()")
        await page.key("ArrowRight")
        label = await page.value(focused)
        assert label.startswith("engine ")
        await page.value("document.activeElement.click()")
        shown_rank = await page.value("$('engine').innerText")
        assert shown_rank.startswith(label.split(",")[0].capitalize())
        await page.value("$('chart-3').focus()")
        await page.key("ArrowLeft")
        moment = await page.value("$('moment').textContent")
        assert "prefill ahead of a new prompt: median" in moment
        assert await page.value("$('chart-3').getAttribute('aria-label')") != ""
        # Every control has a name.
        unnamed = (
            "[...document.querySelectorAll('button,select,input,svg[tabindex],canvas')].filter("
            "e => !(e.getAttribute('aria-label') || e.textContent || e.labels?.length)).length"
        )
        assert await page.value(unnamed) == 0

    shown(check, engines=6, layers=3, experts=8)


def test_a_level_that_is_off_is_the_first_thing_one_sees(shown: Callable[..., None]) -> None:
    async def check(page: Page, server: Server) -> None:
        assert await page.value("$('trouble').children.length") == 0
        server.off = True
        first = await page.until("document.querySelector('#trouble .first')?.textContent")
        assert first.startswith("level dispatch has switched itself off")
        above = "$('trouble').getBoundingClientRect().top < $('tiles').getBoundingClientRect().top"
        assert await page.value(above)
        assert await page.value("document.title") == "(!) Gimbal"
        assert await page.value("document.querySelector('.chip.failed').textContent") == (
            "dispatch switched itself off"
        )

    shown(check, engines=2, layers=3, experts=8)


def test_control_is_there_with_admin_and_a_key_only(shown: Callable[..., None]) -> None:
    async def hidden(page: Page, server: Server) -> None:
        assert await page.value("$('control').hidden")

    async def switches(page: Page, server: Server) -> None:
        assert not await page.value("$('control').hidden")
        submit = "$('switches').requestSubmit()"
        await page.value(f"$('switches').key.value = 'wrong'; {submit}")
        await page.until("$('switched').textContent === 'Unauthorized'")
        await page.value(
            "$('switches').key.value = 'secret'; $('switches').policy.value = 'vllm';"
            f"$('switches').querySelector('[value=queue]').checked = false; {submit}"
        )
        await page.until("$('switched').textContent.startsWith('in force')")
        control = server.board.read_control()
        assert control == {"levels": ["dispatch", "placement", "feedback"], "policy": "vllm"}

    shown(hidden, engines=2, layers=3, experts=8)
    shown(switches, engines=2, layers=3, experts=8, key="secret")


def test_it_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "EVERY_S", 0.3)

    async def show() -> None:
        port = free_port()
        async with browser(tmp_path / "profile") as page:
            async with served(Server(tmp_path, 2, 3, 8), port):
                await page.open(f"http://127.0.0.1:{port}/gimbal")
                await page.until("document.documentElement.dataset.scriptMs")
                since = await page.value("since")
            await page.until("$('trouble').textContent.startsWith('No answer from the server')")
            async with served(Server(tmp_path, 4, 3, 8), port):
                await page.until(f"since && since !== {since} && !$('trouble').children.length")
                assert await page.value("document.querySelectorAll('#strip button').length") == 4
                assert await page.value("samples.length") > 250
            assert page.errors == []

    asyncio.run(show())
