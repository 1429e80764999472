"""Bad input to any command: exit code 2 and one line that names it, never a traceback.

Root may write everywhere, so that what cannot be written is a file where a folder is wanted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest

from gimbal.cli import COMMANDS, gimbal, main
from gimbal.commands.options import Real, Whole
from gimbal.core.errors import InputError
from gimbal.records.schema import RequestRecord, RunInfo
from gimbal.records.store import RunWriter

TRACE = '{"arrival_s": %s, "prompt_tokens": 40, "output_tokens": 4}\n'
BINARY = b"\x80\x81PK\x03\x04\xff\xfe\x00\x01" * 40
DEEP = "[" * 100_000
LONG = "1" * 4300
HUGE = "1" + "0" * 54


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line as a shell would, in this process."""

    def invoke(*words: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gimbal", *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), text.out, text.err)

    return invoke


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("gimbal: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good file of every kind, and what no command can use."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(TRACE % (i * 0.02) for i in range(20))
    (tmp_path / "trace.jsonl").write_text(rows)
    monkeypatch.setenv("GIMBAL_DATA", str(tmp_path))  # the trace of `reproduce live`
    (tmp_path / "burstgpt").mkdir()
    rows = "".join(f"{i},40,4\n" for i in range(20))
    text = f"Timestamp,Request tokens,Response tokens\n{rows}"
    (tmp_path / "burstgpt" / "BurstGPT_1.csv").write_text(text)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "routing.npz", counts=np.floor(rng.pareto(1.5, (4, 3, 16)) * 1000))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 300}))
    (tmp_path / "binary").write_bytes(BINARY)
    for ending in ("yaml", "npz", "npy", "pt", "jsonl", "csv", "json"):
        (tmp_path / f"binary.{ending}").write_bytes(BINARY)
        (tmp_path / f"empty.{ending}").write_bytes(b"")
        (tmp_path / f"folder.{ending}").mkdir()
    whole = (tmp_path / "routing.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    return tmp_path


# Numbers of options: (command words, option, value).
SIMULATE = ("simulate", "--trace", "trace.jsonl")
BENCH = ("bench", "--demo", "--trace", "trace.jsonl")
PLACE = ("place", "--routing", "routing.npz", "--ranks", "4")
LIVE = ("reproduce", "live")
PAPER = ("reproduce", "paper")
STATS = ("stats", "routing.npz")
CALIBRATE = ("calibrate", "--demo")
DEMO = ("model", "demo", "--out", "new")
MEASURE = ("model", "stats", "model")

WORKLOAD_NUMBERS = (
    ("--seed", "-1"), ("--seed", HUGE), ("--seed", "1.5"), ("--repeat", "0"), ("--cv", "-1"),
    ("--cv", "nan"), ("--cv", "1e-300"), ("--rate", "0"), ("--rate", "nan"), ("--rate", "inf"),
    ("--rate", "1e400"), ("--requests", "0"), ("--requests", LONG), ("--scale-time", "-1"),
    ("--scale-time", "nan"), ("--scale-length", "0"), ("--scale-length", "1e300"),
    ("--max-prompt", "0"), ("--max-output", "-3"), ("--max-output", HUGE), ("--load", "-1"),
    ("--load", "nan"), ("--load", "x"), ("--trace-block-size", "0"), ("--trace-block-size", HUGE),
)  # fmt: skip
NUMBERS = [
    *((words, *pair) for words in (SIMULATE, BENCH) for pair in WORKLOAD_NUMBERS),
    *((SIMULATE, *pair) for pair in (("--jobs", "-1"), ("--jobs", "0"), ("--slo", "ttft_ms=nan"))),
    *(
        (BENCH, *pair)
        for pair in (
            ("--capacity", "-1"), ("--capacity", "nan"), ("--timeout", "0"), ("--timeout", "nan"),
            ("--duration", "inf"), ("--resident", "0"), ("--warm-up", "-1"), ("--salt", HUGE),
            ("--pin-domains", "-1"), ("--slo", "ttft_ms=1e400"), ("--slo", "e2e_ms=-1"),
        )
    ),
    *(
        (PLACE, *pair)
        for pair in (
            ("--tp", "0"), ("--tp", "-1"), ("--ranks", "0"), ("--ranks", "1000000000"),
            ("--step-tokens", "0"), ("--step-tokens", "-1"), ("--gamma", "1e308"),
            ("--gamma", "nan"), ("--alpha", "-1"), ("--beta", "inf"), ("--time-limit", "-1"),
            ("--time-limit", "nan"), ("--exact-layers", "0"), ("--horizon-steps", "0"),
            ("--slots-per-rank", "0"), ("--slots-per-rank", "17"), ("--max-received", "-1"),
            ("--expert-groups", "0"), ("--ranks-per-node", "0"), ("--first-layer", "-1"),
        )
    ),
    *((STATS, *pair) for pair in (("--ranks", "-1"), ("--ranks", "0"), ("--experts", "-1"),
      ("--timeout", "-1"), ("--timeout", "nan"), ("--timeout", "1e300"))),
    *((CALIBRATE, *pair) for pair in (("--dp", "0"), ("--tp", "-1"), ("--kv-tokens", "-1"),
      ("--span", "nan"), ("--span", "1"), ("--name", "a/b"))),
    *((LIVE, *pair) for pair in (("--capacity", "-1"), ("--capacity", "nan"), ("--loads", "0.9,x"),
      ("--loads", "inf"), ("--repeat", "0"), ("--duration", "-1"), ("--resident", "0"),
      ("--seed", "-1"), ("--max-prompt", "0"), ("--max-output", "x"))),
    *((PAPER, *pair) for pair in (("--jobs", "0"), ("--seeds", "0"), ("--requests", "1"))),
    *((DEMO, *pair) for pair in (("--seed", "-1"), ("--layers", "0"), ("--skew", "nan"),
      ("--experts", HUGE), ("--divergence-bits", "-1"), ("--layers", "100000"),
      ("--hidden", "1048576"), ("--vocab", "1000000000"))),
    *((MEASURE, *pair) for pair in (("--prompts", "0"), ("--seed", "-1"), ("--prompt-tokens", "0"),
      ("--continuation-tokens", "-1"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "option", "value"),
    NUMBERS,
    ids=[f"{words[0]} {option} {value[:20]}" for words, option, value in NUMBERS],
)
@pytest.mark.usefixtures("here")
def test_numbers(run: Run, words: tuple[str, ...], option: str, value: str) -> None:
    outcome = run(*words, option, value)
    refused(outcome)
    names = (option, option[2:].replace("-", "_"), "--ranks-per-source")  # --tp is short for that
    assert any(name in outcome.err for name in names), outcome.err


def options(command: click.Command, path: str = "") -> list[tuple[str, click.Parameter]]:
    """Every option of every command, with the words before it."""
    context = click.Context(command)
    if not isinstance(command, click.Group):
        return [(path, parameter) for parameter in command.get_params(context)]
    found = []
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        found += options(inner, f"{path} {name}".strip())
    return found


OPTIONS = options(gimbal)
RANGED = [(path, option) for path, option in OPTIONS if isinstance(option.type, Whole | Real)]


def test_no_number_of_an_option_is_without_a_range() -> None:
    assert len(RANGED) > 70
    bare = (click.types.IntParamType, click.types.FloatParamType)
    unranged = [(path, p.name) for path, p in OPTIONS if isinstance(p.type, bare)]
    assert unranged == [(path, option.name) for path, option in RANGED]


@pytest.mark.parametrize(
    ("path", "option"), RANGED, ids=[f"{path} {option.opts[0]}" for path, option in RANGED]
)
def test_ranges(path: str, option: click.Parameter) -> None:
    kind = option.type
    assert isinstance(kind, Whole | Real)
    below = [] if kind.min is None else [str(kind.min - 1)]
    for value in ("nan", "inf", "-inf", "1e400", HUGE, LONG, "x", "", *below):
        with pytest.raises(InputError, match=f"^{option.opts[0]} .*: expected a "):
            kind.convert(value, option, None)
    context = click.Context(click.Command(path))
    default = option.get_default(context)
    if isinstance(default, int | float):
        assert kind.convert(default, option, None) == default


FILES = [
    # traces
    *((("simulate", "--trace", f), f) for f in ("absent.csv", "empty.csv", "empty.jsonl",
      "empty.json", "binary.csv", "binary.jsonl", "binary.json", "binary", "folder.csv", "model",
      "x" * 5000)),
    *((("bench", "--demo", "--trace", f), f) for f in ("absent.csv", "binary.jsonl", "model")),
    (("goodput", "--trace", "trace.jsonl"), "--slo: say what"),
    (("goodput", "--trace", "trace.jsonl", "--slo", "ttft_ms=9", "--rate", "2"), "--rate: rates"),
    (("goodput", "--trace", "trace.jsonl", "--slo", "ttft_ms=9", "--loads", "1,1"), "ascending"),
    (("goodput", "--trace", "trace.jsonl", "--slo", "ttft_ms=9", "--loads", "1,x"), "--loads"),
    *(((*words, "--trace-tokenizer", f), f) for words in (SIMULATE, BENCH)
      for f in ("absent", "model", "binary")),
    *(((*words, *option), "Gimbal has no") for words in (SIMULATE, BENCH)
      for option in (("--trace-block-size", "16"), ("--trace-time-unit", "ms"))),
    # clusters, arms, configurations, profiles
    *(((*SIMULATE, "--cluster", f), f) for f in ("absent.yaml", "empty.yaml", "binary.yaml",
      "folder.yaml", "h100x5")),
    *(((*words, option, f), f) for words in (SIMULATE, BENCH)
      for option in ("--arms-file", "--gimbal-config")
      for f in ("absent.yaml", "binary.yaml", "folder.yaml")),
    *(((*SIMULATE, "--arms", names), message) for names, message in (("vllm,vllm", "named twice"),
      ("gimbl", "did you mean 'gimbal'"), ("", "unknown arm"))),
    *(((*PLACE, "--profile", f), f) for f in ("absent.yaml", "empty.yaml", "binary.yaml",
      "folder.yaml", "binary", "h200")),
    *((("config", "--gimbal-config", f), f) for f in ("absent.yaml", "binary.yaml", "folder.yaml")),
    (("config", "--levels", "queu"), "did you mean 'queue'"),
    *((("serve", "--demo", "--dry-run", "--gimbal-config", f), f)
      for f in ("absent.yaml", "binary.yaml", "folder.yaml")),
    (("serve", "--demo", "--dry-run", "--levels", "queu"), "did you mean 'queue'"),
    # recordings and placements
    *((("stats", f), f) for f in ("absent.npz", "truncated.npz", "empty.npz", "binary.npz",
      "binary.npy", "binary.pt", "empty.npy", "empty.pt", "folder.npz", "folder.pt", "binary")),
    *((("place", "--ranks", "4", "--routing", f), f) for f in ("truncated.npz", "empty.npz",
      "binary.npz", "folder.npz", "absent.npz")),
    *(((*PLACE, option, f), f) for option in ("--current", "--next", "--history")
      for f in ("truncated.npz", "binary.npz", "folder.npz")),
    ((*PLACE, "--placer-option", "max_swaps"), "expected key=value"),
    # a recording without what is asked of it
    ((*PLACE, "--current", "routing.npz"), "no array physical_to_logical"),
    # models and records
    *((("bench", "--demo", "--trace", "trace.jsonl", "--model-dir", f), f)
      for f in ("absent", "folder.json", "binary")),
    (("bench", "--trace", "trace.jsonl", "--", "some/model"), "some/model: token ids come from"),
    (("bench", "--trace", "trace.jsonl", "--", "--tp", "2", "--model", "some/model"),
     "some/model: token ids come from a folder: give it by --model-dir"),
    (("reproduce", "live", "--", "some/model"), "some/model: token ids come from"),
    (("calibrate", "--", "some/model"), "some/model: token ids come from"),
    (("calibrate", "--demo", "--model-dir", "model"), "not a MoE model"),
    (("calibrate", "--estimate", "h100", "--model-dir", "absent"), "config.json: no such file"),
    (("calibrate", "--estimate", "h100", "--model-dir", "binary"), "binary"),
    (("calibrate", "--estimate", "h1000", "--model-dir", "model"), "unknown GPU"),
    (("calibrate", "--from-steps", "absent", "--model-dir", "model"), "no steps-N.jsonl"),
    (("calibrate", "--from-steps", "binary", "--model-dir", "model"), "no steps-N.jsonl"),
    (("calibrate",), "give one of"),
    *((("report", f), f) for f in ("absent", "binary", "model")),
    *((("model", "stats", f), f) for f in ("absent", "binary", "model")),
    (("doctor", "--vllm-source", "absent"), "absent: no vLLM sources"),
    (("model", "demo", "--out", "model"), "exists and is not a demo model"),
    (("reproduce", "paper", "--scenarios", "papr"), "unknown scenario"),
    (("reproduce", "live", "--arms", "vllm,vllm"), "named twice"),
    # addresses
    *(((command, url), url) for command in ("stats", "top")
      for url in ("http://[", "http://a:99999", "http://", "http://x y/", "http://a:port",
      "http://..", "https://127.0.0.1:9", "http://127.0.0.1:9", "http://" + "a" * 300)),
    *((("top", url), "expected a server's address") for url in ("localhost:8000", "file:///etc")),
    (("top", "http://127.0.0.1:9", "--interval", "0"), "interval"),
    (("top", "http://127.0.0.1:9", "--timeout", "nan"), "timeout"),
    *((("bench", "--trace", "trace.jsonl", "--model-dir", "model", "--url", url), url)
      for url in ("http://[", "127.0.0.1:9", "http://127.0.0.1:9", "ftp://x", "http://..")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "part"), FILES, ids=[" ".join(w for w in row[0] if len(w) < 99) for row in FILES]
)
@pytest.mark.usefixtures("here")
def test_files(run: Run, words: tuple[str, ...], part: str) -> None:
    refused(run(*words), part[:50])


UNWRITABLE = ("binary/x", "absent/x", "model")
"""Below a file, in no folder, and a folder itself."""
OUTPUTS = [
    *((PLACE, "--out", f) for f in UNWRITABLE),
    *((PLACE, "--plot", f"{f}.png") for f in UNWRITABLE[:2]),
    *((PLACE, "--plot", f) for f in ("plan", "plan.nothing", "folder.png")),
    *((STATS, "--out", f) for f in UNWRITABLE),
    *((BENCH, "--plot-trace", f) for f in ("binary/x.png", "absent/x.png", "plot.xyz")),
    *((("report", "run"), "--out", f) for f in UNWRITABLE),
    *((words, "--out", "binary/run") for words in (SIMULATE, BENCH, LIVE, PAPER)),
    *((words, "--out", "binary") for words in (SIMULATE, BENCH, LIVE, PAPER)),
    *((words, "--out", "run") for words in (SIMULATE, BENCH)),  # holds a run
    *((("model", "demo"), "--out", f) for f in ("binary", "binary/x")),
    *((CALIBRATE, "--out", f) for f in UNWRITABLE),
    *((CALIBRATE, "--keep-steps", f) for f in ("binary", "binary/x")),
    *((CALIBRATE, "--plot", f) for f in ("absent/x.png", "x.nothing")),
    *((("serve", "--dry-run"), "--demo-dir", f) for f in ("binary", "binary/x", "model")),
]


@pytest.mark.parametrize(
    ("words", "option", "target"), OUTPUTS, ids=[f"{w[0]} {o} {f}" for w, o, f in OUTPUTS]
)
def test_outputs(run: Run, here: Path, words: tuple[str, ...], option: str, target: str) -> None:
    if "png" in target:
        (here / "folder.png").mkdir()
    a_run(here / "run")
    refused(run(*words, option, target), target)


def a_run(directory: Path, result: object = None) -> None:
    info = RunInfo("simulate", (), 0, 1, {"name": "t"}, {"vllm": {}}, {}, result=result)  # type: ignore[arg-type]
    with RunWriter(directory, info) as writer:
        writer.write([RequestRecord("a", "vllm", 0, 0.0, 0.0, 3, 2, 2, 0.1, 0.2)])


CLUSTERS = [
    ("dp: -2", "dp: "), ("dp: true", "dp: expected a number, got True"),
    ("dp: 1\ntp: 0", "tp: "), ("dp: 2\nmax_num_seqs: 0", "max_num_seqs: "),
    ("dp: 2\nblock_size: 0", "block_size: "), ("\tdp: 2", "bad.yaml:2: not YAML"),
    ("dp: 2\nmax_num_batched_tokens: 0", "max_num_batched_tokens: "),
    ("dp: 2\nranks_per_node: 0", "ranks_per_node: "),
    ("dp: 2\neplb_step_interval: 0", "eplb_step_interval: "),
    ("dp: 2\nprefill_schedule_interval: 0", "prefill_schedule_interval: "),
    ("dp: 2\nstats_interval_ms: -1", "stats_interval_ms: "),
    ("dp: 2\nslots_per_rank: -1", "slots_per_rank: "),
    ("dp: 2\nslots_per_rank: 15", "30 slots (2 ranks x 15) cannot hold 32 experts"),
    ("dp: 2\nslots_per_rank: 33", "33 slots per rank but only 32 experts"),
    ("dp: 2\nkv_tokens: 43", "request 0 needs 44 tokens of KV cache, one engine of bad has 32"),
    ("dp: 2\nkv_tokens: 63\nblock_size: 64", "has 0 in blocks of 64; cut lengths or raise kv_tok"),
    ("dp: 2\nrouting: nope", "unknown routing 'nope'"),
]  # fmt: skip
CONTENTS = [
    ("simulate --trace bad.csv", "num_prefill_tokens,num_decode_tokens\nnan,3\n",
     ":2: num_prefill"),
    ("simulate --trace bad.csv", "Timestamp,Request tokens,Response tokens\nnan,3,3\n",
     "bad.csv:2: Timestamp='nan'"),
    ("simulate --trace bad.csv", "Timestamp,Request tokens,Response tokens\n-1,3,3\n",
     "bad.csv:2: Timestamp='-1'"),
    ("simulate --trace bad.csv", "Timestamp,Request tokens,Response tokens\n1e400,3,3\n",
     "bad.csv:2: Timestamp='1e400'"),
    ("simulate --trace bad.csv", f"Timestamp,Request tokens,Response tokens\n1,{HUGE},3\n",
     "bad.csv:2: Request tokens="),
    ("simulate --trace bad.csv", f"Timestamp,Request tokens,Response tokens\n1,{LONG},3\n",
     "bad.csv:2: Request tokens="),
    ("simulate --trace bad.csv", f"Timestamp,Request tokens,Response tokens\n1,{'x' * 200_000},3\n",
     "bad.csv:2: not CSV: field larger than field limit"),
    ("simulate --trace bad.csv", "Timestamp,Request tokens,Respons\n1,3,3\n",
     "unknown trace format"),
    ("simulate --trace bad.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n\0,1,1\n",
     ":2: a null byte"),
    ("simulate --trace bad.jsonl", '{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}',
     "bad.jsonl:1: arrival_s=NaN"),
    ("simulate --trace bad.jsonl", '{"arrival_s": 1e400, "prompt_tokens": 1, "output_tokens": 1}',
     "bad.jsonl:1: arrival_s=1e400"),
    ("simulate --trace bad.jsonl", f'{{"arrival_s": {LONG}}}', "bad.jsonl:1: arrival_s=111"),
    ("simulate --trace bad.jsonl", f'{{"arrival_s": 1, "prompt_tokens": {HUGE}}}',
     "bad.jsonl:1: prompt_tokens=1000"),
    ("simulate --trace bad.jsonl", '{"arrival_s": ' + DEEP, "bad.jsonl:1: nested deeper"),
    ("simulate --trace bad.json", DEEP, "bad.json:1: nested deeper"),
    ("simulate --trace bad.json", '{"data": [{"input_length": 1e99, "output_length": 1}]}',
     "bad.json:1: input_length=1e+99"),
    ("simulate --trace trace.jsonl --cluster bad.yaml", "dp: 0\nprofile: cpu-demo\n", "dp: "),
    ("simulate --trace trace.jsonl --cluster bad.yaml", "dp: 2\ndp: 2\nprofile: cpu-demo\n",
     "cluster bad.yaml:2: not YAML (key 'dp' is given twice"),
    ("simulate --trace trace.jsonl --cluster bad.yaml", "{dp: 2, profile: cpu-demo, 3: 4}",
     "bad.yaml"),
    ("simulate --trace trace.jsonl --cluster bad.yaml", "dp: 2\nprofile: bad.yaml\n", "bad.yaml"),
    ("simulate --trace trace.jsonl --cluster bad.yaml",
     "dp: 2\nprofile: cpu-demo\nblock_size: .inf",
     "bad.yaml:3: not YAML"),
    ("simulate --trace trace.jsonl --cluster bad.yaml", "dp: 3\ntp: 2\nprofile: cpu-demo\n",
     "32 experts do not divide over 6 ranks"),
    *(("simulate --trace trace.jsonl --cluster bad.yaml", f"profile: cpu-demo\n{line}\n", part)
      for line, part in CLUSTERS),
    ("simulate --trace trace.jsonl --arms-file bad.yaml", "a: {}\nb: {}\na: {}\n",
     "bad.yaml:3: not YAML (key 'a' is given twice"),
    ("simulate --trace trace.jsonl --arms-file bad.yaml", "a: {levels: [queue], levels: []}",
     "twice"),
    ("config --gimbal-config bad.yaml", "admin: true\nadmin: false\n", "bad.yaml:2: not YAML (key"),
    ("config --gimbal-config bad.yaml", "queue: {max_wait_s: .inf}\n", "bad.yaml:1: not YAML"),
    ("config --gimbal-config bad.yaml", "queue: {pass_steps: 1" + "0" * 25 + "}\n", "bad.yaml:1:"),
    ("config --gimbal-config bad.yaml", "placement: {gamma: 1e308}\n", "placement.gamma"),
    ("config --gimbal-config bad.yaml", "queue: {max_wait_s: true}\n",
     "queue.max_wait_s: expected a number, got True"),
    ("config --gimbal-config bad.yaml", "1: 2\n", "bad.yaml"),
    ("config --gimbal-config bad.yaml", "queue: {session_patience: 3, options: 4}\n", "bad.yaml"),
    ("config --gimbal-config bad.yaml", "dispatch: {session_patience: 3, options: 4}\n",
     "bad.yaml"),
    ("place --routing routing.npz --ranks 4 --profile bad.yaml", "name: a\nname: b\n",
     "given twice"),
    ("place --routing routing.npz --ranks 4 --profile bad.yaml", "moe: {norm: 0}\n",
     "profile bad.yaml"),
    ("calibrate --estimate h100 --model-dir .", None, "config.json: "),
    ("calibrate --from-steps . --model-dir model", '{"time_s": NaN}',
     "steps-0.jsonl:1: time_s=NaN"),
    ("calibrate --from-steps . --model-dir model", '{"time_s": 1}', "steps-0.jsonl:1: engine: "),
    ("calibrate --from-steps . --model-dir model", "", "model/config.json: none of num_experts"),
    ("report .", None, "run.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "text", "part"), CONTENTS, ids=[f"{row[0]} {row[2]}"[:90] for row in CONTENTS]
)
def test_contents(run: Run, here: Path, line: str, text: str | None, part: str) -> None:
    for name in ("bad.csv", "bad.jsonl", "bad.json", "bad.yaml", "steps-0.jsonl"):
        (here / name).write_text(text or "")
    for name in ("run.json", "config.json"):
        (here / name).write_text(text or '{"a": ' + LONG + "}")
    refused(run(*line.split()), part)


RECORDINGS = [
    (np.array([[[1.0, np.nan]]]), "counts[0, 0, 1]: not finite (nan)"),
    (np.array([[[1.0, -3.0]]]), "counts[0, 0, 1]: negative (-3)"),
    (np.array([[[np.inf, 1.0]]]), "counts[0, 0, 0]: not finite (inf)"),
    (np.array([[[1e300, 1.0]]]), "1e+300 for one expert"),
    (np.array([[["a", "b"]]]), "counts: expected numbers"),
    (np.array([[[1j, 2]]]), "counts: expected numbers"),
    (np.zeros((0, 1, 2)), "counts: empty array"),
    (np.zeros((2, 2)), "expected [source, layer, expert]"),
]


@pytest.mark.parametrize(("counts", "message"), RECORDINGS, ids=[row[1] for row in RECORDINGS])
@pytest.mark.parametrize("command", ["stats bad.npz", "place --ranks 2 --routing bad.npz"])
def test_counts(run: Run, here: Path, command: str, counts: np.ndarray, message: str) -> None:
    np.savez(here / "bad.npz", counts=counts)
    refused(run(*command.split()), "bad.npz", message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps=0"),
        ("steps", np.nan, "steps=nan"),
        ("steps", [1, 2], "steps=[1, 2]"),
        ("metadata", "{", "metadata:1: not JSON"),
        ("metadata", "[]", "metadata: expected a JSON object"),
        ("metadata", '{"ranks": -1}', "metadata.ranks=-1"),
        ("metadata", '{"ranks": NaN}', "metadata: ranks=NaN"),
        ("active", np.ones((1, 1, 2)), "active: shape"),
        ("decode", np.full((2, 1, 4), np.nan), "decode[0, 0, 0]: not finite"),
        ("physical_to_logical", [[0, 1, 2, 9]], "physical_to_logical: expected experts"),
        ("physical_to_logical", [0, 1, 2, 3], "physical_to_logical: expected experts"),
    ],
)
def test_recordings(run: Run, here: Path, field: str, value: object, message: str) -> None:
    np.savez(here / "bad.npz", counts=np.ones((2, 1, 4)), **{field: np.asarray(value)})
    refused(run("stats", "bad.npz"), f"bad.npz: {message}")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "the run has no result"),
        ({}, "run.json: result: arms: field required"),
        ({"arms": {"vllm": {}}, "ratios": {}}, "result: arms.vllm.ttft_ms: field required"),
        ({"arms": [], "ratios": {}}, "result: arms: input should be a valid dictionary"),
    ],
)
def test_results(run: Run, here: Path, result: object, message: str) -> None:
    a_run(here / "run", result)
    refused(run("report", "run"), message)


