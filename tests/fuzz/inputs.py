"""What a user hands over: configuration and files."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gimbal.core.config import GimbalConfig, parse_config
from gimbal.core.config_sources import read_config_file
from gimbal.core.cost.profile import load_profile
from gimbal.workloads.load import WorkloadOptions, build_workload, load_trace
from gimbal.workloads.routing import read_routing
from tests.fuzz.values import (
    absurd,
    check,
    count,
    finite,
    folder,
    json_value,
    mutated,
    number,
    text,
)

MOST_TOKENS = 2**53


def _keys(section: Any) -> dict[str, Any]:
    """The keys of a section of the configuration, each with values that are right."""
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            found[entry.name] = _keys(value)
        elif isinstance(value, bool):
            found[entry.name] = [True, False]
        elif isinstance(value, int | float):
            found[entry.name] = [value, 0, 1, 2.5, 10]
        elif isinstance(value, Mapping):
            found[entry.name] = {"session_patience": [2.0], "overtake_factor": [3], "kv": [1]}
        elif isinstance(value, tuple):
            found[entry.name] = [list(value), [], ["queue"]]
        else:
            found[entry.name] = [value, "gimbal", "fcfs", "vllm", "eplb", "even", ""]
    return found


CONFIG_KEYS = _keys(GimbalConfig())


def configuration(rng: random.Random) -> None:
    """Mappings for the configuration: what is taken is finite, and means itself when read again."""
    config = parse_config(mutated(rng, CONFIG_KEYS, rng.choice((0.02, 0.2))), "fuzz")
    values = dataclasses.asdict(config)
    check(finite(values), "took a number that is not finite:", values)
    check(parse_config(values) == config, "another configuration when read again")


def _file(suffix: str, data: bytes) -> Path:
    path = Path(folder().name) / f"input{suffix}"
    path.write_bytes(data)
    return path


def _damaged(rng: random.Random, data: bytes, nested: int = 100_000) -> bytes:
    """Most as they are, the others cut, with bytes changed, or with something put in.

    Args:
        nested: how deep what nests does.
    """
    change = rng.random()
    if change < 0.7 or not data:
        return data
    at = rng.randrange(len(data))
    if change < 0.8:
        return data[:at]
    if change < 0.9:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at + 1 :]
    piece = rng.choice(
        (
            b"9" * 4300, b"[" * nested, b"x" * 140_000, b"1e400", b"NaN", b"\n\n", b",,,", b'"',
            b"\x00", b"\xef\xbb\xbf", b"Infinity", b"9" * 54, b"-1", b"\r", "\u2028".encode(),
        )
    )  # fmt: skip
    return data[:at] + piece + data[at:]


def _trace_number(rng: random.Random) -> Any:
    return absurd(rng) if rng.random() < 0.04 else count(rng)


_CSV = (
    ("Timestamp", "Model", "Request tokens", "Response tokens", "Session ID"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
)
_JSON = (
    ("arrival_s", "prompt_tokens", "output_tokens"),
    ("timestamp", "input_length", "output_length"),
)


def _csv(rng: random.Random) -> bytes:
    columns = rng.choice(_CSV)
    lines = [",".join(columns)]
    for _ in range(rng.randrange(4)):
        cells = [str(_trace_number(rng)) for _ in columns]
        if columns[0] == "TIMESTAMP":
            cells[0] = f"2023-11-16 18:{rng.randrange(60):02}:03.{count(rng)}"
        lines.append(",".join(cells))
    return "\n".join(lines).encode(errors="replace")


def _json_lines(rng: random.Random) -> bytes:
    fields = rng.choice(_JSON)
    lines = [json.dumps({"prefix_block_tokens": 16})] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(1, 4)):
        values = {name: _trace_number(rng) for name in fields}
        if rng.random() < 0.3:
            ids = [count(rng) for _ in range(rng.randrange(4))]
            values |= {"hash_ids" if fields[0] == "timestamp" else "prefix_blocks": ids}
        if rng.random() < 0.05:
            values[rng.choice((*fields, "session", text(rng)))] = json_value(rng)
        lines.append(json.dumps(values))
    return "\n".join(lines).encode()


def traces(rng: random.Random) -> None:
    """Trace files: what is read has times and counts that a run can use."""
    kind = rng.random()
    if kind < 0.45:
        path = _file(".csv", _damaged(rng, _csv(rng)))
    elif kind < 0.9:
        path = _file(".jsonl", _damaged(rng, _json_lines(rng)))
    else:
        rows = [
            {"input_length": _trace_number(rng), "output_length": _trace_number(rng)}
            for _ in range(3)
        ]
        path = _file(".json", _damaged(rng, json.dumps({"data": rows}).encode()))
    trace = load_trace(str(path))
    times = trace.arrivals_s
    check(np.isfinite(times).all() and (times >= 0).all(), "times", times)
    check((np.diff(times) >= 0).all(), "times go back", times)
    for request in trace.requests:
        lengths = (request.prompt_tokens, request.output_tokens)
        check(all(1 <= n <= MOST_TOKENS for n in lengths), "tokens", lengths)
    built = build_workload(trace, WorkloadOptions(rate_rps=2.0), seed=0)
    check(len(built) == len(trace), len(built), "requests of", len(trace))


def _array(rng: random.Random) -> np.ndarray:
    shape = tuple(rng.randrange(4) for _ in range(rng.choice((1, 2, 3, 3, 3))))
    data = np.random.default_rng(rng.getrandbits(32)).integers(-1, 9, shape)
    array = data.astype(rng.choice(("int64", "int32", "float64", "uint8")))
    if array.size and array.dtype.kind == "f" and rng.random() < 0.3:
        array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -1.0, 1e300))
    return array


def recordings(rng: random.Random) -> None:
    """Routing recordings: what is read are finite counts by source, layer and expert."""
    buffer = io.BytesIO()
    if rng.random() < 0.7:
        name = rng.choice(("counts", "counts", "topk_idx", "other"))
        arrays = {name: _array(rng)}
        if rng.random() < 0.3:
            arrays["metadata"] = np.asarray(rng.choice(("{}", "[1", "[" * 50, "NaN", "")))
        if rng.random() < 0.3:
            arrays["steps"] = np.asarray(number(rng) if rng.random() < 0.5 else 5)
        if rng.random() < 0.3:
            arrays[rng.choice(("active", "decode", "physical_to_logical"))] = _array(rng)
        np.savez(buffer, **arrays)
        path = _file(".npz", _damaged(rng, buffer.getvalue()))
    else:
        np.save(buffer, _array(rng))
        path = _file(rng.choice((".npy", ".npy", ".pt")), _damaged(rng, buffer.getvalue()))
    found = read_routing(path, rng.choice((None, None, 4)))
    check(found.counts.ndim == 3, "counts of shape", found.counts.shape)
    check(np.isfinite(found.counts).all() and (found.counts >= 0).all(), "counts", found.counts)
    check(found.steps >= 1, found.steps, "steps")


@lru_cache(maxsize=1)
def _profile() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "gimbal" / "core" / "cost" / "profiles" / "cpu-demo.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def _changed(rng: random.Random, values: Any) -> Any:
    """`values` with one place changed, lost or added."""
    if isinstance(values, dict) and values and rng.random() < 0.9:
        key = rng.choice(list(values))
        changed = dict(values)
        if rng.random() < 0.1:
            del changed[key]
        else:
            changed[key] = _changed(rng, changed[key])
        return changed
    return json_value(rng, 1)


def yaml_files(rng: random.Random) -> None:
    """Configuration and cost profiles as files; JSON is YAML."""
    if rng.random() < 0.3:
        changed = _changed(rng, _profile()) if rng.random() < 0.9 else _profile()
        load_profile(str(_file(".yaml", _damaged(rng, json.dumps(changed).encode(), 1_000))))
        return
    data = json.dumps(mutated(rng, CONFIG_KEYS, 0.05)).encode()
    if rng.random() < 0.1:
        data = rng.choice((b"a: &a [*a]", b"gimbal:\n gimbal: 1", b"levels: [queue\n", b"? [1]\n"))
    config = parse_config(read_config_file(_file(".yaml", _damaged(rng, data, 1_000))), "fuzz")
    check(finite(dataclasses.asdict(config)), "took a number that is not finite")
