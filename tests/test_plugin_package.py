"""Somebody else's package of policies, installed and used through the command line.

The package is `examples/policies`, which docs/writing-a-policy.md shows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "policies"
PAGE = ROOT / "docs" / "writing-a-policy.md"
HAS_VLLM = importlib.util.find_spec("vllm") is not None

CONFIG = {
    "dispatch": {"policy": "fewest-tokens"},
    "queue": {"ordering": "aged-shortest", "options": {"tokens_per_s": 300.0}},
    "placement": {"placer": "one-swap"},
}
BROKEN = """
from dataclasses import dataclass


class Good:
    def costs(self, *shown):
        raise RuntimeError("no idea")

    key = place = costs


class NoMethod:
    pass


class Raises(Good):
    def __init__(self):
        raise RuntimeError("no\\nlicence")


@dataclass(frozen=True)
class Options:
    weight: float = 1.0


class Weighted(Good):
    Options = Options

    def __init__(self, options):
        pass
"""


@dataclass(frozen=True)
class Site:
    """A folder of installed packages, and a working directory."""

    packages: Path
    folder: Path

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """``python WORDS`` with the packages on its path, as anybody would have them."""
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(self.packages))))
        return subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path},
        )

    def gimbal(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "gimbal.cli", *words)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package, built and installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "policies"
    shutil.copytree(EXAMPLE, source)  # a build leaves files beside what it builds
    target = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run([*pip, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (target / "broken_policies.py").write_text(BROKEN)
    broken = target / "broken_policies-0.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-policies\nVersion: 0.1\n")
    groups = ("gimbal.dispatch", "gimbal.ordering", "gimbal.placer")
    points = "".join(f"[{group}]\nlost = nowhere.to.be:Found\n" for group in groups)
    (broken / "entry_points.txt").write_text(points)
    return target


@pytest.fixture
def site(packages: Path, tmp_path: Path) -> Site:
    return Site(packages, tmp_path)


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "counts.npz"
    np.savez(path, counts=np.floor(rng.pareto(1.5, (2, 3, 16)) * 1000))
    return path


def answered(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def fences(text: str, *languages: str) -> set[str]:
    """The fenced blocks of these languages."""
    return {
        code for name, code in re.findall(r"```(\w+)\n(.*?)```", text, re.S) if name in languages
    }


def test_the_page_shows_the_package() -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = [p for p in EXAMPLE.rglob("*.py") if p.name != "__init__.py"]
    assert fences(text, "python") == {p.read_text(encoding="utf-8") for p in files}
    others = {
        (EXAMPLE / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "arms.yaml")
    }
    assert others <= fences(text, "toml", "yaml")


def test_a_policy_is_at_most_twenty_lines() -> None:
    for path in (EXAMPLE / "gimbal_example_policies").glob("*.py"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        assert len(lines) <= 20, f"{path.name}: {len(lines)} lines"


@pytest.mark.slow
def test_its_own_tests_pass(site: Site) -> None:
    answered(site.run("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "test_policies.py"))


@pytest.mark.slow
def test_config_knows_its_names_and_options(site: Site) -> None:
    file = site.write("mine.yaml", json.dumps(CONFIG))
    text = answered(site.gimbal("config", "--gimbal-config", file))
    assert "policy: fewest-tokens" in text
    assert "prompt tokens that one second of waiting is worth (default 500.0)" in text
    assert "tokens_per_s: 300.0" in text
    again = site.write("again.yaml", text)
    assert answered(site.gimbal("config", "--gimbal-config", again)) == text


@pytest.mark.slow
def test_the_page_s_configuration_is_good(site: Site) -> None:
    (mine,) = (c for c in fences(PAGE.read_text(encoding="utf-8"), "yaml") if "dispatch:" in c)
    file = site.write("mine.yaml", mine)
    found = json.loads(answered(site.gimbal("config", "--json", "--gimbal-config", file)))
    for section, chosen in CONFIG.items():
        assert {key: found[section][key] for key in chosen} == chosen


@pytest.mark.slow
def test_the_simulator_runs_it_as_an_arm(site: Site) -> None:
    rows = [
        {"arrival_s": 0.02 * i, "prompt_tokens": 40 + 37 * i % 700, "output_tokens": 8}
        for i in range(60)
    ]
    trace = site.write("trace.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ("simulate", "--trace", trace, "--requests", 60, "--cluster", "cpu-demo", "--jobs", 1)
    text = answered(site.gimbal(*words, "--arms-file", EXAMPLE / "arms.yaml", "--json"))
    arms = json.loads(text)["arms"]
    assert {name: arm["completed"] for name, arm in arms.items()} == {"vllm": 60, "example": 60}
    assert arms["example"]["ttft_ms"] != arms["vllm"]["ttft_ms"]


@pytest.mark.slow
def test_place_asks_it(site: Site, counts: Path) -> None:
    words = ("place", "--routing", counts, "--ranks", 2, "--json", "--placer")
    report = json.loads(answered(site.gimbal(*words, "one-swap")))
    assert report["moved_slots"] == 2 * 3
    assert report["balance"]["planned"] > report["balance"]["before"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_serve_takes_all_three(site: Site) -> None:
    extra = json.dumps({"gimbal": CONFIG})
    words = ("serve", "--demo", "--dry-run", "--uds", "unused", "--additional-config", extra)
    text = answered(site.gimbal(*words))
    for name in ("fewest-tokens", "aged-shortest", "one-swap"):
        assert f'"{name}"' in text


@pytest.mark.slow
def test_a_module_in_the_current_directory_is_found(site: Site, counts: Path) -> None:
    shutil.copy(EXAMPLE / "gimbal_example_policies" / "one_swap.py", site.folder / "beside.py")
    words = ("place", "--routing", counts, "--ranks", 2, "--json", "--placer")
    script = "from gimbal.cli import main; main()"  # as the installed command starts
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, words), "beside:OneSwap"],
        capture_output=True, text=True, cwd=site.folder,
    )  # fmt: skip
    assert json.loads(answered(done))["moved_slots"] == 6


FAULTS = [
    ("nowhere:Policy", {}, "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("broken_policies:Absent", {}, "cannot be imported: AttributeError"),
    ("lost", {}, "'lost' cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("broken_policies:NoMethod", {}, "has no method "),
    ("broken_policies:Raises", {}, "cannot be made: RuntimeError: no licence"),
    ("broken_policies:Weighted", {"wait": 1}, "unknown option 'wait' (did you mean 'weight'?)"),
    ("broken_policies:Good", {"wait": 1}, "unknown option 'wait' ('broken_policies:Good' has no"),
]


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gimbal: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "message"), FAULTS)
def test_what_is_no_policy_is_refused_in_one_line(
    site: Site, counts: Path, name: str, options: dict[str, int], message: str
) -> None:
    section = {"dispatch": {"policy": name, "options": options}}
    config = site.write("mine.yaml", json.dumps(section))
    refused(site.gimbal("config", "--gimbal-config", config), message)
    arm = {"arm": {"levels": ["dispatch"], "policy": name, "policy_options": options}}
    arms = ("--arms", "arm", "--arms-file", site.write("arms.yaml", json.dumps(arm)))
    refused(site.gimbal("simulate", "--requests", 60, *arms), message)
    given = [
        word for option in options.items() for word in ("--placer-option", "{}={}".format(*option))
    ]
    place = ("place", "--routing", counts, "--ranks", 2, "--placer", name)
    refused(site.gimbal(*place, *given), message)
    if HAS_VLLM:
        extra = json.dumps({"gimbal": section})
        serve = ("serve", "--demo", "--dry-run", "--uds", "unused", "--additional-config", extra)
        refused(site.gimbal(*serve), message)


@pytest.mark.slow
def test_one_that_fails_at_work_is_named(site: Site, counts: Path) -> None:
    name = "broken_policies:Good"
    arm = {"arm": {"levels": ["dispatch"], "policy": name}}
    arms = ("--arms", "arm", "--arms-file", site.write("arms.yaml", json.dumps(arm)))
    row = json.dumps({"arrival_s": 0.0, "prompt_tokens": 10, "output_tokens": 2})
    trace = ("--trace", site.write("trace.jsonl", f"{row}\n" * 3))
    words = ("simulate", "--cluster", "cpu-demo", "--jobs", 1, *trace, *arms)
    refused(site.gimbal(*words), f"dispatch policy '{name}': RuntimeError: no idea")
    place = ("place", "--routing", counts, "--ranks", 2, "--placer", name)
    refused(site.gimbal(*place), f"placer '{name}': RuntimeError: no idea")
