"""The paper's figures, and a reproduction's cells set against them. All ratios are ours / theirs.

Cells are paired: both arms of a ratio saw the same requests at the same times. A ratio over
several cells is the geometric mean of the cells' ratios; its interval is a bootstrap over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gimbal.core.contracts import FloatArray
from gimbal.report.student import quantile
from reproduction.matrix import FIRST_SEED, Task

METRICS = {
    "ttft_mean_ms": "TTFT mean",
    "tpot_mean_ms": "TPOT mean",
    "ttft_p99_ms": "TTFT P99",
    "throughput_rps": "throughput",
}
LOWER_IS_BETTER = frozenset(METRICS) - {"throughput_rps"}
BASELINES = ("vllm-legacy", "vllm")

PAPER = {
    ("gimbal", "vllm-legacy"): {
        "ttft_mean_ms": -0.429,
        "tpot_mean_ms": -0.333,
        "ttft_p99_ms": -0.443,
        "throughput_rps": 0.030,
    },
    ("gimbal", "moe-tuner"): {"ttft_mean_ms": -0.470, "tpot_mean_ms": -0.362},
    ("gimbal", "sem-moe"): {"ttft_mean_ms": -0.347, "tpot_mean_ms": -0.295},
}
"""Relative changes reported by the Gimbal paper (arXiv 2606.15177)."""

PAPER_ABLATION = {
    "gimbal-dp": {"ttft_mean_ms": -0.251, "tpot_mean_ms": -0.134},
    "gimbal-ep": {"ttft_mean_ms": -0.262, "tpot_mean_ms": -0.227},
    "gimbal-no-feedback": {"ttft_mean_ms": -0.298, "tpot_mean_ms": -0.273},
    "gimbal": {"ttft_mean_ms": -0.414, "tpot_mean_ms": -0.320},
}
"""Its ablation, against its vLLM."""

KNEE = 1.5
"""vLLM's P99 TTFT starts to climb where it exceeds this many times that at the lowest load."""
LOSS = 1e-3
"""Smaller differences are called even."""
DRAWS = 1000

Key = tuple[str, str, float, int]
"""Scenario, distribution, load, seed."""
Cells = Mapping[str, Mapping[Key, Mapping[str, Any]]]
"""Arm -> key -> figures."""


def by_arm(results: Iterable[tuple[Task, dict[str, Any]]]) -> dict[str, dict[Key, dict[str, Any]]]:
    """Cells by arm; capacities are left out."""
    cells: dict[str, dict[Key, dict[str, Any]]] = {}
    for task, result in results:
        if task.arm:
            key = (task.scenario, task.distribution, task.load, task.seed)
            cells.setdefault(task.arm, {})[key] = result
    return cells


def change(cells: Cells, arm: str, base: str, metric: str, keys: Iterable[Key]) -> dict[str, Any]:
    """Geometric-mean change of `arm` against `base` over `keys`, with a 95 % interval.

    The interval is over distributions and seeds as drawn (bootstrap, fixed seed); None for one.
    """
    values = _logs(cells, arm, base, metric, keys)
    if not len(values):
        return {"change": None, "low": None, "high": None, "cells": 0}
    interval: list[float | None] = [None, None]
    if len(values) > 1:
        rng = np.random.default_rng(len(values))
        drawn = rng.choice(values, (DRAWS, len(values))).mean(axis=1)
        interval = [float(np.expm1(q)) for q in np.percentile(drawn, [2.5, 97.5])]
    return {
        "change": float(np.expm1(values.mean())),
        "low": interval[0],
        "high": interval[1],
        "cells": len(values),
    }


def _logs(cells: Cells, arm: str, base: str, metric: str, keys: Iterable[Key]) -> FloatArray:
    """Logarithms of ours over theirs, of the cells that both have."""
    pairs = [
        (cells[arm][key].get(metric), cells[base][key].get(metric))
        for key in keys
        if key in cells[base]
    ]
    return np.array([np.log(ours / theirs) for ours, theirs in pairs if ours and theirs])


def knee_load(cells: Cells, scenario: str, base: str) -> float:
    """The lowest load at which `base`'s P99 TTFT, median over cells, has begun to climb."""
    own = {key: value for key, value in cells[base].items() if key[0] == scenario}
    loads = sorted({key[2] for key in own})
    level = [np.median([v["ttft_p99_ms"] for k, v in own.items() if k[2] == at]) for at in loads]
    climbed = [at for at, value in zip(loads, level, strict=True) if value > KNEE * level[0]]
    return climbed[0] if climbed else loads[-1]


def paired_interval(logs: FloatArray) -> tuple[float, float] | None:
    """95 % interval of the mean of `logs` (Student's t), None for fewer than two."""
    count = len(logs)
    if count < 2:
        return None
    reach = quantile(count - 1) * logs.std(ddof=1) / np.sqrt(count)
    return float(logs.mean() - reach), float(logs.mean() + reach)


def comparisons(cells: Cells, arm: str = "gimbal") -> list[dict[str, Any]]:
    """`arm` against each baseline in every (scenario, distribution, load) and metric.

    Attributes of a row: ``change`` over its seeds with its paired interval ``low`` to ``high``
    (None for one seed), ``verdict``: ``lost`` or ``won`` when the interval leaves zero out and
    the change exceeds `LOSS`, else ``even``; and ``behind``: whether the mean is worse by more
    than `LOSS` whatever the interval says.
    """
    rows = []
    for group in sorted({key[:3] for key in cells[arm]}):
        keys = [key for key in cells[arm] if key[:3] == group]
        for base in BASELINES:
            for metric in METRICS:
                logs = _logs(cells, arm, base, metric, keys)
                if len(logs):
                    names = ("scenario", "distribution", "load")
                    row = dict(zip(names, group, strict=True)) | {"baseline": base}
                    rows.append(row | {"metric": metric, "seeds": len(logs)} | _judge(logs, metric))
    return rows


