"""What a vLLM command line says, as far as Gimbal must know; every flag still goes to vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gimbal.core.errors import InputError
from gimbal.core.json_text import parse_json
from gimbal.vllm_plugin.serve.command_line import parse

_EXTRA = "--additional-config"
_PORT = 8000


@dataclass(frozen=True, slots=True)
class VllmFlags:
    """What flags and ``--config`` file say; None or vLLM's default where they say nothing.

    Attributes:
        rest: the arguments for vLLM, all but ``--additional-config``, in their order.
        given: names of what is set, as vLLM has them (``data_parallel_size``).
        host: None: every address.
        dp_address: of the head.
        dp_local: DP engines of this machine where that is said or follows from ``--nnodes``.
        api_servers: API servers asked for.
        balancing: who chooses the engine: ``internal``, ``hybrid`` or ``external``.
        pcp: ranks of prefill context parallelism.
        eplb_config, additional_config: vLLM's, as mappings.
    """

    rest: tuple[str, ...]
    given: frozenset[str]
    model: str | None = None
    served_name: str | None = None
    host: str | None = None
    port: int = _PORT
    uds: str | None = None
    tls: bool = False
    grpc: bool = False
    dp: int = 1
    dp_address: str | None = None
    dp_local: int | None = None
    tp: int = 1
    pp: int = 1
    pcp: int = 1
    nodes: int = 1
    expert_parallel: bool = False
    eplb: bool = False
    headless: bool = False
    api_servers: int | None = None
    balancing: str = "internal"
    eplb_config: dict[str, Any] | None = None
    additional_config: dict[str, Any] | None = None

    @property
    def local_engines(self) -> int:
        """DP engines started on this machine."""
        return self.dp if self.dp_local is None else self.dp_local

    @property
    def ranks_per_engine(self) -> int:
        """Worker processes of one engine."""
        return self.tp * self.pp * self.pcp

    @property
    def redundant_experts(self) -> int:
        redundant = (self.eplb_config or {}).get("num_redundant_experts", 0)
        if not isinstance(redundant, int):
            raise InputError(
                f"--eplb-config: num_redundant_experts: expected a whole number, got {redundant!r}"
            )
        return redundant


def read_flags(arguments: Sequence[str], version: str) -> VllmFlags:
    """Parses `arguments` of ``gimbal serve`` that are not Gimbal's own, for vLLM `version`.

    Raises InputError for what vLLM would refuse, and for sizes below one.
    """
    found = parse(arguments, version)

    def size(name: str, least: int = 1) -> int:
        value = found.get(name)
        if value is None:
            return 1
        if value < least:
            raise InputError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
        return int(value)

    names = found.get("served_model_name")
    return VllmFlags(
        rest=_without_extra(arguments),
        given=frozenset(found),
        model=found.get("model_tag") or found.get("model"),
        served_name=names[0] if names else None,
        host=found.get("host"),
        port=found.get("port", _PORT),
        uds=found.get("uds"),
        tls=bool(found.get("ssl_keyfile") or found.get("ssl_certfile")),  # as uvicorn has it
        grpc=found.get("grpc", False),
        dp=size("data_parallel_size"),
        dp_address=found.get("data_parallel_address"),
        dp_local=_local_engines(found, size),
        tp=size("tensor_parallel_size"),
        pp=size("pipeline_parallel_size"),
        pcp=size("prefill_context_parallel_size"),
        nodes=size("nnodes"),
        expert_parallel=found.get("enable_expert_parallel", False),
        eplb=found.get("enable_eplb", False),
        headless=found.get("headless", False),
        api_servers=found.get("api_server_count"),
        balancing=_balancing(found),
        eplb_config=_json_option(found, "eplb_config"),
        additional_config=_json_option(found, "additional_config"),
    )


def _local_engines(found: dict[str, Any], size: Callable[..., int]) -> int | None:
    """As `EngineArgs.create_engine_config` has it."""
    if found.get("data_parallel_external_lb") or found.get("data_parallel_rank") is not None:
        return 1
    if found.get("data_parallel_size_local") is not None:
        return size("data_parallel_size_local", 0)
    if (nodes := size("nnodes")) > 1:
        return max(size("data_parallel_size") // nodes, 1)
    return None


def _balancing(found: dict[str, Any]) -> str:
    """As ``vllm serve`` has it."""
    names = ("external_lb", "multi_port_external_lb")
    alone = any(found.get(f"data_parallel_{name}") for name in names)
    if alone or found.get("data_parallel_rank") is not None:
        return "external"
    hybrid = found.get("data_parallel_hybrid_lb")
    return "hybrid" if hybrid or found.get("data_parallel_start_rank") is not None else "internal"


def _json_option(found: dict[str, Any], name: str) -> dict[str, Any]:
    text = found.get(name)
    if text is None:
        return {}
    flag = f"--{name.replace('_', '-')}"
    value = parse_json(text, flag)
    if not isinstance(value, dict):
        raise InputError(f"{flag}: expected a JSON object, got {text!r}")
    return value


def _without_extra(arguments: Sequence[str]) -> tuple[str, ...]:
    """`arguments` less ``--additional-config``, dotted or not."""
    kept: list[str] = []
    takes_value = False
    for word in arguments:
        if takes_value:
            takes_value = False
            continue
        name, equals, _ = word.partition("=")
        if name.partition(".")[0].replace("_", "-") == _EXTRA:
            takes_value = not equals
        else:
            kept.append(word)
    return tuple(kept)
