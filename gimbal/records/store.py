"""A run on disk: one directory, ``run.json`` and one JSON-lines file per record type.

Lines are written as they happen, so an interrupted run keeps what it has. Readers ignore fields
they do not know and default those that are absent: records outlive versions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from gimbal.core.errors import InputError
from gimbal.records.schema import (
    PlacementRecord,
    RebalanceRecord,
    RequestRecord,
    RunInfo,
    StepRecord,
)

RUN_FILE = "run.json"
FILES: dict[type, str] = {
    RequestRecord: "requests.jsonl",
    RebalanceRecord: "rebalances.jsonl",
    PlacementRecord: "placements.jsonl",
}

Record = TypeVar("Record", RequestRecord, StepRecord, RebalanceRecord, PlacementRecord)


class RunWriter:
    """Writes a run directory; a context manager that closes its files.

    Raises InputError when the directory already holds a run.
    """

    def __init__(self, directory: Path, info: RunInfo) -> None:
        self.directory = directory
        self._files: dict[type, IO[str]] = {}
        self._fields: dict[type, list[str]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if (directory / RUN_FILE).exists():
                raise InputError(f"--out {directory}: holds a run already; choose another one")
            self.write_info(info)
        except OSError as error:
            raise InputError(f"--out {directory}: cannot be written: {error.strerror}") from None

    def write_info(self, info: RunInfo) -> None:
        """Writes or replaces ``run.json``."""
        text = json.dumps(dataclasses.asdict(info), indent=2)
        (self.directory / RUN_FILE).write_text(text + "\n", encoding="utf-8")

    def write(self, records: Iterable[Record]) -> None:
        """Appends records, each to the file of its type."""
        for record in records:
            kind = type(record)
            if kind not in self._files:
                path = self.directory / FILES[kind]
                self._files[kind] = path.open("a", encoding="utf-8")
                self._fields[kind] = [f.name for f in dataclasses.fields(kind)]
            values = {name: getattr(record, name) for name in self._fields[kind]}
            self._files[kind].write(json.dumps(values, separators=(",", ":")) + "\n")
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Closes the files; the writer may be used again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class RunReader:
    """Reads a run directory."""

    directory: Path

    def info(self) -> RunInfo:
        """Raises InputError when the directory is no run."""
        path = self.directory / RUN_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not a run: {error}") from None
        return _build(RunInfo, values, path, 1)

    def requests(self) -> list[RequestRecord]:
        return list(self._read(RequestRecord))

    def rebalances(self) -> list[RebalanceRecord]:
        return list(self._read(RebalanceRecord))

    def placements(self) -> list[PlacementRecord]:
        return list(self._read(PlacementRecord))

    def _read(self, kind: type[Record]) -> Iterator[Record]:
        path = self.directory / FILES[kind]
        return read_records(path, kind) if path.exists() else iter(())


def read_records(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The records of one JSON-lines file; raises InputError naming file and line."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{line}: not JSON: {error.msg}") from None
            yield _build(kind, values, path, line)


Built = TypeVar("Built")


def _build(kind: type[Built], values: Any, path: Path, line: int) -> Built:
    """A record from its JSON object; lists become tuples."""
    if not isinstance(values, dict):
        raise InputError(f"{path}:{line}: expected a JSON object")
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    try:
        return kind(**kept)
    except TypeError as error:
        raise InputError(f"{path}:{line}: {error}") from None
