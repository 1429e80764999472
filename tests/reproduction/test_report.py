"""The page of a whole reproduction, from synthetic cells: what is on it, in which order."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gimbal.core.errors import InputError
from reproduction import paper
from reproduction.matrix import ARMS, FIRST_SEED, Task
from reproduction.paper_markdown import render
from reproduction.report import write_reproduction

SLOWER = {"vllm": 1.1, "vllm-legacy": 1.3, "gimbal": 1.0}


def cells(directory: Path, seeds: int = 3):
    """Gimbal is 9 % faster than vLLM in TTFT and loses 2 % of throughput to it."""
    rng = np.random.default_rng(0)
    for lengths in ("random", "central"):
        task = Task(str(directory), "t", "today", lengths, 10)
        yield task, {"capacity_rps": 40.0, "code": "c"}
        for load in (0.3, 0.9):
            for seed in range(seeds):
                weather = np.exp(rng.normal(0, 0.2))
                for arm in ARMS:
                    own = SLOWER.get(arm, 1.05) * weather * np.exp(rng.normal(0, 1e-3))
                    yield (
                        Task(
                            str(directory), "t", "today", lengths, 9, arm, load, FIRST_SEED + seed
                        ),
                        {
                            "ttft_mean_ms": 50 * own * (1 + 9 * (load > 0.5)),
                            "ttft_p99_ms": 200 * own * (1 + 9 * (load > 0.5)),
                            "tpot_mean_ms": 10 * weather,
                            "throughput_rps": 40 * load * (0.98 if arm == "gimbal" else 1.0),
                            "rearrangements": 1,
                            "refused": 0,
                            "stall_s": 0.0,
                            "predicted_gain_us": [5.0],
                            "realized_gain_us": [4.0],
                            "code": "c",
                        },
                    )


@pytest.fixture
def page(tmp_path: Path) -> str:
    result = paper.report(list(cells(tmp_path)), True, {"python": "3.x"})
    (tmp_path / "report.md").write_text(render(result), encoding="utf-8")
    (tmp_path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return write_reproduction(tmp_path).read_text(encoding="utf-8")


def test_losses_come_first_and_count_beyond_their_interval_only(page: str) -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads[0] == "Where Gimbal loses: 8 of 32 comparisons beyond their interval"
    assert heads[1].startswith("In short")
    assert heads[2:] == ["today", "Environment and seeds"]
    lost = page[: page.index("In short")]
    assert lost.count(">throughput<") == 8
    assert lost.count('class="bad">-2.0 %') == 8
    assert "TPOT" not in lost.partition("<table>")[2]


def test_the_ablation_stands_beside_the_papers(page: str) -> None:
    bars = page[page.index("today: TTFT mean against vllm-legacy at load 0.9") :]
    assert "paper, no-feedback: -29.8" in bars
    assert "here, gimbal: -23." in bars
    assert "No run of this scenario was kept" in page
    assert ", ".join(str(FIRST_SEED + k) for k in range(3)) in page


def test_prose_of_the_text_is_wrapped_between_words(page: str, tmp_path: Path) -> None:
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    prose = [line for line in lines if not line.startswith(("|", "#"))]
    assert max(map(len, prose)) <= 100
    assert not [line for line in prose if line.endswith("-")]
    assert "chance alone would put about 1 on either side" in " ".join(prose)


def test_plots_lie_beside_the_page(page: str, tmp_path: Path) -> None:
    names = {path.stem for path in (tmp_path / "plots").glob("*.svg")}
    assert {"today-ttft-mean-ms", "today-tpot-mean-against-vllm-legacy-at-load-0.9"} <= names


def test_an_unfinished_reproduction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finished reproduction"):
        write_reproduction(tmp_path)
