"""Scenarios: what is generated is what they say, and like the real traces where there are any."""

import csv
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gimbal.core.errors import InputError
from gimbal.workloads import Trace, WorkloadOptions, build_workload, load_trace
from gimbal.workloads.generate import generate
from gimbal.workloads.load import data_directories
from gimbal.workloads.prompts import PromptWriter, uniform_vocabulary
from gimbal.workloads.scenario import Helpers, load_scenario, scenario_names
from gimbal.workloads.trace import TraceRequest

NAMES = ("agent", "burst", "chat", "documents", "reasoning")


def made(name: str, count: int = 2000, rate_rps: float | None = None, seed: int = 0) -> Trace:
    scenario = load_scenario(name)
    return generate(scenario, count, rate_rps or scenario.rate_rps, seed)


def sessions(trace: Trace) -> dict[str, list[TraceRequest]]:
    found: dict[str, list[TraceRequest]] = defaultdict(list)
    for request in trace.requests:
        assert request.session is not None
        found[request.session].append(request)
    return found


def seen_before(trace: Trace) -> float:
    """Share of prompt blocks whose id an earlier prompt had."""
    seen: set[int] = set()
    hits = blocks = 0
    for request in trace.requests:
        hits += sum(block in seen for block in request.prefix_blocks)
        blocks += len(request.prefix_blocks)
        seen.update(request.prefix_blocks)
    return hits / blocks


def data_file(path: str) -> Path:
    for directory in data_directories():
        if (directory / path).is_file():
            return directory / path
    pytest.skip(f"no {path} in $GIMBAL_DATA or ../shared/data")


def assert_like(values: np.ndarray, real: np.ndarray, within: float) -> None:
    for percentile in (50, 90):
        expected = np.percentile(real, percentile)
        assert np.percentile(values, percentile) == pytest.approx(expected, rel=within)


def test_the_packaged_ones_are_there_with_their_sources() -> None:
    assert tuple(scenario_names()) == NAMES
    for name in NAMES:
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario.sources
        assert len(scenario.description) < 80


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_and_count_and_rate_are_kept(name: str) -> None:
    options = WorkloadOptions(requests=300, rate_rps=2.0)
    trace = load_trace(name)
    assert trace.rate_rps == pytest.approx(load_scenario(name).rate_rps, rel=0.01)
    built = build_workload(trace, options, 3)
    assert built == build_workload(load_trace(name), options, 3)
    assert built.requests != build_workload(trace, options, 4).requests
    assert len(built) == 300
    assert built.rate_rps == pytest.approx(2.0)
    assert built.name == name


@pytest.mark.parametrize("name", ["burst", "reasoning"])
def test_lengths_have_the_percentiles_of_the_file(name: str) -> None:
    scenario, trace = load_scenario(name), made(name, 20000)
    tables = ((scenario.prompt_tokens, trace.prompt_tokens),
              (scenario.output_tokens, trace.output_tokens))  # fmt: skip
    for table, values in tables:
        for percentile in (10, 50, 90):
            expected = table[percentile]
            assert np.percentile(values, percentile) == pytest.approx(expected, rel=0.1, abs=1)
        assert values.max() <= table[100]
    assert not any(r.prefix_blocks or r.session for r in trace.requests)


def test_a_burst_is_one() -> None:
    gaps = np.diff(made("burst", 20000).arrivals_s)
    assert 1.8 < gaps.std() / gaps.mean() < 2.4
    gaps = np.diff(made("reasoning", 20000).arrivals_s)
    assert 0.9 < gaps.std() / gaps.mean() < 1.1


@pytest.mark.parametrize("name", ["chat", "agent"])
def test_a_turn_contains_the_prompts_and_answers_before_it(name: str) -> None:
    trace = made(name)
    size, grown, shrunk = trace.prefix_block_tokens, 0, 0
    for turns in sessions(trace).values():
        for before, after in pairwise(turns):
            if after.prompt_tokens < before.prompt_tokens:  # rewritten
                shrunk += 1
                continue
            grown += 1
            whole = before.prompt_tokens // size
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert after.prefix_blocks[:whole] == before.prefix_blocks[:whole]
    assert grown > 300
    assert shrunk < 0.02 * grown


def test_no_stranger_shares_more_than_the_system_prompt() -> None:
    shared = load_scenario("chat").shared
    assert shared is not None
    whole = shared.tokens // 64
    owners: dict[int, set[str | None]] = defaultdict(set)
    for request in made("chat").requests:
        for block in request.prefix_blocks:
            owners[block].add(request.session)
    common = {block for block, own in owners.items() if len(own) > 1}
    assert common == set(range(whole))


def test_prompts_are_written_as_their_blocks_say() -> None:
    trace = made("chat", 400)
    turns = next(own for own in sessions(trace).values() if len(own) > 2)
    writer = PromptWriter(trace, uniform_vocabulary(0, 50_000), (1,))
    first, second = (writer.prompt(trace.requests.index(turn)) for turn in turns[:2])
    assert second[: len(first)] == first


def test_more_traffic_is_more_sessions_not_shorter_pauses() -> None:
    def pause_s(trace: Trace) -> float:
        gaps = [
            after.arrival_s - before.arrival_s
            for turns in sessions(trace).values()
            for before, after in pairwise(turns)
        ]
        return float(np.median(gaps))

    slow, fast = made("agent", 2000, 0.5), made("agent", 2000, 2.0)
    assert fast.rate_rps / slow.rate_rps == pytest.approx(4, rel=0.3)
    assert pause_s(fast) == pytest.approx(pause_s(slow), rel=0.3)


