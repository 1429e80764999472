"""TTFT against TPOT of many arms, with the Pareto front of those that are not ours.

    python benchmarks/pareto.py RESULT.json... [--ours gimbal] [--without ARM,...] [--out FILE.svg]

Reads what `gimbal bench --json` printed. With several files every arm is divided by the arm `vllm`
of its own file first, and an arm found in more than one file is the mean of its ratios. Two panels,
mean and P99 TTFT; an arm whose name begins with one of `--ours` is drawn beside the front of the
rest. Says for each of ours whether it lies outside the front, and exits 1 if none does in a panel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

STATISTICS = ("mean", "p99")


@dataclass(frozen=True, slots=True)
class Point:
    """An arm: TTFT and TPOT, milliseconds or ratios to `vllm`; smaller is better in both."""

    name: str
    ttft: float
    tpot: float

    def dominates(self, other: Point) -> bool:
        """At least as good in both, better in one."""
        no_worse = self.ttft <= other.ttft and self.tpot <= other.tpot
        return no_worse and (self.ttft < other.ttft or self.tpot < other.tpot)


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates, by TTFT."""
    every = list(points)
    kept = [p for p in every if not any(q.dominates(p) for q in every)]
    return sorted(kept, key=lambda p: (p.ttft, p.tpot))


def outside(point: Point, others: Iterable[Point]) -> bool:
    """Whether `point` lies strictly outside the front of `others`: none is as good in both."""
    return not any(q.ttft <= point.ttft and q.tpot <= point.tpot for q in others)


def read(paths: Iterable[Path], statistic: str, without: Container[str] = ()) -> list[Point]:
    """Arms of all files, TTFT at `statistic`; ratios to `vllm` when there are several files.

    Args:
        without: names of arms that are left out.
    """
    files = [json.loads(path.read_text(encoding="utf-8"))["arms"] for path in paths]
    found: dict[str, list[tuple[float, float]]] = {}
    for arms in files:
        base = _pair(arms["vllm"], statistic) if len(files) > 1 else (1.0, 1.0)
        for name, arm in arms.items():
            ttft, tpot = _pair(arm, statistic)
            found.setdefault(name, []).append((ttft / base[0], tpot / base[1]))
    return [
        Point(name, sum(t for t, _ in pairs) / len(pairs), sum(o for _, o in pairs) / len(pairs))
        for name, pairs in found.items()
        if name not in without
    ]


def _pair(arm: Mapping[str, Mapping[str, float]], statistic: str) -> tuple[float, float]:
    return arm["ttft_ms"][statistic], arm["tpot_ms"]["mean"]


def plot(panels: Mapping[str, list[Point]], ours: tuple[str, ...], unit: str, out: Path) -> None:
    """One panel per statistic, written to `out`."""
    from gimbal.report.plots import label_plainly, pyplot

    plt = pyplot()
    plt.rcParams |= {"svg.hashsalt": "gimbal", "svg.fonttype": "none"}  # same points, same file
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4.5), layout="constrained")
    numbers = {p.name: n for n, p in enumerate(next(iter(panels.values())), start=1)}
    for axis, (statistic, points) in zip(axes, panels.items(), strict=True):
        edge = front(p for p in points if not p.name.startswith(ours))
        axis.step(
            [p.ttft for p in edge], [p.tpot for p in edge], where="post", color="0.6", linewidth=1
        )
        for p in points:
            mine = p.name.startswith(ours)
            colour, mark = ("tab:blue", "s") if mine else ("0.3", "o")
            label = f"{numbers[p.name]}  {p.name}"
            axis.plot(p.ttft, p.tpot, mark, color=colour, markersize=5 if mine else 4, label=label)
            axis.annotate(
                str(numbers[p.name]),
                (p.ttft, p.tpot),
                fontsize=7,
                color=colour,
                xytext=(3, 3),
                textcoords="offset points",
            )
        title = "mean" if statistic == "mean" else "P99"
        axis.set(xscale="log", xlabel=f"{title} TTFT, {unit}", ylabel=f"mean TPOT, {unit}")
        label_plainly(axis.xaxis, (2, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, markerscale=0.8)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="from `gimbal bench --json`")
    parser.add_argument("--ours", default="gimbal", help="comma-separated beginnings of arm names")
    parser.add_argument("--without", default="", help="comma-separated names of arms left out")
    parser.add_argument("--out", type=Path, help=".svg or .png")
    options = parser.parse_args()
    ours = tuple(options.ours.split(","))
    unit = "ratio to vllm" if len(options.results) > 1 else "ms"
    panels = {s: read(options.results, s, options.without.split(",")) for s in STATISTICS}
    missed = False
    for statistic, points in panels.items():
        rest = [p for p in points if not p.name.startswith(ours)]
        edge = front(rest)
        print(f"{statistic} TTFT against TPOT, {unit}")
        verdicts = []
        for p in sorted(points, key=lambda p: p.ttft):
            note = "front" if p in edge else ""
            if p.name.startswith(ours):
                verdicts.append(outside(p, rest))
                note = "ours, outside the front" if verdicts[-1] else "ours, not outside"
                beaten = sum(p.dominates(q) for q in edge)
                note += f"; better in both than {beaten} of its {len(edge)}"
            print(f"  {p.name:28}{p.ttft:10.2f}{p.tpot:10.2f}  {note}")
        missed |= not any(verdicts)
    if options.out:
        plot(panels, ours, unit, options.out)
    sys.exit(missed)


if __name__ == "__main__":
    main()