def _judge(logs: FloatArray, metric: str) -> dict[str, Any]:
    sign = 1.0 if metric in LOWER_IS_BETTER else -1.0
    change, interval = float(np.expm1(logs.mean())), paired_interval(logs)
    low, high = (None, None) if interval is None else map(float, np.expm1(interval))
    verdict = "even"
    if low is not None and high is not None and abs(change) > LOSS and low * high > 0:
        verdict = "lost" if sign * change > 0 else "won"
    behind = sign * change > LOSS
    return {"change": change, "low": low, "high": high, "verdict": verdict, "behind": behind}


def losses(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons in which the arm is behind: those beyond their interval first, worst first."""
    behind = [dict(row) for row in rows if row["behind"]]
    return sorted(behind, key=lambda row: (row["verdict"] != "lost", -abs(row["change"])))


def scenario_tables(cells: Cells, scenario: str) -> dict[str, Any]:
    """Changes of every arm against both baselines, at the knee, per load and over all loads."""
    keys = [key for key in cells["gimbal"] if key[0] == scenario]
    here = [arm for arm, own in cells.items() if any(key[0] == scenario for key in own)]
    loads = sorted({key[2] for key in keys})
    knee = knee_load(cells, scenario, "vllm-legacy")

    def against(base: str, chosen: list[Key]) -> dict[str, Any]:
        return {
            arm: {metric: change(cells, arm, base, metric, chosen) for metric in METRICS}
            for arm in here
            if arm != base
        }

    at_knee = [key for key in keys if key[2] == knee]
    return {
        "knee_load": knee,
        "at_knee": {base: against(base, at_knee) for base in BASELINES},
        "all_loads": {base: against(base, keys) for base in BASELINES},
        "by_load": {
            f"{load:g}": {
                base: against(base, [key for key in keys if key[2] == load]) for base in BASELINES
            }
            for load in loads
        },
        "against_others": {
            base: {m: change(cells, "gimbal", base, m, at_knee) for m in METRICS}
            for base in ("moe-tuner", "sem-moe")
        },
        "feedback_adds": {
            arm: {m: change(cells, arm, "gimbal-no-feedback", m, keys) for m in METRICS}
            for arm in ("gimbal", "gimbal-owner", "gimbal-affinity")
            if arm in here
        },
        "graphs_add": {
            f"{load:g}": {
                m: change(cells, "gimbal", "gimbal-no-graphs", m, [k for k in keys if k[2] == load])
                for m in METRICS
            }
            for load in loads
            if "gimbal-no-graphs" in here
        },
        "levels": {arm: _level(cells[arm], scenario, loads) for arm in here},
        "experts": {arm: _experts(cells[arm], scenario) for arm in here},
    }


def _level(own: Mapping[Key, Mapping[str, Any]], scenario: str, loads: list[float]) -> Any:
    """Absolute figures per load, mean over cells."""
    return {
        f"{load:g}": {
            metric: float(
                np.mean([v[metric] for k, v in own.items() if k[0] == scenario and k[2] == load])
            )
            for metric in METRICS
        }
        for load in loads
    }


def _experts(own: Mapping[Key, Mapping[str, Any]], scenario: str) -> dict[str, float | None]:
    """Rearrangements, stalls, and predicted against realized gain per step."""
    chosen = [value for key, value in own.items() if key[0] == scenario]
    pairs = [
        (predicted, realized)
        for value in chosen
        for predicted, realized in zip(
            value["predicted_gain_us"], value["realized_gain_us"], strict=True
        )
        if realized is not None
    ]
    return {
        "rearrangements_per_run": float(np.mean([v["rearrangements"] for v in chosen])),
        "refused_per_run": float(np.mean([v["refused"] for v in chosen])),
        "stall_s_per_run": float(np.mean([v["stall_s"] for v in chosen])),
        "predicted_gain_us_per_step": float(np.mean([p for p, _ in pairs])) if pairs else None,
        "realized_gain_us_per_step": float(np.mean([r for _, r in pairs])) if pairs else None,
    }


def report(
    results: Iterable[tuple[Task, dict[str, Any]]],
    quick: bool,
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole result as one JSON object; losses come first."""
    kept = list(results)
    cells = by_arm(kept)
    scenarios = list(dict.fromkeys(task.scenario for task, _ in kept))
    seeds = sorted({task.seed for task, _ in kept if task.arm})
    checked = comparisons(cells)
    verdicts = [row["verdict"] for row in checked]
    return {
        "losses": losses(checked),
        "comparisons": len(checked),
        "lost": verdicts.count("lost"),
        "won": verdicts.count("won"),
        "scenarios": {name: scenario_tables(cells, name) for name in scenarios},
        "capacity_rps": {
            f"{task.scenario}/{task.distribution}": result["capacity_rps"]
            for task, result in kept
            if not task.arm
        },
        "paper": {f"{a}/{b}": values for (a, b), values in PAPER.items()},
        "paper_ablation": PAPER_ABLATION,
        "cells": sum(len(own) for own in cells.values()),
        "seeds": seeds,
        "first_seed": FIRST_SEED,
        "quick": quick,
        "environment": dict(environment or {}),
        "code": sorted({result["code"] for _, result in kept}),
    }
