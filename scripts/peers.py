"""vLLM's own tests of scheduler, KV cache and expert placement: with plain vLLM, then with Gimbal.

    make peers                                     # fetch, run all, write docs/peers.md
    make peers ARGS='--only test_scheduler'        # part of it, page left alone
    make peers ARGS='--sdist vllm-0.32.0.tar.gz'   # a source distribution that is there already

Not part of CI: it needs vLLM's source distribution (45 MB) and a quarter of an hour. The tests are
unpacked below ``.gimbal/peers`` and never committed. `peers_swap` puts Gimbal in.

A test that ends otherwise with Gimbal must stand in `MEANT`, with the reason; an entry that no test
needs any more fails as well. Models are stand-ins, a configuration without weights: tests of a
model that has none here fail in every run and say nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".gimbal" / "peers"
PAGE = ROOT / "docs" / "peers.md"
BUILD_NEEDS = (
    "setuptools>=77",
    "setuptools-scm",
    "setuptools-rust",
    "wheel",
    "packaging",
    "jinja2",
)
"""What vLLM's setup.py wants before it tells its version; torch is installed."""
TEST_NEEDS = ("tblib",)
FILES = (
    "v1/core/test_*.py",
    "v1/streaming_input/test_scheduler_streaming.py",
    "v1/kv_connector/unit/test_remote_prefill_lifecycle.py",
    "v1/kv_connector/unit/test_remote_decode_lifecycle.py",
    "v1/kv_connector/unit/test_kv_load_failure_recovery.py",
    "v1/kv_connector/unit/test_invalid_blocks_correctness.py",
    "v1/kv_connector/unit/test_cache_pollution_prevention.py",
    "v1/kv_connector/unit/test_error_propagation.py",
    "distributed/test_eplb_algo.py",
)
WEIGHTS = ("test_scheduler_e2e.py", "test_reset_prefix_cache_e2e.py")
"""Files that load a model's weights."""
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "torch_dtype": "float16",
}
STAND_INS = {
    "facebook/opt-125m": OPT,
    "facebook/opt-350m": OPT,
    "Qwen/Qwen1.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
        "torch_dtype": "bfloat16",
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "torch_dtype": "bfloat16",
    },
}
PLAIN, DEFAULT, FCFS = "plain vLLM", "with Gimbal", "with Gimbal, ordering fcfs"
ARMS = {PLAIN: "", DEFAULT: "{}", FCFS: '{"queue": {"ordering": "fcfs"}}'}
"""Name of a run -> Gimbal's configuration, as JSON; empty where nothing is swapped."""

_ORDER = "two prompts wait, and the shorter one goes first"
_ARRIVAL = (
    "the order's clock runs from when the engine queued a request, vLLM's from the time of arrival "
    "that the front end wrote on it; ordering fcfs goes by the latter"
)
_ALWAYS = {
    "test_eplb_algo::test_basic_rebalance": "expects the very map of DeepSeek's algorithm; "
    "Gimbal's is another one, made from the map in force",
    "test_eplb_algo::test_parameter_validation": "slots that do not divide among ranks are refused "
    "as well, by InputError where vLLM raises AssertionError",
    "test_scheduler::test_scheduler_reset_prefix_cache": "indexes the waiting queue like a deque; "
    "vLLM's RequestQueue promises no index, and its own priority queue has none. Iterated, it has "
    "the order that the test expects",
}
MEANT: dict[str, dict[str, str]] = {
    DEFAULT: _ALWAYS
    | {
        "test_scheduler::test_schedule_order": "a prompt that fits into the step goes before "
        "those that do not",
        "test_scheduler::test_fcfs_mixed_blocked_types_remote_load_drains_first": _ORDER,
        "test_scheduler::test_async_load_reservation_prevents_wedge_e2e": f"{_ORDER}: its load is "
        "the one that is admitted, the other's the one that vLLM's reservation holds back",
        "test_scheduler::test_priority_scheduling_arrival_time_tiebreaker": _ARRIVAL,
        "test_scheduler::test_priority_scheduling_mixed_priority_and_arrival": _ARRIVAL,
        "test_scheduler::test_priority_scheduling_equal_priority_preemption": _ARRIVAL,
        "test_scheduler::test_priority_scheduling_fcfs_fallback": _ARRIVAL,
    },
    FCFS: _ALWAYS,
}
"""Run -> module::test -> why it ends otherwise. All parameters of a test count as one."""


def fetched(version: str) -> Path:
    """The source distribution of `version`, from the package index.

    pip hands over a source distribution only after it has asked it for its metadata, so what that
    takes goes into a folder of its own.
    """
    needs = WORK / "needs"
    install("--upgrade", "--target", str(needs), *BUILD_NEEDS)
    environment = {
        "PYTHONPATH": str(needs),
        "VLLM_TARGET_DEVICE": "empty",
        "VLLM_VERSION_OVERRIDE": version,
    }
    words = ["download", "--no-deps", "--no-binary", "vllm", "--no-build-isolation"]
    pip([*words, "--dest", str(WORK), f"vllm=={version}"], environment)
    return WORK / f"vllm-{version}.tar.gz"


def install(*words: str) -> None:
    pip(["install", "--quiet", "--no-warn-conflicts", *words], {})


