"""Writes gimbal/vllm_plugin/serve/vllm_tables/MINOR.json from the vLLM that can be imported.

    .venv/bin/python scripts/vllm_tables.py

`gimbal serve` reads command lines with these tables, because vLLM's own parser takes 10 s to
import. Another version's is written with its unpacked wheel before the installed one:
``PYTHONPATH=UNPACKED .venv/bin/python scripts/vllm_tables.py``.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from gimbal.vllm_plugin.serve.command_line import table_path

READ_AS = {
    "human_readable_int": "size",
    "human_readable_int_or_auto": "size or auto",
    "int": "int",
    "float": "float",
}


def serve_parser() -> Any:
    """The parser of ``vllm serve``."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    return ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))


def flags(parser: Any) -> list[dict[str, Any]]:
    """One entry per flag of `parser`: how it is written, and how the words behind it are read."""
    names: dict[argparse.Action, list[str]] = {}
    for name, action in parser._option_string_actions.items():
        names.setdefault(action, []).append(name)
    return [_flag(action, written) for action, written in names.items() if action.dest != "help"]


def _flag(action: argparse.Action, names: list[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"dest": action.dest, "flags": names}
    if action.nargs == 0:
        off = [name for name in names if not _says(action, name)]
        return entry | {"flags": [name for name in names if name not in off], "off": off}
    if action.nargs is not None:
        entry["nargs"] = action.nargs
    if read_as := _read_as(action.type):
        entry["read_as"] = read_as
    return entry


def _says(action: Any, name: str) -> bool:
    """What a switch sets when it is written as `name`."""
    namespace = argparse.Namespace()
    action(argparse.ArgumentParser(), namespace, [], name)
    value = getattr(namespace, action.dest)
    assert isinstance(value, bool), action
    return value


def _read_as(kind: Any) -> str:
    """Name of a number's kind; empty for what is no number."""
    name = getattr(kind, "__name__", "")
    if name == "_optional_type":  # `vllm.engine.arg_utils.optional_type`
        inner = [READ_AS.get(getattr(c.cell_contents, "__name__", "")) for c in kind.__closure__]
        return f"{inner[0]} or None" if inner[0] else ""
    return READ_AS.get(name, "")


def without_eplb() -> list[str]:
    """Architectures whose class in vLLM cannot move experts.

    Left out: what cannot be imported here, classes that differ between platforms, and those that
    wrap a language model which only a configuration names.
    """
    from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsMultiModal
    from vllm.model_executor.models.registry import ModelRegistry

    found = []
    for architecture, model in ModelRegistry.models.items():
        try:
            cls = model.load_model_cls()
        except Exception:
            continue
        if ".cpu." in cls.__module__ or SupportsMultiModal in cls.__mro__:
            continue
        if MixtureOfExperts not in cls.__mro__ and not hasattr(cls, "set_eplb_state"):
            found.append(architecture)
    return sorted(found)


def main() -> None:
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.version import __version__

    vllm.platforms._current_platform = CpuPlatform()  # an unpacked wheel has none by itself
    rows = ",\n".join("  " + json.dumps(flag) for flag in flags(serve_parser()))
    names = ",\n".join("  " + json.dumps(name) for name in without_eplb())
    path = table_path(__version__)
    path.write_text(
        f'{{\n "version": "{__version__}",\n "flags": [\n{rows}\n ],\n'
        f' "without_eplb": [\n{names}\n ]\n}}\n'
    )
    print(path)


if __name__ == "__main__":
    main()
