"""Charts: ticks that can be read, colours, page and file, and nothing where nothing is."""

import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from gimbal.records.placements import placement_record, rank_load
from gimbal.records.schema import RequestRecord
from gimbal.report import svg
from gimbal.report.charts import Bars, Heat, Lines, cdf, linear_ticks, log_ticks
from gimbal.report.page import markdown
from gimbal.report.run_charts import busiest_over_mean

NAMES = ("vllm", "a<b")


def lines(**options) -> Lines:
    x = np.array([1.0, 2.0, 40.0])
    return Lines("a & b", "s", "ms", {"vllm": (x, x * 3), "a<b": (x, x + 1)}, NAMES, **options)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1, 10, [1, 2, 5, 10]),
        (0.9, 1100, [1, 3, 10, 30, 100, 300, 1000]),
        (1e-3, 1e5, [1e-3, 1e-1, 1e1, 1e3, 1e5]),
        (100, 130, [100, 110, 120, 130]),
        (7, 7, [7]),
    ],
)
def test_log_ticks(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("high", [0.03, 1.0, 7.0, 640.0, 1e6])
def test_linear_ticks_are_few_and_inside(high):
    ticks = linear_ticks(0.0, high)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] <= high * (1 + 1e-9)


CHARTS = [
    lines(),
    lines(log_x=True, log_y=True),
    lines(points=True),
    cdf("c", "ms", {"vllm": np.array([3.0, 1.0, np.nan, 0.0])}, NAMES),
    Bars("b", "%", ["x", "y"], {"vllm": [-40.0, None], "a<b": [3.0, -1.0]}, NAMES),
    Heat("h", "rank", "layer", np.arange(12.0).reshape(3, 4), "load", middle=5.0),
    Heat("k", "expert", "layer", np.array([[0.0, 1.0, 2.0]]), "rank", steps=3),
]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda c: c.title)
def test_page_and_file_are_well_formed_and_escape(chart):
    assert ET.fromstring(svg.draw(chart)).tag == "svg"
    text = svg.standalone(chart)
    assert ET.fromstring(text).tag.endswith("svg")
    for number in map(float, _coordinates(text)):
        assert np.isfinite(number)
        assert -1 <= number <= 2 * svg.WIDTH + 1


def _coordinates(text: str) -> list[str]:
    root = ET.fromstring(text)
    return [e.get(k) for e in root.iter() for k in ("x", "y", "x1", "y1", "cx", "cy") if e.get(k)]


def test_a_chart_without_data_says_so():
    assert "not recorded" in svg.draw(cdf("TTFT", "ms", {"vllm": np.array([])}, NAMES))


def test_a_share_is_drawn_at_its_height():
    chart = cdf("c", "ms", {"vllm": np.arange(1.0, 5.0)}, NAMES)
    x, y = chart.series["vllm"]
    np.testing.assert_allclose(y, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(x, [1, 2, 3, 4])


def test_png_holds_the_pixels():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    data = svg.png(pixels)
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (4, 2)
    size = struct.unpack(">I", data[33:37])[0]
    rows = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(2, 13)
    np.testing.assert_array_equal(rows[:, 1:].reshape(2, 4, 3), pixels)


def test_hotter_than_the_middle_is_red_and_cooler_blue():
    chart = Heat("h", "", "", np.array([[0.0, 1.0, 2.0]]), "", middle=1.0)
    (cool, even, hot), _, _ = svg.heat_colours(chart)[0][0], 0, 0
    assert cool[2] > cool[0]
    assert hot[0] > hot[2]
    assert even.min() > 240


def test_charts_of_one_title_become_files_of_their_own(tmp_path):
    paths = svg.save_charts([*CHARTS, CHARTS[0]], tmp_path)
    assert len(set(paths)) == len(paths) == len(CHARTS) + 1
    assert all(ET.parse(path).getroot().tag.endswith("svg") for path in paths)
    assert (tmp_path / "a-b-more-more.svg").exists()


def test_balance_over_time_weighs_tokens_by_how_long_they_were_held():
    def record(engine, begin, end, tokens):
        return RequestRecord("r", "a", 0, 0, begin, tokens, 0, 0, end, end, engine=engine)

    times, ratio = busiest_over_mean([record(0, 0, 6, 300), record(1, 0, 3, 100)], 2)
    assert ratio[times < 3] == pytest.approx(1.5)
    assert ratio[times > 3] == pytest.approx(2.0)


def test_a_placement_record_holds_ranks_and_relative_load():
    pairs = np.array([[30.0, 10.0, 10.0, 10.0]])
    before, after = np.array([[0, 1, 2, 3, 0, -1]]), np.array([[1, 2, 3, 0, 0, 3]])
    record = placement_record(2.0, True, pairs, before, after, 3)
    assert record.pairs == ((2.0, 0.67, 0.67, 0.67),)
    assert record.ranks_before == ((0, 0, 0, 1),)
    assert record.ranks_after == ((1, 0, 0, 0),)
    np.testing.assert_allclose(rank_load(record.pairs, record.ranks_before).sum(), 2.0)
    assert rank_load(record.pairs, record.ranks_before)[0, 0] == pytest.approx(3.34 / 2.005)


def test_markdown_of_our_reports():
    text = "# T\n\nOne `x<y`\nline.\n\n| a | b |\n|---|---|\n| m | -1.5 % [-2.0, -1.0] |\n"
    text += "| n | +1.5 %* [+1.0, +2.0] |\n| o | +0.1 % [-1.0, +2.0] |\n"
    html = markdown(text)
    assert "<h1>T</h1><p>One <code>x&lt;y</code> line.</p>" in html
    assert '<span class="good">-1.5 %</span> <small>-2.0 to -1.0</small>' in html
    assert '<span class="bad">+1.5 %*</span>' in html
    # A loss whose lower bound rounds to zero is still one.
    rounded = markdown("| change |\n|---|\n| +0.5 %* [+0.0, +0.9] |")
    assert '<span class="bad">+0.5 %*</span>' in rounded
    assert '<span class="soft">+0.1 %</span>' in html
