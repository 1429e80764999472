"""One benchmark from its set-up to its report: servers, turns, records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gimbal.bench.arms import ServerSpec, server_spec
from gimbal.bench.endpoint import Endpoint
from gimbal.bench.servers import ServerPool
from gimbal.bench.session import BenchOptions, BenchSession
from gimbal.bench.turns import Turn, count_starts, plan_turns
from gimbal.core.errors import InputError
from gimbal.records.environment import describe_environment
from gimbal.records.schema import PlacementRecord, RebalanceRecord, RunInfo
from gimbal.records.store import FILES, RunWriter, read_records
from gimbal.report.arms import Arm
from gimbal.workloads import build_workload
from gimbal.workloads.prompts import Vocabulary, read_vocabulary

START_S = 80.0
"""A server's start, for the estimate of the whole."""


class TurnProgress(Protocol):
    """What shows how far a turn is."""

    def say(self, text: str) -> None:
        """A turn begins."""

    def requests(self, ended: int, streams: int) -> None:
        """Requests that have ended, streams that are open."""


@dataclass(frozen=True)
class BenchSetup:
    """What is measured, and where.

    Attributes:
        options: of the session.
        arms: the order of the report.
        directory: of the run's records and the servers' logs.
        url: a server that is there already, or None to start some.
        server_arguments: of ``gimbal serve``.
        resident: servers alive at once.
        switch: arms are switched while a server runs.
        model_dir: where token ids come from; None asks the server.
        command: what was typed.
    """

    options: BenchOptions
    arms: Sequence[Arm]
    directory: Path
    url: str | None = None
    server_arguments: tuple[str, ...] = ()
    resident: int = 1
    switch: bool = True
    model_dir: Path | None = None
    command: tuple[str, ...] = ()

    def info(self) -> RunInfo:
        """What ``run.json`` says of it before anything has run."""
        options = self.options
        trace = {"name": options.trace.name, "requests": len(options.trace)}
        return RunInfo(
            kind="bench",
            command=self.command,
            seed=options.seed,
            repeats=options.repeats,
            trace=trace | {"options": asdict(options.workload), "salt": options.salt},
            arms={arm.name: arm.to_json() for arm in self.arms},
            environment=describe_environment(),
            slo=options.slo.limits(),
        )


def run_bench(
    setup: BenchSetup, say: Callable[[str], None], progress: TurnProgress
) -> tuple[dict[str, Any], bool]:
    """Returns the report and whether it was interrupted: then it covers the finished turns.

    Raises RuntimeError for a server that does not start, InputError for a model without its folder.
    """
    options = setup.options
    plan = plan_turns(setup.arms, options.repeats, options.share)
    info = setup.info()
    interrupted = False
    with RunWriter(setup.directory, info) as writer:
        pool = ServerPool(setup.server_arguments, setup.directory, setup.resident, say)
        session = BenchSession(
            options,
            setup.arms,
            server_of=_server_of(setup.url, pool),
            vocabulary_of=vocabulary_of(setup.model_dir),
            writer=writer,
            info=info,
            switch=setup.switch,
            on_progress=progress.requests,
            say=say,
        )
        starts = 0 if setup.url else count_starts(plan, setup.resident)
        _announce(setup, plan, starts, say)
        try:
            first = next((t for t in plan if t.arm.name == session.base), plan[0])
            session.settle_rate(first.spec, first.arm)
            say(f"about {_estimate_s(session, plan, starts) / 60:.0f} min")
            for number, turn in enumerate(plan, start=1):
                progress.say(f"{number}/{len(plan)} {turn.arm.name} #{turn.repeat + 1}")
                session.run(turn)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            pool.close()
            try:
                _keep_rearrangements(pool, setup, writer)
            except InputError as error:  # what was measured is worth its report
                say(f"rearrangements are left out: {error}")
        return session.report(), interrupted


def _announce(
    setup: BenchSetup, plan: Sequence[Turn], starts: int, say: Callable[[str], None]
) -> None:
    say(f"{len(plan)} turns, {starts} server starts; records in {setup.directory}")
    for repeat in range(setup.options.repeats):
        order = " ".join(turn.arm.name for turn in plan if turn.repeat == repeat)
        say(f"repeat {repeat + 1}: {order}")


def _estimate_s(session: BenchSession, plan: Sequence[Turn], starts: int) -> float:
    options = session.options
    span = build_workload(options.trace, session.sized_workload(), options.seed).span_s
    turn_s = span * 1.2 + options.warm_up / 4 + 8.0
    return starts * START_S + len(plan) * float(turn_s)


def endpoint_of(url: str) -> Endpoint:
    """The server at `url`, which may end in the API's ``/v1``."""
    return Endpoint(url.rstrip("/").removesuffix("/v1"))


def _server_of(url: str | None, pool: ServerPool) -> Callable[[ServerSpec], Endpoint]:
    if url:
        endpoint = endpoint_of(url)
        return lambda spec: endpoint
    return lambda spec: pool.get(spec).endpoint


def check_vocabulary(server_arguments: Sequence[str], model_dir: Path | None = None) -> None:
    """Raises InputError, before a server is started, where its model's token ids cannot be read.

    Args:
        server_arguments: of ``gimbal serve``.
        model_dir: the model's folder; None: it is what is served.
    """
    if model_dir is None and "--demo" not in server_arguments:
        model = _served_model(server_arguments)
        if model is None:  # vLLM's own --config may name it
            return
        if not Path(model).is_dir():
            raise InputError(f"{model}: token ids come from a folder: give it by --model-dir")
        model_dir = Path(model)
    if model_dir is not None:
        read_vocabulary(model_dir)


def _served_model(words: Sequence[str]) -> str | None:
    """The model that ``gimbal serve`` is given, where it stands first or after ``--model``."""
    if words and not words[0].startswith("-"):
        return words[0]
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name == "--model":
            return value if equals else following
    return None


def vocabulary_of(model_dir: Path | None) -> Callable[[Endpoint], Vocabulary]:
    """Token ids of the served model, read once from its directory; raises InputError."""
    read: dict[str, Vocabulary] = {}

    def vocabulary(endpoint: Endpoint) -> Vocabulary:
        root = str(model_dir or endpoint.model().root)
        if root not in read:
            if not Path(root).is_dir():
                raise InputError(f"{endpoint.url} serves {root!r}: give its folder by --model-dir")
            read[root] = read_vocabulary(Path(root))
        return read[root]

    return vocabulary


def _keep_rearrangements(pool: ServerPool, setup: BenchSetup, writer: RunWriter) -> None:
    """Copies what the servers recorded of their experts into the run, under the arm's name.

    Of a server that several placing arms share nobody can say which of them moved what.
    """
    share = setup.options.share
    owners = [(server_spec(a, share), a.name) for a in setup.arms if "placement" in a.levels]
    names = dict(owners)
    for spec, directory in pool.records:
        if [own for own, _ in owners].count(spec) != 1:
            continue
        for kind in (RebalanceRecord, PlacementRecord):
            path = directory / FILES[kind]
            if path.exists():
                found: Iterator[Any] = read_records(path, kind)
                writer.write(replace(record, arm=names[spec]) for record in found)