def test_agents_read_what_they_have_read() -> None:
    trace = made("agent", 4000)
    assert 0.94 < seen_before(trace) < 0.98  # TraceLab: 96 % of input tokens
    assert 80_000 < trace.prompt_tokens.mean() < 160_000  # TraceLab: 154,000, without our limit
    assert trace.prompt_tokens.max() <= 256_000
    assert 420 < trace.output_tokens.mean() < 620  # TraceLab: 523
    halves = np.histogram(made("agent", 4000, 2.0).arrivals_s, bins=2)[0]
    assert 0.8 < halves[0] / halves[1] < 1.25  # no run-up


def test_helpers_run_beside_each_other_while_their_parent_waits() -> None:
    agent = load_scenario("agent")
    assert agent.turns is not None
    four, one = {0.0: 4.0, 100.0: 4.0}, {0.0: 1.0, 100.0: 1.0}
    long = {0.0: 1000.0, 100.0: 1000.0}
    turns = replace(agent.turns, count=four, gap_s=one, pauses=0.0, s_per_token=1.0)
    helpers = Helpers(1.0, {0.0: 3.0, 100.0: 3.0}, one, long)  # every turn begins three
    lone = replace(agent, turns=turns, output_tokens=one, helpers=helpers)
    trace = generate(lone, 500, 0.01, 0)  # some hundred sessions, hours apart
    parents = [own for own in sessions(trace).values() if len(own) == 4]
    starts = np.array([own[0].arrival_s for own in sessions(trace).values() if len(own) == 1])
    assert len(parents) > 20
    for own in parents:
        waits = np.diff([turn.arrival_s for turn in own])
        assert waits == pytest.approx(4.0)  # answer 1 s, gap 1 s, a helper's answer and gap 2 s
        for turn in own[:-1]:  # begun by the answer
            assert np.isclose(starts, turn.arrival_s + 1.0).sum() == 3


def test_questions_share_their_document_and_nothing_else() -> None:
    trace = made("documents")
    several = [own for own in sessions(trace).values() if len(own) > 1]
    assert len(several) > 200
    for own in several:
        assert len({turn.prefix_blocks for turn in own}) == 1
        covered = len(own[0].prefix_blocks) * trace.prefix_block_tokens
        assert all(0 < turn.prompt_tokens - covered < 400 + 64 + 1 for turn in own)
    assert 0.6 < seen_before(trace) < 0.8  # 3.9 questions a document


def test_chat_is_like_mooncakes_conversations() -> None:
    data_file("mooncake/conversation_trace.jsonl")
    real = load_trace("mooncake")
    trace = made("chat", len(real))
    assert_like(trace.prompt_tokens, real.prompt_tokens, 0.2)
    assert_like(trace.output_tokens, real.output_tokens, 0.05)
    assert seen_before(trace) == pytest.approx(seen_before(real), abs=0.06)


def test_burst_is_like_burstgpt() -> None:
    data_file("burstgpt_derived/burst_data_8000.json")
    real, trace = load_trace("burstgpt"), made("burst", 8000)
    assert_like(trace.prompt_tokens, real.prompt_tokens, 0.1)
    assert_like(trace.output_tokens, real.output_tokens, 0.1)


def test_answers_on_documents_are_like_summaries() -> None:
    path = data_file("length_lists/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv")
    with path.open() as file:
        real = [float(row["num_decode_tokens"]) for row in csv.DictReader(file)]
    assert_like(made("documents", 8000).output_tokens, np.array(real), 0.05)


FILE = """description: mine
sources: [me]
rate_rps: 2
requests: 50
prompt_tokens: {0: 5, 100: 50}
output_tokens: {0: 1, 100: 9}
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    trace = load_trace(str(path))
    assert (trace.name, len(trace)) == ("mine", 50)
    assert 5 <= trace.prompt_tokens.min() <= trace.prompt_tokens.max() <= 50


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("100: 50", "100: 4"), "prompt_tokens: expected values that never fall"),
        (("0: 5, 100", "0: 5, 99"), "prompt_tokens: expected percentiles from 0 to 100"),
        (("rate_rps: 2", "rate_rps: -2"), "rate_rps: "),
        (("requests", "request"), "request: .*did you mean 'requests'"),
        (("rate_rps: 2\n", ""), "rate_rps: "),
        (("rate_rps: 2", "rate_rps: 2\nshared: {tokens: 9}"), "mine.yaml: block_tokens: expected"),
        (("description: mine\n", "- 1\n#"), "not YAML|mapping"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(InputError, match=complaint) as error:
        load_trace(str(path))
    assert "\n" not in str(error.value)


def test_an_unknown_name_says_the_known_ones() -> None:
    with pytest.raises(InputError) as error:
        load_trace("chatt")
    for name in (*NAMES, "azure-conv", "did you mean 'chat'"):
        assert name in str(error.value)


def test_a_run_may_be_longer_than_the_sample() -> None:
    trace = load_trace("burst")
    assert trace.most_requests > len(trace) == 2000
    assert len(build_workload(trace, WorkloadOptions(requests=2500), 0)) == 2500
    assert replace(trace, scenario=None).most_requests == 2000
