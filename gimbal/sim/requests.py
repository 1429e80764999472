"""A trace's requests as the simulated engines get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gimbal.core.cost.profile import Profile
from gimbal.core.errors import InputError
from gimbal.core.queue.heap import Entry
from gimbal.sim.answers import answered_blocks
from gimbal.workloads.trace import Trace

NEVER = -1


@dataclass(slots=True, eq=False)
class SimRequest:
    """One request inside the simulator.

    `answered_blocks` are the leading blocks of prompt and answer together, where a later prompt
    names them (`gimbal.sim.answers`).
    """

    index: int
    request_id: str
    arrival_us: float
    prompt_tokens: int
    output_tokens: int
    domain: int = 0
    session: str | None = None
    prefix_blocks: tuple[int, ...] = ()
    answered_blocks: tuple[int, ...] = ()
    engine: int = NEVER
    computed: int = 0  # prompt tokens whose KV exists
    target: int = 0  # tokens to prefill: the prompt, plus what was generated before a preemption
    generated: int = 0
    decode_from_step: int = NEVER  # step whose end gave the latest prefill's token
    admitted: int = NEVER  # order of admission
    queued_us: float = 0.0  # the engine took it into its waiting queue
    first_token_us: float = 0.0
    last_token_us: float = 0.0
    preemptions: int = 0
    held: list[int] = field(default_factory=list)  # names in the prefix cache that it uses
    shared_blocks: int = 0  # KV blocks under them
    loads: bool = False  # the KV of its prompt is to come from a prefill engine
    awaited: int = 0  # tokens of it that are to be loaded
    named_places: int = 0  # leading places of its prompt that the prefix cache has been told
    entry: Entry[SimRequest] | None = field(default=None, repr=False)


@dataclass(slots=True)
class StepBatch:
    """What one engine runs in one step."""

    prefill_tokens: int = 0
    decodes: int = 0
    kv_tokens: int = 0
    prefill_pairs: float = 0.0
    prefill_kv_tokens: int = 0
    completed: list[SimRequest] = field(default_factory=list)  # prompts done by this step

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decodes

    @property
    def sampled(self) -> int:
        return self.decodes + len(self.completed)


def requests_of(trace: Trace, profile: Profile, domains: dict[str, int]) -> list[SimRequest]:
    """The trace's requests as they reach dispatch; those without a domain take turns."""
    return [
        SimRequest(
            i,
            f"r{i}",
            r.arrival_s * 1e6 + profile.api_us,
            r.prompt_tokens,
            max(1, r.output_tokens),
            domains.get(r.domain or "", i % len(domains)),
            r.session,
            r.prefix_blocks,
            answered,
        )
        for i, (r, answered) in enumerate(zip(trace.requests, answered_blocks(trace), strict=True))
    ]


def check_lengths(
    requests: Sequence[SimRequest], trace: str, cluster: str, kv_tokens: int, block_size: int
) -> None:
    """Raises InputError for a request that no engine could ever hold in its whole KV blocks."""
    held = kv_tokens - kv_tokens % block_size
    for request in requests:
        needed = request.prompt_tokens + request.output_tokens
        if needed > held:
            raise InputError(
                f"trace {trace}: request {request.index} needs {needed} tokens of KV cache, one "
                f"engine of {cluster} has {held} in blocks of {block_size}; cut lengths or raise "
                "kv_tokens"
            )
