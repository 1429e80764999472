"""The placement objective's constants, taken from a cost-model profile."""

from __future__ import annotations

from gimbal.core.cost.profile import Profile
from gimbal.core.placement.problem import CostConstants


def constants_from_profile(profile: Profile) -> CostConstants:
    """What `profile` says of expert time, links and migration, in the objective's terms."""
    moe, link, model = profile.moe, profile.interconnect, profile.model
    return CostConstants(
        moe_fixed_us=moe.base_us,
        us_per_active_expert=moe.per_active_expert_us,
        us_per_pair=moe.per_pair_us,
        overlap_exponent=moe.norm,
        us_per_gathered_token=moe.per_group_token_us,
        top_k=model.top_k,
        bytes_per_pair=2.0 * 2 * model.hidden,  # bf16 hidden state out and result back
        same_node_gbps=link.same_node_bytes_per_us / 1e3,
        other_node_gbps=link.other_node_bytes_per_us / 1e3,
        expert_bytes=float(model.expert_bytes),
        migration_gbps=link.migration_bytes_per_us / 1e3,
        migration_fixed_us=link.migration_layer_us,
    )
