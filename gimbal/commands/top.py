"""``gimbal top``: a running server's engines, decisions and troubles in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import click
from rich.console import Console
from rich.live import Live

from gimbal.commands.options import Real
from gimbal.commands.output import echo_json, notes, progress_bar, tables
from gimbal.commands.server_routes import ask
from gimbal.core.errors import InputError
from gimbal.core.json_text import parse_json
from gimbal.report.live_status import Status, draw, read_status

MOST_REPLY_BYTES = 1 << 24
"""A status of 256 engines is some 400 KB."""
_OTHER_LINES = 10
"""Lines of a picture beside its engines, with a few troubles among them."""


@click.command()
@click.argument("url", default="http://localhost:8000")
@click.option("--once", is_flag=True, help="print one picture and end (so does a pipe)")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object and end")
@click.option(
    "--interval",
    type=Real(above=0.0, most=3600.0),
    default=2.0,
    show_default=True,
    help="seconds between two pictures",
)
@click.option(
    "--timeout",
    type=Real(above=0.0, most=1e6),
    default=10.0,
    show_default=True,
    help="seconds to wait for the server",
)
def command(url: str, once: bool, as_json: bool, interval: float, timeout: float) -> None:
    """Watch a server: levels, engines by backlog, decisions, what rearrangements did.

    URL is its address (http://localhost:8000). One API server answers; decisions are its own.
    Ctrl-C ends.

    Example: gimbal top http://localhost:8000 --interval 5
    """
    with progress_bar(notes(), f"asking {url}"):
        status = fetch(url, timeout)
    if as_json:
        echo_json(dataclasses.asdict(status))
        return
    console = tables()
    if once or not console.is_terminal:
        console.print(draw(status, url, len(status.engines)))
        return
    with contextlib.suppress(KeyboardInterrupt):
        watch(console, url, status, interval, timeout)


def fetch(url: str, timeout_s: float) -> Status:
    """The status of the server at `url`; raises InputError saying why there is none."""
    content = ask(url, "/gimbal/status", timeout_s, MOST_REPLY_BYTES)
    document = parse_json(content.decode(errors="replace"), url)
    try:
        return read_status(document)
    except InputError as error:
        raise InputError(f"{url}: {error}") from None


def watch(console: Console, url: str, status: Status, interval_s: float, timeout_s: float) -> None:
    """Draws until it is interrupted; a server that is away for a while is waited for."""
    before, at_s, problem = None, time.monotonic(), ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            rows = console.height - _OTHER_LINES
            live.update(draw(status, url, rows, before, problem), refresh=True)
            time.sleep(interval_s)
            try:
                newer = fetch(url, timeout_s)
            except InputError as error:
                problem = str(error)
                continue
            now_s = time.monotonic()
            before, at_s, problem = (status, now_s - at_s), now_s, ""
            status = newer
