"""``GET /gimbal/status`` of a running server, checked and drawn for a terminal.

Nothing that a server says is trusted: numbers are finite or absent, texts one line without control
characters, and a shape that is not a status is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gimbal.core.errors import InputError, one_line
from gimbal.core.numbers import as_real

Figures = Mapping[str, float]
SILENT_US = 2e6
"""An engine that has something to run and has published nothing for as long is named."""
_LEVELS = ("dispatch", "queue", "placement", "feedback")
_OFF = "switched itself off"
_STYLES = {"on": "green", "off": "dim", _OFF: "bold red"}


@dataclass(frozen=True, slots=True)
class Status:
    """One answer.

    Attributes:
        levels: those configured, by name: ``on``, ``off`` or ``switched itself off``.
        policies: names in force by what they decide.
        engines: numbers of every engine, by name as the route has them; `engine` is the rank.
        decisions: requests sent so far by the API server that answered, by policy and reason.
        trouble: what an operator should see first, a line each.
    """

    version: str
    levels: dict[str, str]
    policies: dict[str, str]
    engines: list[dict[str, float]]
    decisions: dict[str, int]
    trouble: list[str]


def read_status(document: Any) -> Status:
    """What `document`, the route's JSON, says; raises InputError where it is no status."""
    if not isinstance(document, dict) or not isinstance(document.get("engines"), list):
        raise InputError("the answer is no status of Gimbal")
    config, control = _mapping(document, "config"), _mapping(document, "control")
    if not config:
        raise InputError("Gimbal is not enabled on this server (start it by `gimbal serve`)")
    dispatch = _mapping(document, "dispatch")
    engines = [_numbers(entry) for entry in document["engines"] if isinstance(entry, dict)]
    levels = _levels(config, control)
    if dispatch.get("switched_itself_off"):
        levels["dispatch"] = _OFF
    levels |= {level: _OFF for level in levels if _off_in(level, engines)}
    trouble = _trouble(levels, engines)
    if levels.get("dispatch") == "on" and not dispatch:
        trouble.insert(0, "level dispatch cannot act here; the log at start says why")
    return Status(
        version=_text(document.get("version")),
        levels=levels,
        policies={
            _text(kind): _text(name)
            for kind, name in _mapping(document, "policies").items()
            if name is not None
        },
        engines=sorted(engines, key=lambda e: e.get("engine", 0.0)),
        decisions=_decisions(dispatch.get("decisions")),
        trouble=[*trouble, *_fallbacks(_mapping(dispatch, "fallbacks"))],
    )


