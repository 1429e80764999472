"""Reads a command line of ``vllm serve`` as vLLM does, its ``--config`` file included.

vLLM's own parser takes 10 s to import, and bad input should be answered before that. Its class is
vLLM's (`FlexibleArgumentParser`: underscores, dotted keys, the configuration file), run from its
source alone; the flags come from a table per version that ``scripts/vllm_tables.py`` writes.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import re
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from gimbal.core.errors import InputError, one_line, with_type
from gimbal.core.json_text import read_json

OWN = ("--demo", "--demo-dir", "--levels", "--gimbal-config", "--verbose", "--dry-run")
"""Flags of ``gimbal serve`` itself, which a misspelt one may mean."""
ALIKE = 0.75
"""How near a known flag an unknown one must be to be refused where vLLM may have more flags than
the table: in another patch release, or with a platform's plugin."""
_UNKNOWN = "unrecognized arguments: "


def table_path(version: str) -> Path:
    """The table of vLLM `version`'s minor release."""
    minor = ".".join(version.split(".")[:2])
    return Path(__file__).parent / "vllm_tables" / f"{minor}.json"


@functools.lru_cache
def vllm_table(version: str) -> dict[str, Any]:
    """``version``, ``flags`` and ``without_eplb`` of vLLM `version`'s minor release."""
    table: dict[str, Any] = read_json(table_path(version))
    return table


def parse(arguments: Sequence[str], version: str) -> dict[str, Any]:
    """What `arguments` of ``vllm serve`` and the file behind their ``--config`` set, by vLLM's
    names; ``model_tag`` is the model's. What nobody set is absent.

    Raises InputError for what vLLM's parser refuses.
    """
    parser = _parser(version)
    try:
        found = parser.parse_args(["serve", *arguments])
    except InputError:
        raise
    except IndexError:
        raise InputError(f"{arguments[-1]}: needs a value") from None
    except OSError as error:
        raise InputError(f"--config {error.filename}: cannot be read: {error.strerror}") from None
    except Exception as error:  # of vLLM's code, which raises what comes
        file = "--config: " if "--config" in arguments else ""
        said = one_line(error) if isinstance(error, ValueError) else with_type(error)
        raise InputError(f"{file}{said}") from None
    return {name: value for name, value in vars(found).items() if name != "subparser"}


@functools.lru_cache
def _parser(version: str) -> Any:
    table = vllm_table(version)
    known = [name for flag in table["flags"] for name in (*flag["flags"], *flag.get("off", ()))]
    # A platform's plugin may add flags of its own.
    exact = table["version"] == version.partition("+")[0] and not metadata.entry_points(
        group="vllm.platform_plugins"
    )

    class Reader(_parser_class()):  # type: ignore[misc]
        def error(self, message: str) -> None:
            unknown = message.removeprefix(_UNKNOWN)
            if unknown != message:
                _refuse_unknown(unknown.split(), known, exact)
            else:
                raise InputError(message.removeprefix("argument "))

        def print_help(self, file: Any = None) -> None:
            raise InputError("-h: try gimbal serve --help, and vllm serve --help=all")

    parser = Reader(prog="gimbal")
    serve = parser.add_subparsers(dest="subparser").add_parser(
        "serve", argument_default=argparse.SUPPRESS
    )
    serve.add_argument("model_tag", nargs="?")
    for flag in table["flags"]:
        _add(serve, **flag)
    return parser


def _add(
    parser: argparse.ArgumentParser,
    dest: str,
    flags: list[str],
    off: list[str] | None = None,
    nargs: str | None = None,
    read_as: str = "",
) -> None:
    if off is None:
        parser.add_argument(*flags, dest=dest, nargs=nargs, type=_reader(read_as))
        return
    for names, action in ((flags, "store_true"), (off, "store_false")):
        if names:
            parser.add_argument(*names, dest=dest, action=action, default=argparse.SUPPRESS)


def _reader(read_as: str) -> Callable[[str], Any]:
    kind, _, also = read_as.partition(" or ")
    readers: dict[str, Any] = {"int": int, "float": float, "size": _size}
    read = readers.get(kind, str)

    def number(text: str) -> Any:
        if (also == "None" and text in ("", "None")) or (also == "auto" and text == "auto"):
            return None
        return read(text)

    number.__name__ = "size" if kind == "size" else read.__name__  # "invalid int value"
    return number


def _size(text: str) -> int:
    # 1k is 1,000, 1K 1,024; only the latter must be whole.
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", text.strip())
    if match is None:
        return int(text)
    power = "kmgt".index(match[2].lower()) + 1
    return int(float(match[1]) * 1000**power) if match[2].islower() else int(match[1]) << 10 * power


def _refuse_unknown(words: list[str], known: list[str], exact: bool) -> None:
    for word in words:
        if not word.startswith("-"):
            continue
        name = re.split(r"[.=]", word)[0]
        meant = difflib.get_close_matches(name, [*known, *OWN], n=1, cutoff=ALIKE)
        if exact or meant:
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            raise InputError(f"{name}: vLLM has no such flag{hint}")
    if exact:
        raise InputError(f"{words[0]}: one word too many: vLLM takes one model")


@functools.lru_cache
def _parser_class() -> Any:
    """vLLM's `FlexibleArgumentParser`, without the import of vLLM where that works."""
    spec = util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("vLLM is not installed")
    path = Path(spec.submodule_search_locations[0]) / "utils" / "argparse_utils.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [
            line
            for line in tree.body
            if not (isinstance(line, ast.ImportFrom) and (line.module or "").startswith("vllm"))
        ]
        names = {"__name__": "gimbal.vllm_argparse", "init_logger": lambda name: _Silent()}
        exec(compile(tree, str(path), "exec"), names)
        return names["FlexibleArgumentParser"]
    except Exception:  # that file imports more of vLLM than its logger by now
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        return FlexibleArgumentParser


class _Silent:
    """vLLM says the same again when it parses."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
