"""A second host on this machine: a network and a /dev/shm of its own, and one link to it.

Everything it is made of goes with the process that holds it, however the tests end.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

FIRST, SECOND = "198.18.77.1", "198.18.77.2"
"""Addresses of this machine and of the second host, in a net set aside for tests (RFC 2544)."""
NEAR, FAR = "gimbal-near", "gimbal-far"
"""The two ends of the link."""
_HOLD = "mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo made && exec sleep infinity"


@dataclass(frozen=True)
class SecondHost:
    """A running one; process `pid` holds its namespaces."""

    pid: int

    def command(self, *words: str) -> list[str]:
        """`words`, to be run there, in the folder of this process."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-w", *words]

    def run(self, *words: str) -> str:
        """What `words` print there. Raises OSError."""
        return _run(*self.command(*words))

    def link(self, state: str) -> None:
        """Takes the link ``down`` at the second host's end, or ``up`` again."""
        self.run("ip", "link", "set", FAR, state)


@contextlib.contextmanager
def second_host() -> Iterator[SecondHost]:
    """Makes one and takes it away again. Raises OSError saying why it cannot."""
    # The kernel ends the holder with this process.
    hold = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "sh", "-c", _HOLD]
    holder = subprocess.Popen(hold, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "made\n":
            raise OSError(holder.stderr.read().strip())
        host = SecondHost(holder.pid)
        _run("ip", "link", "add", NEAR, "type", "veth", "peer", FAR, "netns", str(host.pid))
        _run("ip", "address", "add", f"{FIRST}/30", "dev", NEAR)
        _run("ip", "link", "set", NEAR, "up")
        host.run("ip", "address", "add", f"{SECOND}/30", "dev", FAR)
        host.link("up")
        _check(host)
        yield host
    finally:
        # Without waiting for the kernel, which takes both ends away with the last process there.
        with contextlib.suppress(OSError):
            _run("ip", "link", "delete", NEAR)
        holder.kill()
        holder.communicate()


def _check(host: SecondHost) -> None:
    """Raises OSError unless it reaches this machine: a firewall may stand between."""
    with socket.create_server((FIRST, 0)) as listener:
        address = listener.getsockname()
        host.run(sys.executable, "-c", f"import socket; socket.create_connection({address}, 5)")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
