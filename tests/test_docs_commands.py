"""Every command that a page shows is one: the parsers know the commands, flags and choices."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gimbal.cli import COMMANDS, gimbal
from gimbal.core.errors import InputError
from gimbal.vllm_plugin.serve.command_line import parse
from tests.test_docs import CODE, PAGES, ROOT, prose

PROGRAM = re.compile(r"(?:[A-Z_]+=\S* )*(?:\S*/)?(gimbal|vllm|python3?)$")
_ENVIRONMENT = re.compile(r"[A-Z_]+=")
VLLM = "0.32.0"
CURRENT = [page for page in PAGES if "reproduction/results" not in page.as_posix()]
"""Results say what was run with the version that they name; a flag may have gone since."""


def blocks(text: str) -> Iterator[str]:
    """Commands in fences, continued lines joined."""
    fenced, kept = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, kept = not fenced, ""
        elif fenced:
            kept += line.strip()
            if kept.endswith("\\"):
                kept = kept[:-1] + " "
            else:
                yield kept
                kept = ""


def commands(page: Path) -> list[list[str]]:
    """Words of every command of `page` that a program of ours or vLLM's is to run."""
    text = page.read_text(encoding="utf-8")
    found = []
    for line in [*blocks(text), *(" ".join(c.split()) for c in CODE.findall(prose(page)))]:
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:  # prose, or half a line of JSON
            continue
        while words and _ENVIRONMENT.match(words[0]):
            words = words[1:]
        if len(words) > 1 and PROGRAM.fullmatch(words[0]):
            end = next((i for i, w in enumerate(words) if w in ("|", ">", "&", "&&", ";")), None)
            found.append([words[0].rpartition("/")[2], *words[1:end]])
    return found


def fault(words: list[str]) -> str | None:
    """Why `words` would be refused for what they say, whatever files and servers there are."""
    program, *rest = words
    if program.startswith("python"):
        return _python_fault(rest)
    if program == "vllm":
        return _vllm_fault(rest[1:]) if rest[0] == "serve" else None
    return _gimbal_fault(rest)


def _python_fault(rest: list[str]) -> str | None:
    if rest[0] == "-m":
        path = ROOT.joinpath(*rest[1].split("."))
        ours = rest[1].split(".")[0] in ("gimbal", "scripts", "tests", "reproduction")
        known = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        return f"{rest[1]}: no such module" if ours and not known else None
    if rest[0].endswith(".py") and "/" in rest[0] and not (ROOT / rest[0]).exists():
        return f"{rest[0]}: no such file"
    return None


def _gimbal_fault(rest: list[str]) -> str | None:
    if rest[0].startswith("-"):
        return None if rest[0] in ("-h", "--help", "--version") else f"{rest[0]}: no such option"
    if rest[0] not in COMMANDS:
        return f"gimbal {rest[0]}: no such command"
    context = click.Context(gimbal)
    name, command = rest[0], gimbal.get_command(context, rest[0])
    rest = rest[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        command, rest = command.get_command(context, rest[0]), rest[1:]
    if command is None:
        return f"gimbal {name}: no such part"
    settings = command.context_settings
    inner = click.Context(command, info_name=name, parent=context, **settings)
    try:
        values, left, _ = command.make_parser(inner).parse_args(list(rest))
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice) and parameter.name in values:
                parameter.type_cast_value(inner, values[parameter.name])
    except click.UsageError as error:
        # `gimbal stats --out` speaks of a flag and is no command to run.
        spoken_of = len(rest) == 1 and "requires" in error.format_message()
        return None if spoken_of else f"gimbal {name}: {error.format_message()}"
    if inner.ignore_unknown_options:
        passed_on = values.get("arguments")  # of no kind that one can list, where there are none
        return _vllm_fault([*passed_on, *left] if isinstance(passed_on, list | tuple) else left)
    return None


def _vllm_fault(rest: list[str]) -> str | None:
    """By the table of vLLM's flags that `gimbal serve` refuses misspelt ones with."""
    try:
        parse([word for word in rest if word != "..."], VLLM)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", CURRENT, ids=[p.relative_to(ROOT).as_posix() for p in CURRENT])
def test_every_command_is_one(page: Path) -> None:
    assert [f"{' '.join(words)}: {why}" for words in commands(page) if (why := fault(words))] == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("gimbal simulat --trace burst", "no such command"),
        ("gimbal simulate --trce burst --load 0.9", "--trce"),
        ("gimbal simulate --distribution round --load 0.9", "round"),
        ("gimbal top --once --json --colour red", "--colour"),
        ("gimbal serve MODEL --max-modellen 3", "--max-modellen"),
        ("vllm serve MODEL --max-modellen 3", "--max-modellen"),
        ("python -m tests.live.check.correctnes", "no such module"),
        (".venv/bin/python scripts/gone.py", "no such file"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, line: str, why: str) -> None:
    page = tmp_path / "page.md"
    first, *rest = line.split()
    page.write_text(f"```\nX=1 {first} \\\n    {' '.join(rest)}  # why\n```\n")
    [words] = commands(page)
    assert why in (fault(words) or "")


def test_commands_are_found() -> None:
    total = [words for page in PAGES for words in commands(page)]
    assert len(total) > 60
    assert {words[1] for words in total if words[0] == "gimbal"} >= set(COMMANDS)
