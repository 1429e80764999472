"""Every file that any command reads, given as what it must not be: exit code 2 and one line.

Commands and their options come from the command line itself: one that is added without a row in
`GOOD` fails here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click
import numpy as np
import pytest

from gimbal.commands.options import NameOrFile, OutFile, OutFolder
from tests.commands.leaves import LEAVES
from tests.commands.test_bad_input import BINARY, Run, here, refused, run

__all__ = ["here", "run"]

SIMULATE = "--trace trace.jsonl --cluster h100x4-paper"
GOOD = {
    "serve": "--demo --dry-run",
    "bench": "--demo --trace trace.jsonl",
    "simulate": SIMULATE,
    "goodput": f"{SIMULATE} --slo ttft_ms=9",
    "reproduce live": "",
    "reproduce paper": "",
    "reproduce regimes": "",
    "reproduce goodput": "",
    "place": "--routing routing.npz --ranks 4",
    "top": "",
    "stats": "",
    "calibrate": "",
    "report": "",
    "model demo": "--out new",
    "model stats": "",
    "doctor": "",
    "config": "",
}
"""Words that bring a command as far as reading the file that is added to them."""
WITH = {
    ("simulate", "--model"): "--trace trace.jsonl --gpu h100 --dp 2",
    ("goodput", "--model"): "--trace trace.jsonl --slo ttft_ms=9 --gpu h100 --dp 2",
    ("calibrate", "--from-steps"): "--model-dir model",
    ("calibrate", "--model-dir"): "--estimate h100",
}
"""Other words for one option."""
MAY_BE_EMPTY = {"--gimbal-config", "--arms-file"}
"""An empty YAML file asks for nothing."""
ENDINGS = ("csv", "jsonl", "json", "yaml", "npz", "npy", "pt")
KINDS = ("missing", "empty", "huge", "binary", "folder", "unreadable", "nan", "column")
HUGE_BYTES = 1 << 43
"""A sparse file: more than any memory, and no disk."""
NAN = {
    "csv": "Timestamp,Request tokens,Response tokens\nnan,3,3\n",
    "jsonl": '{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}\n',
    "json": '{"vocab_size": NaN}',
    "yaml": "dp: .nan\nlevels: .nan\n",
}
COLUMN = {
    "csv": "when,how_many\n1,3\n",
    "jsonl": '{"when": 1, "how_many": 3}\n',
    "json": '{"when": 1}',
    "yaml": "when: 1\n",
}


def reads(parameter: click.Parameter) -> bool:
    kind = parameter.type
    return isinstance(kind, NameOrFile | click.Path) and not isinstance(kind, OutFile | OutFolder)


FILES = [
    (path, parameter)
    for path, command in LEAVES.items()
    for parameter in command.params
    if reads(parameter)
]


def test_every_command_has_a_row() -> None:
    assert set(GOOD) == set(LEAVES)
    assert len(FILES) > 25
    named = {(path, parameter.opts[0]) for path, parameter in FILES}
    assert set(WITH) <= named


def given(path: str, parameter: click.Parameter, file: str | Path) -> list[str | Path]:
    """The words of a command to which `parameter` is `file`."""
    option = parameter.opts[0] if isinstance(parameter, click.Option) else ""
    words: list[str | Path] = [*path.split(), *WITH.get((path, option), GOOD[path]).split()]
    if option in words and not parameter.multiple:
        del words[words.index(option) : words.index(option) + 2]
    return [*words, *([option] if option else []), file]


def make(kind: str, ending: str) -> str:
    """Writes the file of that kind into the current folder; returns its name."""
    name = f"{kind}.{ending}"
    path = Path(name)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge":
        path.write_bytes(b"{")
        os.truncate(path, HUGE_BYTES)
    elif kind == "binary":
        path.write_bytes(BINARY)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        # Root may read every file but this one, of which nobody can read the beginning.
        path.symlink_to("/proc/self/mem")
    elif kind in ("nan", "column"):
        texts = NAN if kind == "nan" else COLUMN
        array = np.full((1, 1, 2), np.nan)
        if ending == "npz":
            np.savez(path, **({"counts": array} if kind == "nan" else {"when": array}))
        elif ending == "npy":
            np.save(path, array if kind == "nan" else np.array(["when"]))
        else:
            path.write_text(texts.get(ending, "nan" if kind == "nan" else "when"))
    return name


@pytest.fixture
def folder(here: Path) -> Path:
    """Nothing in it is named as one of `KINDS`."""
    for path in (*here.glob("binary.*"), *here.glob("empty.*"), *here.glob("folder.*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("path", "parameter"), FILES, ids=[f"{path} {p.opts[0]}" for path, p in FILES]
)
@pytest.mark.usefixtures("folder")
def test_what_is_no_such_file(
    run: Run,
    path: str,
    parameter: click.Parameter,
    kind: str,
) -> None:
    if kind == "empty" and parameter.opts[0] in MAY_BE_EMPTY:
        pytest.skip("an empty YAML file asks for nothing")
    for ending in ENDINGS if kind in ("nan", "column") else ("csv", "npz"):
        name = make(kind, ending)
        outcome = run(*given(path, parameter, name))
        refused(outcome)
        assert kind in outcome.err, outcome.err


@pytest.mark.parametrize("path", [p for p, c in LEAVES.items() if any(map(reads, c.params))])
@pytest.mark.usefixtures("folder")
def test_a_model_s_folder_with_bad_files(run: Run, path: str) -> None:
    """Folders that are given hold files: those, too, may be anything."""
    for parameter in filter(reads, LEAVES[path].params):
        for kind in KINDS[1:]:
            directory = Path(f"{kind}-{parameter.name}")
            directory.mkdir()
            for name in ("config.json", "tokenizer.json", "run.json", "steps-0.jsonl"):
                made = Path(make(kind, name.rpartition(".")[2]))
                made.rename(directory / name)
            refused(run(*given(path, parameter, directory)))
