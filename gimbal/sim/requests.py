"""A trace's requests as the simulated engines get them."""

from __future__ import annotations

from collections.abc import Sequence

from gimbal.core.cost.profile import Profile
from gimbal.core.errors import InputError
from gimbal.sim.engine import SimRequest
from gimbal.workloads.trace import Trace


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
        )
        for i, r in enumerate(trace.requests)
    ]


def check_lengths(requests: Sequence[SimRequest], trace: str, cluster: str, kv_tokens: int) -> None:
    """Raises InputError for a request that no engine could ever hold."""
    for request in requests:
        needed = request.prompt_tokens + request.output_tokens
        if needed > kv_tokens:
            raise InputError(
                f"trace {trace}: request {request.index} needs {needed} tokens of KV cache, one "
                f"engine of {cluster} has {kv_tokens}; cut lengths or raise kv_tokens"
            )