def pip(words: list[str], environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"]
    subprocess.run(command, check=True, env=os.environ | dict(environment))


def unpacked(sdist: Path, version: str) -> Path:
    """The folder that holds vLLM's ``tests`` package, and nothing else of vLLM."""
    folder = WORK / version
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, _, rest = member.name.partition("/")
            if rest == "pyproject.toml" or rest.startswith("tests/"):
                archive.extract(member.replace(name=rest), folder, filter="data")
    return folder


def stand_in_models() -> Path:
    """A cache of the model hub with configurations, and the demo model's tokenizer."""
    from gimbal.vllm_plugin.serve.plan import demo_model

    home, tokenizer = WORK / "models", demo_model()
    for name, config in STAND_INS.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "stand-in"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("stand-in", encoding="utf-8")
        (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / file, snapshot / file)
    return home


def run(arm: str, folder: Path, home: Path, only: str, workers: int) -> dict[str, str]:
    """Outcome of each test in run `arm`, by its name."""
    names = sorted({path for pattern in FILES for path in (folder / "tests").glob(pattern)})
    names = [path for path in names if path.name not in WEIGHTS and only in path.name]
    stem = re.sub(r"\W+", "-", arm)
    result = WORK / f"{stem}.xml"
    paths = (WORK / "needs", ROOT, ROOT / "scripts")
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "GIMBAL_PEERS": ARMS[arm],
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "peers_swap"]
    command += ["-n", str(workers), "--timeout", "120", "--tb", "short", f"--junitxml={result}"]
    files = [str(path.relative_to(folder)) for path in names]
    with (WORK / f"{stem}.log").open("w", encoding="utf-8") as log:
        print(f"peers: {arm}, {len(files)} files, log in {log.name}", flush=True)
        subprocess.run(
            [*command, *files], cwd=folder, env=os.environ | environment, stdout=log, stderr=log
        )
    return outcomes(result)


def outcomes(junit: Path) -> dict[str, str]:
    """``module::test[parameters]`` -> ``passed``, ``failed`` or ``skipped``."""
    found = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        module = case.get("classname", "").removeprefix("tests.").rpartition(".")[2]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        found[f"{module}::{case.get('name')}"] = "skipped" if "skipped" in kinds else outcome
    return found


def differences(plain: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Name of each test that ends otherwise -> both outcomes."""
    names = {*plain, *ours}
    pairs = {name: (plain.get(name, "absent"), ours.get(name, "absent")) for name in names}
    return {name: pair for name, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def complaints(differing: Iterable[str], meant: Mapping[str, str], whole: bool = True) -> list[str]:
    """Differences without a reason and, where all tests were run, reasons without a difference."""
    seen = {name.partition("[")[0] for name in differing}
    unexplained = [f"{name}: differs, and nobody says why" for name in sorted(seen - {*meant})]
    stale = [f"{name}: is listed as meant, and does not differ" for name in meant if whole]
    return unexplained + [text for text in stale if text.partition(": ")[0] not in seen]


def by_chance(runs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Tests that plain vLLM failed and Gimbal passed: they ran out of time, or draw lots."""
    failed = (name for name, outcome in runs[PLAIN].items() if outcome == "failed")
    return [name for name in failed if any(runs[arm].get(name) == "passed" for arm in MEANT)]


def page(version: str, runs: Mapping[str, Mapping[str, str]]) -> str:
    """docs/peers.md; `runs` are the outcomes by name of the run."""
    text = (
        "vLLM's tests of scheduler, KV cache manager, block pool and EPLB policy, run with plain "
        "vLLM and with Gimbal's scheduler and placer in their place (`make peers`, which writes "
        f"this page). vLLM {version}, {datetime.date.today():%Y-%m-%d}. A test that fails in every "
        "run says nothing: it asks for a model that has no stand-in, or for hardware."
    )
    lines = ["# vLLM's own tests", "", textwrap.fill(text, 100), ""]
    lines += ["| run | passed | failed | skipped |", "|---|---|---|---|"]
    for name, outcome in runs.items():
        count = Counter(outcome.values())
        lines.append(f"| {name} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    if luckless := by_chance(runs):
        lines += ["", "| failed by chance with plain vLLM, and passed in another run |", "|---|"]
        lines += [f"| `{name}` |" for name in luckless]
    for name, meant in MEANT.items():
        lines += ["", f"## {name}", "", "Every test that ends otherwise, and why that is meant:"]
        lines += ["", "| test | why |", "|---|---|"]
        lines += [f"| `{test}` | {why} |" for test, why in sorted(meant.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    from gimbal.vllm_plugin.serve.checks import installed_vllm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="source distribution of the installed vLLM")
    parser.add_argument("--only", default="", help="part of a file's name; the page is left alone")
    parser.add_argument("--workers", type=int, default=2, help="test processes (default: 2)")
    arguments = parser.parse_args()
    version = installed_vllm().version.partition("+")[0]
    WORK.mkdir(parents=True, exist_ok=True)
    install("--target", str(WORK / "needs"), "--upgrade", *TEST_NEEDS)
    folder = unpacked(arguments.sdist or fetched(version), version)
    home = stand_in_models()
    runs = {arm: run(arm, folder, home, arguments.only, arguments.workers) for arm in ARMS}
    wrong = []
    for arm, meant in MEANT.items():
        found = differences(runs[PLAIN], runs[arm])
        for name, (before, after) in found.items():
            print(f"peers: {name}: {before} with plain vLLM, {after} {arm}")
        lost = [name for name in found if name not in by_chance(runs)]
        wrong += [f"peers: {arm}: {t}" for t in complaints(lost, meant, not arguments.only)]
    if not arguments.only:
        PAGE.write_text(page(version, runs), encoding="utf-8")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
