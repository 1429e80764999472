"""Reads the few vLLM flags Gimbal must know; every flag still goes to vLLM untouched.

Written by hand because vLLM's own parser takes seconds to import, and bad input should be
answered before that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gimbal.core.errors import InputError
from gimbal.vllm_plugin.versions import off_spellings

_SHORT = {
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-n": "--nnodes",
    "-ep": "--enable-expert-parallel",
    "-asc": "--api-server-count",
    "-ac": "--additional-config",
}
_VALUED = (
    "--model",
    "--host",
    "--port",
    "--uds",
    "--config",
    "--data-parallel-size",
    "--data-parallel-size-local",
    "--data-parallel-backend",
    "--tensor-parallel-size",
    "--pipeline-parallel-size",
    "--nnodes",
    "--api-server-count",
    "--eplb-config",
    "--additional-config",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--kv-cache-memory-bytes",
    "--served-model-name",
    "--seed",
)
_SWITCHES = ("--enable-expert-parallel", "--enable-eplb", "--headless", "--enforce-eager")
_DOTTED = ("--eplb-config", "--additional-config")
_OFF = {off: switch for switch in _SWITCHES for off in off_spellings(switch) if off != switch}


@dataclass(frozen=True, slots=True)
class VllmFlags:
    """What the flags say; None or the default where they say nothing.

    Attributes:
        rest: the arguments for vLLM, all but ``--additional-config``, in their order.
        additional_config: vLLM's ``--additional-config`` (dotted form included) as one mapping.
        given: names of the long flags that were given.
    """

    rest: tuple[str, ...]
    given: frozenset[str]
    model: str | None = None
    host: str | None = None
    port: int = 8000
    dp: int = 1
    dp_local: int | None = None
    tp: int = 1
    pp: int = 1
    nodes: int = 1
    expert_parallel: bool = False
    eplb: bool = False
    redundant_experts: int = 0
    headless: bool = False
    additional_config: dict[str, Any] | None = None

    @property
    def local_engines(self) -> int:
        """DP engines started on this machine."""
        return self.dp if self.dp_local is None else self.dp_local


def read_flags(arguments: Sequence[str]) -> VllmFlags:
    """Parses `arguments` of ``gimbal serve`` that are not Gimbal's own.

    Raises InputError for a known flag whose value is missing or not of its type.
    """
    values: dict[str, str] = {}
    dotted: dict[str, dict[str, Any]] = {name: {} for name in _DOTTED}
    switches: set[str] = set()
    rest: list[str] = []
    given: set[str] = set()
    words = list(arguments)
    index = 0
    model = None
    previous_takes_value = False
    while index < len(words):
        word = words[index]
        index += 1
        name, value = _split(word)
        given.add(name) if name.startswith("--") else None
        if name in _SWITCHES or name in _OFF:
            switches.add(name) if name in _SWITCHES else switches.discard(_OFF[name])
            rest.append(word)
            previous_takes_value = False
            continue
        section = name.partition(".")[0]
        if name in _VALUED or section in _DOTTED:
            taken = [word]
            if value is None:
                if index >= len(words):
                    raise InputError(f"{word}: needs a value")
                value = words[index]
                taken.append(value)
                index += 1
            if name in _VALUED:
                values[name] = value
            else:
                _set_dotted(dotted[section], name.partition(".")[2], value)
            if section != "--additional-config":
                rest += taken
            previous_takes_value = False
            continue
        if not word.startswith("-") and not previous_takes_value and model is None:
            model = word
        # An unknown flag may or may not take the next word; a word right behind one is never
        # taken for the model.
        previous_takes_value = word.startswith("-") and value is None
        rest.append(word)
    return _build(values, dotted, switches, tuple(rest), frozenset(given), model)


def _build(
    values: dict[str, str],
    dotted: dict[str, dict[str, Any]],
    switches: set[str],
    rest: tuple[str, ...],
    given: frozenset[str],
    model: str | None,
) -> VllmFlags:
    def integer(name: str, default: int | None) -> Any:
        if name not in values:
            return default
        try:
            number = int(values[name])
        except ValueError:
            raise InputError(f"{name}: expected a whole number, got {values[name]!r}") from None
        if number < (0 if name.endswith(("local", "port")) else 1):
            raise InputError(f"{name}: must be at least 1, got {number}")
        return number

    eplb = _json_option(values, "--eplb-config") | dotted["--eplb-config"]
    extra = _json_option(values, "--additional-config") | dotted["--additional-config"]
    redundant = eplb.get("num_redundant_experts", 0)
    if not isinstance(redundant, int):
        raise InputError(
            f"--eplb-config: num_redundant_experts: expected a whole number, got {redundant!r}"
        )
    return VllmFlags(
        rest=rest,
        given=given,
        model=model or values.get("--model"),
        host=values.get("--host"),
        port=integer("--port", 8000),
        dp=integer("--data-parallel-size", 1),
        dp_local=integer("--data-parallel-size-local", None),
        tp=integer("--tensor-parallel-size", 1),
        pp=integer("--pipeline-parallel-size", 1),
        nodes=integer("--nnodes", 1),
        expert_parallel="--enable-expert-parallel" in switches,
        eplb="--enable-eplb" in switches,
        redundant_experts=redundant,
        headless="--headless" in switches,
        additional_config=extra,
    )


def _split(word: str) -> tuple[str, str | None]:
    """A flag in vLLM's canonical spelling (dashes, long) and its ``=value``, if any."""
    if not word.startswith("-"):
        return word, None
    name, equals, value = word.partition("=")
    if name.startswith("--"):
        head, dot, tail = name.partition(".")
        name = head.replace("_", "-") + dot + tail
    return _SHORT.get(name, name), value if equals else None


def _json_option(values: dict[str, str], name: str) -> dict[str, Any]:
    if name not in values:
        return {}
    try:
        parsed = json.loads(values[name])
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON at character {error.pos} ({error.msg})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{name}: expected a JSON object, got {values[name]!r}")
    return parsed


def _set_dotted(target: dict[str, Any], path: str, text: str) -> None:
    """``a.b`` = `text` in nested mappings; JSON where it parses as JSON, as vLLM reads it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = value
