"""``python -m tests.live.chaos``: see the package."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.live.chaos.faults import Fault, faults
from tests.live.chaos.run import run
from tests.live.chaos.server import StartFailed
from tests.live.chaos.table import Row, as_json, render

OWN_SHARED_MEMORY = "GIMBAL_CHAOS_OWN_SHM"
SHARED_MEMORY_SIZE = "3g"
_MOUNT = 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"'


def with_own_shared_memory(arguments: Sequence[str]) -> None:
    """Runs this command again in a /dev/shm of its own, where the system lets it.

    Then it can be filled without harm to others, and whatever is left in it is the server's.
    """
    wrap = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT]
    if OWN_SHARED_MEMORY in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        tried = subprocess.run([*wrap, "64m", "true"], capture_output=True, check=False)
    except OSError:
        return
    if tried.returncode == 0:
        os.environ[OWN_SHARED_MEMORY] = "1"
        again = [sys.executable, "-m", "tests.live.chaos", *arguments]
        os.execvp(wrap[0], [*wrap, SHARED_MEMORY_SIZE, *again])


def chosen(every: Sequence[Fault], quick: bool, words: Sequence[str]) -> list[Fault]:
    """Those whose name contains one of `words`, all without any; `quick`: that share a server."""
    return [
        fault
        for fault in every
        if (fault.shares_a_server or not quick)
        and (not words or any(word in fault.name for word in words))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m tests.live.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="faults that share one server")
    parser.add_argument("--fault", action="append", default=[], help="only those named like this")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    with_own_shared_memory(arguments)
    # The default action of SIGTERM would end this process and leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="gimbal-chaos-"))
    (folder / "not-a-folder").write_text("a file\n")
    wanted = chosen(faults(str(folder / "not-a-folder")), options.quick, options.fault)
    if not wanted:
        parser.error(f"no fault is named like {options.fault}")
    print(f"{len(wanted)} faults, logs in {folder}", flush=True)
    began = time.monotonic()

    def say(row: Row) -> None:
        print(f"{'ok  ' if row.ok else 'FAIL'} {row.fault}", flush=True)

    try:
        rows = run(wanted, folder, say)
    except StartFailed as error:
        print(f"no server to put through it: {error}", file=sys.stderr)
        return 1
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(render(rows))
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=1))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
