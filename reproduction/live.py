"""The paper's ablation on live servers: one run directory per load, continued where it stopped.

Arms that place experts get a server of their own, since they leave experts where they moved them;
the others share one. Arms whose servers are alive at once take turns, in Williams order. With fewer
servers alive than the matrix has, all loads and repeats of a server are measured before the next
one is started.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gimbal.bench.arms import ServerSpec, server_spec
from gimbal.bench.endpoint import Endpoint
from gimbal.bench.run import TurnProgress
from gimbal.bench.servers import ServerPool
from gimbal.bench.session import BenchOptions, BenchSession
from gimbal.bench.turns import Turn
from gimbal.core.files import structured, write_text
from gimbal.core.json_text import read_json, to_json
from gimbal.core.numbers import real
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RequestRecord, RunInfo
from gimbal.records.store import FILES, RUN_FILE, RunReader, RunWriter, read_records
from gimbal.report.arms import Arm
from gimbal.report.arms_file import select_arms
from gimbal.report.compare import turns
from gimbal.workloads.prompts import Vocabulary

ARMS = ("vllm-legacy", "vllm", "gimbal-dp", "gimbal-ep", "gimbal-no-feedback", "gimbal")
CAPACITY_FILE = "capacity.json"


@dataclass(frozen=True)
class LiveMatrix:
    """What is measured: `options` at every one of `loads`; its own load is replaced."""

    options: BenchOptions
    loads: tuple[float, ...] = (0.9,)
    arms: tuple[str, ...] = ARMS

    def specs(self) -> dict[ServerSpec, list[Arm]]:
        """Arms by the server they run on."""
        groups: dict[ServerSpec, list[Arm]] = {}
        for arm in select_arms(self.arms):
            groups.setdefault(server_spec(arm, "placement" not in arm.levels), []).append(arm)
        return groups


class LiveRun:
    """Measures what is missing in `directory` and leaves one finished run per load.

    Args:
        matrix: what is measured.
        directory: of this reproduction.
        pool: starts the servers.
        vocabulary_of: what prompts are made of, for an endpoint.
        info: of each run; load, turns and result are filled in.
        say: gets one line per event worth telling.
        progress: shows how far a turn is.
    """

    def __init__(
        self,
        matrix: LiveMatrix,
        directory: Path,
        pool: ServerPool,
        vocabulary_of: Callable[[Endpoint], Vocabulary],
        info: RunInfo,
        say: Callable[[str], None] = lambda _: None,
        progress: TurnProgress | None = None,
    ) -> None:
        self._matrix, self._directory, self._pool = matrix, directory, pool
        self._vocabulary_of, self._info = vocabulary_of, info
        self._say, self._progress = say, progress

    def run(self) -> list[Path]:
        """Returns the run directories. Stopped by an exception, finished turns stay."""
        paths = [self.path(load) for load in self._matrix.loads]
        with ExitStack() as stack:
            sessions = {load: self._session(load, stack) for load in self._matrix.loads}
            plan = list(self._turns())
            try:
                for number, (load, turn) in enumerate(plan, 1):
                    if not sessions[load].has(turn.arm.name, turn.repeat):
                        self._measure(load, turn, sessions[load], f"{number} of {len(plan)}")
            finally:
                self._pool.close()
            for session in sessions.values():
                session.report()
        return paths

    def path(self, load: float) -> Path:
        """Where the run at `load` is."""
        return self._directory / f"live-{load:g}"

    def _session(self, load: float, stack: ExitStack) -> BenchSession:
        """A session that already holds what an earlier, stopped run has measured."""
        path = self.path(load)
        kept, requests = _finished(path)
        options = dataclasses.replace(self._matrix.options, load=load)
        arms = select_arms(self._matrix.arms)
        info = dataclasses.replace(self._info, arms={a.name: a.to_json() for a in arms})
        placed = _placed(path, {row["arm"] for row in kept})
        shutil.rmtree(path, ignore_errors=True)
        writer = stack.enter_context(RunWriter(path, info))
        session = BenchSession(
            options,
            arms,
            server_of=lambda spec: self._pool.get(spec).endpoint,
            vocabulary_of=self._vocabulary_of,
            writer=writer,
            info=info,
            on_progress=self._progress.requests if self._progress else None,
            say=self._say,
        )
        session.restore(kept, requests)
        for records in placed:
            writer.write(records)
        return session

    def _turns(self) -> Iterator[tuple[float, Turn]]:
        """(load, turn) in the order in which they are measured."""
        specs = self._matrix.specs()
        turn_of = {arm.name: (arm, spec) for spec, arms in specs.items() for arm in arms}
        groups = [[arm.name for arm in arms] for arms in specs.values()]
        if self._pool.resident >= len(groups):
            groups = [[*turn_of]]
        for group in groups:
            for load in self._matrix.loads:
                for repeat, row in enumerate(turns(group, self._matrix.options.repeats)):
                    for name in row:
                        yield load, Turn(repeat, *turn_of[name])

    def _measure(self, load: float, turn: Turn, session: BenchSession, place: str) -> None:
        spec, arm = turn.spec, turn.arm
        if session.capacity_rps is None:
            session.capacity_rps = self._capacity(session)
        if session.rate_rps is None:
            session.settle_rate(spec, arm)
        session.switches = spec.shared
        before = self._recorded(spec)
        name = f"load {load:g}: {arm.name}, repeat {turn.repeat + 1}"
        self._say(f"{name} (turn {place})")
        if self._progress is not None:
            self._progress.say(name)
        session.run(turn)
        for kind, old in before.items():
            new = self._read(spec, kind)[old:]
            session.writer.write(
                dataclasses.replace(r, arm=arm.name, repeat=turn.repeat) for r in new
            )

    def _capacity(self, session: BenchSession) -> float:
        """Measured once per directory, on the arm `vllm`."""
        path = self._directory / CAPACITY_FILE
        if path.exists():
            with structured(path):
                return real(read_json(path)["capacity_rps"], f"{path}: capacity_rps=", above=0.0)
        arm = select_arms(["vllm"])[0]
        session.switches = True
        session.settle_rate(server_spec(arm, True), arm)
        assert session.capacity_rps is not None
        write_text(path, to_json({"capacity_rps": session.capacity_rps}))
        return session.capacity_rps

    def _recorded(self, spec: ServerSpec) -> dict[type, int]:
        return {kind: len(self._read(spec, kind)) for kind in (RebalanceRecord, PlacementRecord)}

    def _read(self, spec: ServerSpec, kind: Any) -> list[Any]:
        """What the newest server of `spec` has recorded so far."""
        paths = [path for own, path in self._pool.records if own == spec]
        path = paths[-1] / FILES[kind] if paths else None
        return list(read_records(path, kind)) if path is not None and path.exists() else []


def _finished(path: Path) -> tuple[list[dict[str, Any]], list[RequestRecord]]:
    """Rows and requests of the turns that ended; nothing without an earlier run."""
    if not (path / RUN_FILE).exists():
        return [], []
    reader = RunReader(path)
    rows = list(reader.info().runs)
    with structured(path / RUN_FILE):
        done = {(row["arm"], row["repeat"]) for row in rows}
    return rows, [r for r in reader.requests() if (r.arm, r.repeat) in done]


def _placed(path: Path, arms: set[str]) -> Iterable[list[Any]]:
    reader = RunReader(path)
    return [
        [r for r in reader.rebalances() if r.arm in arms],
        [r for r in reader.placements() if r.arm in arms],
    ]