@pytest.mark.usefixtures("here")
def test_a_server_that_does_not_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(self: object, spec: object) -> None:
        raise RuntimeError("the server ended with code 3:\nits log")

    monkeypatch.setattr("gimbal.bench.servers.ServerPool.get", get)
    for words in (CALIBRATE, BENCH, LIVE):
        outcome = run(*words)
        assert outcome.code == 1
        assert outcome.err.endswith("Error: the server ended with code 3:\nits log\n")
        assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("here")
def test_what_no_reader_foresaw(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(file: Path) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("gimbal.commands.config.read_config_file", fails)
    outcome = run("config", "--gimbal-config", "trace.jsonl")
    assert (outcome.code, outcome.err) == (1, "gimbal: trace.jsonl: No space left on device\n")


def test_every_command_is_here() -> None:
    rows = [
        *(row[0] for row in (*NUMBERS, *FILES, *OUTPUTS)),
        *(row[0].split() for row in CONTENTS),
    ]
    assert {words[0] for words in rows} == set(COMMANDS)


@pytest.mark.usefixtures("here")
def test_usage_errors_are_click_s(run: Run) -> None:
    for words in (
        ("place",),
        ("nonsense",),
        ("config", "-x"),
    ):
        outcome = run(*words)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert outcome.err.startswith("Usage: gimbal")