def _mapping(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return "".join(c for c in one_line(value) if c.isprintable())


_name = lru_cache(maxsize=256)(_text)
"""The same few for every engine."""


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    numbers = ((_name(name), as_real(value)) for name, value in entry.items())
    return {name: number for name, number in numbers if number is not None}


def _levels(config: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, str]:
    configured = config.get("levels")
    configured = configured if isinstance(configured, list | tuple) else []
    in_force = control.get("levels", configured)
    in_force = in_force if isinstance(in_force, list | tuple) else []
    return {level: "on" if level in in_force else "off" for level in _LEVELS if level in configured}


def _decisions(entries: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            name = f"{_text(entry.get('policy'))}: {_text(entry.get('reason'))}"
            found[name] += int(as_real(entry.get("count")) or 0)
    return dict(found.most_common())


def _trouble(levels: Mapping[str, str], engines: list[dict[str, float]]) -> list[str]:
    found = []
    for level in (level for level, state in levels.items() if state == _OFF):
        ranks = _off_in(level, engines)
        where = f" in engine {', '.join(ranks)}" if ranks else ""
        found.append(f"level {level} has {_OFF}{where}; the log says why")
    publish = "dispatch" in levels or "queue" in levels
    for engine in engines:
        rank, age_us = f"engine {engine.get('engine', 0):.0f}", engine.get("age_us")
        works = _total(engine, "waiting_requests", "running_requests", "unacknowledged_requests")
        if age_us is None:
            found += [f"{rank} has published nothing yet"] * publish
        elif works and age_us > SILENT_US and not engine.get("idle"):
            found.append(f"{rank} has work and said nothing for {age_us / 1e6:.0f} s")
    for level in ("queue", "placement", "signal"):
        count = sum(engine.get(f"{level}_fallbacks", 0.0) for engine in engines)
        if count:
            found.append(f"{level} fell back to vLLM {count:,.0f} times")
    return found


def _off_in(level: str, engines: list[dict[str, float]]) -> list[str]:
    return [f"{e.get('engine', 0):.0f}" for e in engines if e.get(f"{level}_off")]


def _fallbacks(counts: Mapping[str, Any]) -> list[str]:
    numbers = _numbers(counts)
    return [f"dispatch fell back {n:,.0f} times: {reason}" for reason, n in numbers.items() if n]


def _total(engine: Figures, *names: str) -> float:
    return sum(engine.get(name, 0.0) for name in names)


class _Column(NamedTuple):
    title: str
    value: Callable[[Figures], float | None]
    shown: Callable[[float], str]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _share(part: str, whole: str) -> Callable[[Figures], float | None]:
    return lambda e: e.get(part, 0.0) / e[whole] if e.get(whole) else None


def backlog_tokens(engine: Figures) -> float:
    """Prompt tokens that wait or are being prefilled."""
    return _total(engine, "waiting_prefill_tokens", "running_prefill_tokens")


_COLUMNS = (
    _Column("engine", lambda e: e.get("engine"), _whole),
    _Column("waiting", lambda e: e.get("waiting_requests"), _whole),
    _Column("running", lambda e: e.get("running_requests"), _whole),
    _Column("backlog tok", backlog_tokens, _whole),
    _Column("in flight tok", lambda e: e.get("inflight_tokens"), _whole),
    _Column("KV", _share("kv_blocks_used", "kv_blocks_total"), lambda v: f"{v:.0%}"),
    _Column("step ms", lambda e: e.get("step_time_us"), lambda v: f"{v / 1e3:,.1f}"),
    _Column("oldest s", lambda e: e.get("queue_oldest_wait_us"), lambda v: f"{v / 1e6:,.1f}"),
    _Column(
        "bound s", lambda e: e.get("queue_oldest_bound_us") or None, lambda v: f"{v / 1e6:,.1f}"
    ),
    _Column("preempted", lambda e: e.get("preemptions"), _whole),
    _Column("age ms", lambda e: e.get("age_us"), lambda v: f"{v / 1e3:,.0f}"),
)


def draw(
    status: Status,
    url: str,
    rows: int,
    before: tuple[Status, float] | None = None,
    problem: str = "",
) -> RenderableType:
    """A picture of `status`, at most `rows` engines of it: those with the largest backlog.

    `before` is the status of some seconds ago, for rates; `problem` why there is no newer one.
    """
    head = Text(f"Gimbal {status.version}  {_text(url)}  ")
    for level, state in status.levels.items():
        head.append(f" {level} {state} ", style=_STYLES[state])
    lines: list[RenderableType] = [head]
    if status.policies:
        lines.append(Text(", ".join(f"{k} {v}" for k, v in status.policies.items()), style="dim"))
    lines += [Text(f"! {line}", style="red") for line in [problem, *status.trouble] if line]
    lines += [_engines(status.engines, rows), _summary(status.engines)]
    lines.append(_sent(status, before))
    placement = _placement(status.engines)
    return Group(*lines, *([placement] if placement else []))


def _engines(engines: list[dict[str, float]], rows: int) -> Table:
    shown = sorted(engines, key=backlog_tokens, reverse=True)[: max(rows, 1)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for engine in shown:
        values = [(column, column.value(engine)) for column in _COLUMNS]
        table.add_row(*("-" if value is None else c.shown(value) for c, value in values))
    if len(shown) < len(engines):
        table.add_row("...")
    return table


def _summary(engines: list[dict[str, float]]) -> Text:
    backlogs = [backlog_tokens(engine) for engine in engines]
    waiting, running = (
        sum(e.get(f"{kind}_requests", 0.0) for e in engines) for kind in ("waiting", "running")
    )
    text = f"{len(engines)} engines: {waiting:,.0f} waiting, {running:,.0f} running"
    if any(backlogs):
        over_mean = max(backlogs) * len(backlogs) / sum(backlogs)
        text += f"; busiest over mean backlog {over_mean:.2f}"
    return Text(text)


def _sent(status: Status, before: tuple[Status, float] | None) -> Text:
    total = sum(status.decisions.values())
    text = f"this API server sent {total:,} requests"
    if before is not None and before[1] > 0:
        text += f" ({max(total - sum(before[0].decisions.values()), 0) / before[1]:,.1f}/s)"
    reasons = ", ".join(f"{name} {count:,}" for name, count in status.decisions.items())
    return Text(f"{text}; {reasons}" if reasons else text)


def _placement(engines: list[dict[str, float]]) -> Text | None:
    newest = max(engines, key=lambda e: e.get("placement_proposals", 0.0), default={})
    if not newest.get("placement_proposals"):
        return None

    def figure(name: str) -> float:
        return newest.get(f"placement_{name}", 0.0)

    predicted_us = figure("predicted_gain_us") - figure("predicted_loss_us")
    realized_us = figure("realized_gain_us") - figure("realized_loss_us")
    return Text(
        f"experts: {figure('commits'):,.0f} of {figure('proposals'):,.0f} proposals committed, "
        f"{figure('received_experts'):,.0f} moved, stall {figure('stall_us') / 1e6:,.2f} s, "
        f"balance {figure('balance'):.3f}; gain per step predicted {predicted_us:,.1f} us, "
        f"realized {realized_us:,.1f} us"
    )
