"""The rates' tables: ratios to vLLM and to the best peer beside what is aimed at, losses first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reproduction.goodput import ARMS, TARGETS
from reproduction.paper import LOSS
from reproduction.paper_markdown import table, wrapped
from reproduction.regimes import BASE, OURS, PEERS

RATE = ".3g"


def render(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    seeds, regimes = report["seeds"], report["regimes"]
    keys = list(regimes[0]["best_peer"])
    code = sorted({version for own in regimes for version in own["code"]})
    intro = (
        f"The highest rates at which {keys[0]} and {keys[1]} of the requests keep their limits: "
        f"`{OURS}` against `{BASE}` and against the best of {', '.join(PEERS)}, the peer with the "
        f"highest rate of each row. Simulated, seeds {seeds[0]} to {seeds[-1]}, by `gimbal "
        f"reproduce goodput` (code {', '.join(code)}). A share is that of all seeds' requests "
        "together, and between two loads that were run it is taken as a straight line. Brackets: "
        "95 % intervals over seeds. With >= or <= the rate lies beyond the loads that were run; - "
        "is where bounds say nothing. Ratios above 1 are better."
    )
    lines = ["# Rates within limits, simulated", "", intro, ""]
    lines += _losses(regimes, keys) + _rates(regimes, keys) + _limits(regimes)
    for own in regimes:
        lines += _attained(own)
    return "\n".join(map(wrapped, lines)) + "\n"


def behind(regimes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Ratios below 1 by more than `LOSS`, or below what is aimed at; the first of them first."""
    rows = []
    for own in regimes:
        target = TARGETS.get(own["regime"])
        for side, key in ((s, k) for k in keys for s in (0, 1)):
            found = own["to_best_peer" if side else "to_vllm"][key]
            value, high = found["value"], found["high"]
            if value is None or (found["mark"] == ">=" and value < 1.0):
                continue
            aim = target.aim[side] if target is not None and key == keys[0] else None
            worse = value < 1.0 - LOSS
            if worse or (aim is not None and value < aim and found["mark"] != ">="):
                other = own["best_peer"][key] if side else BASE
                lost = worse and high is not None and high < 1.0
                row = {"regime": own["regime"], "share": key, "to": other, "aim": aim}
                rows.append(row | {"lost": lost, "worse": worse, "ratio": found})
    return sorted(rows, key=lambda row: (not row["lost"], not row["worse"]))


def _losses(regimes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    rows = behind(regimes, keys)
    lost, worse = sum(row["lost"] for row in rows), sum(row["worse"] for row in rows)
    asked = 2 * len(keys) * len(regimes)
    known = sum(
        own[side][key]["value"] is not None
        for own in regimes
        for side in ("to_vllm", "to_best_peer")
        for key in keys
    )
    lines = [
        f"## Where Gimbal loses, or misses the aim: {lost} of {known} comparisons lost",
        "",
        f"Of {asked} comparisons {known} have a ratio or a bound. Behind by more than a thousandth "
        f"it is in {worse}, beyond the interval, marked *, in {lost}; the others miss the aim.",
        "",
    ]
    head = ("regime", "share", "against", "ratio", "aim")
    body = [
        [
            row["regime"],
            row["share"],
            row["to"],
            number(row["ratio"]) + ("*" if row["lost"] else ""),
            "-" if row["aim"] is None else f"{row['aim']:g}",
        ]
        for row in rows
    ]
    return [*lines, *(table(head, body) if body else [])]


def _rates(regimes: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    body = []
    for own in regimes:
        target = TARGETS.get(own["regime"])
        for key in keys:
            rates, peer = own["rates"], own["best_peer"][key]
            aim = "-"
            if target is not None and key == keys[0]:
                aim = " / ".join(f"{value:g}" for value in target.aim)
            body.append(
                [
                    own["regime"],
                    key,
                    number(rates[BASE][key], RATE),
                    number(rates[OURS][key], RATE),
                    f"{number(rates[peer][key], RATE)} ({peer})",
                    number(own["to_vllm"][key]),
                    number(own["to_best_peer"][key]),
                    aim,
                ]
            )
    head = ("regime", "share", BASE, OURS, "best peer", "to vllm", "to best peer", "aim")
    return ["## Highest rates (requests/s) and ratios", "", *table(head, body)]


def _limits(regimes: Sequence[Mapping[str, Any]]) -> list[str]:
    body = []
    for own in regimes:
        target = TARGETS.get(own["regime"])
        stated = target is not None and target.slo.limits() == own["slo"]
        limits = [f"{own['slo'][key]:,.0f} ms" if key in own["slo"] else "-" for key in _LIMITS]
        body.append([own["regime"], *limits, target.reason if target and stated else "asked for"])
    return ["## Limits", "", *table(("regime", *_LIMITS.values(), "from"), body)]


_LIMITS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E"}


def _attained(own: Mapping[str, Any]) -> list[str]:
    loads = sorted({float(load) for shares in own["attained"].values() for load in shares})
    lines = [
        f"## {own['regime']}: share within limits",
        "",
        f"On {own['cluster']}, mean over seeds and the lowest seed; loads are shares of "
        f"{own['capacity_rps']:.3g} requests/s. - was not needed, or not run.",
        "",
    ]
    body = []
    for name in ARMS:
        shares = own["attained"][name]
        cells = [
            f"{sum(shares[load]) / len(shares[load]):.3f} ({min(shares[load]):.3f})"
            if load in shares
            else "-"
            for load in loads
        ]
        body.append([name, *cells])
    return [*lines, *table(("", *(f"load {load:g}" for load in loads)), body)]


def number(values: Mapping[str, Any], digits: str = ".2f") -> str:
    """A ratio, or with other digits a rate, with its interval, or as a bound."""
    if values["value"] is None:
        return "-"
    text = f"{values['mark']} {values['value']:{digits}}".strip()
    if values["low"] is None:
        return text
    return f"{text} [{values['low']:{digits}}, {values['high']:{digits}}]"
