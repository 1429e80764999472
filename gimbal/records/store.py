"""A run on disk: one directory, ``run.json`` and one JSON-lines file per record type.

Lines are written as they happen, so an interrupted run keeps what it has. Readers ignore fields
they do not know and default those that are absent: records outlive versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gimbal.core.errors import InputError
from gimbal.core.files import lines, read_text, write_text, writing
from gimbal.core.json_text import parse_json, read_json, to_json
from gimbal.core.options import complaint
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
PLACES = ("pairs", "ranks_before", "ranks_after")
"""Fields of a `PlacementRecord` that are [layers, experts]."""

Record = TypeVar("Record", RequestRecord, StepRecord, RebalanceRecord, PlacementRecord)


def require_no_run(directory: Path) -> None:
    """Raises InputError when `directory` holds a run already."""
    with writing(f"--out {directory}"):
        if (directory / RUN_FILE).exists():
            raise InputError(f"--out {directory}: holds a run already; choose another one")


class RunWriter:
    """Writes a run directory; a context manager that closes its files.

    Raises InputError when the directory already holds a run.
    """

    def __init__(self, directory: Path, info: RunInfo) -> None:
        self.directory = directory
        self._files: dict[type, IO[str]] = {}
        self._fields: dict[type, list[str]] = {}
        require_no_run(directory)
        with writing(f"--out {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        self.write_info(info)

    def write_info(self, info: RunInfo) -> None:
        """Writes or replaces ``run.json``."""
        text = to_json(dataclasses.asdict(info), indent=2)
        write_text(self.directory / RUN_FILE, text + "\n")

    def write(self, records: Iterable[Record]) -> None:
        """Appends records, each to the file of its type; InputError where that is not possible."""
        with writing(self.directory):
            for record in records:
                kind = type(record)
                if kind not in self._files:
                    path = self.directory / FILES[kind]
                    self._files[kind] = path.open("a", encoding="utf-8")
                    self._fields[kind] = [f.name for f in dataclasses.fields(kind)]
                values = {name: getattr(record, name) for name in self._fields[kind]}
                self._files[kind].write(to_json(values, separators=(",", ":")) + "\n")
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
        if not path.is_file():
            raise InputError(f"{self.directory}: not a run: no {RUN_FILE} in it")
        return build(RunInfo, read_json(path), str(path))

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
    """The records of one JSON-lines file; raises InputError naming file, line and field."""
    for line, text in enumerate(lines(read_text(path)), start=1):
        yield build(kind, parse_json(text, str(path), line), f"{path}:{line}")


Built = TypeVar("Built")


def build(kind: type[Built], values: Any, where: str) -> Built:
    """A dataclass from its JSON object; keys it has not are ignored.

    Raises InputError that begins with `where` and names the field.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a JSON object")
    try:
        record: Built = _adapter(kind).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        found = complaint(error)
        raise InputError(f"{where}: {found.key}: {found.text}") from None
    if isinstance(record, PlacementRecord):
        widths = [len(row) for name in PLACES for row in getattr(record, name)]
        layers = {len(getattr(record, name)) for name in PLACES}
        if len(layers) > 1 or len(set(widths)) != 1 or not widths[0]:
            raise InputError(f"{where}: {', '.join(PLACES)}: expected one number per expert")
    return record


@lru_cache(maxsize=8)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
