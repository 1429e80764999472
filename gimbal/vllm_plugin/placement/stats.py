"""A worker's routing statistics for ``gimbal stats``, over vLLM's ``collective_rpc``.

Each worker answers with its own row (see `rows`): no collective, nothing waits. Whoever asked
puts the rows of all ranks together with `combine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gimbal.core.errors import InputError
from gimbal.core.guard import LevelGuard
from gimbal.vllm_plugin.placement.controller import Controller
from gimbal.vllm_plugin.placement.member import Member, member_of
from gimbal.vllm_plugin.placement.rows import SourceCounts, Sources, per_source, split_rows
from gimbal.vllm_plugin.placement.window import reduce_window, to_logical
from gimbal.workloads.routing import RoutingFile

_GUARD = LevelGuard("placement")
"""Of its own: a question that cannot be answered does not end the level."""


def gimbal_routing(worker: Any) -> dict[str, Any]:
    """One worker's answer: plain numbers, strings and bytes, empty where there is none."""
    member = member_of(getattr(worker.model_runner, "eplb_state", None))
    if member is None or member.controller is None:
        return {}
    return _GUARD.run("statistics", _routing, member, member.controller) or {}


def _routing(member: Member, controller: Controller) -> dict[str, Any]:
    models, last = [], controller.rebalance_log.last
    for view in controller.models:
        state = view.state
        layers, experts = state.logical_replica_count.shape
        slots = state.physical_to_logical_map
        raw = to_logical(state.expert_load_window, slots.long(), experts).sum(dim=0)
        row = reduce_window(state, raw, controller.notes, controller.step, controller.stall_us)
        local, all_pairs = served_locally(controller, state)
        models.append(
            {
                "local_pairs": local,
                "pairs": all_pairs,
                "name": str(state.model_name),
                "layers": int(layers),
                "experts": int(experts),
                "sources": controller.sources_of(view).name,
                "row": row.cpu().numpy().astype("<f8").tobytes(),
                "physical_to_logical": slots.cpu().numpy().astype("<i4").tobytes(),
                "replaced": b"" if view.replaced is None else view.replaced.astype("<i4").tobytes(),
            }
        )
    return {
        "rank": controller.place.rank,
        "ranks": controller.place.ranks,
        "ranks_per_source": controller.place.ranks_per_source,
        "step": controller.step,
        "proposed": controller.rebalance_log.proposed,
        "committed": controller.rebalance_log.committed,
        "last": None if last is None else asdict(last),
        "fallbacks": dict(controller.guard.counts),
        "level_on": member.acting is not None,
        "pressure_us": controller.pressure_us,
        "straggling_us": [float(s) for s in controller.straggling_us],
        "models": models,
    }


def gimbal_experts_map(worker: Any) -> dict[str, Any]:
    """One worker's answer: the first model's map, level on or off; {} without EPLB."""
    state = getattr(worker.model_runner, "eplb_state", None)
    models = list(getattr(state, "model_states", {}).values())
    if not models:
        return {}
    return {"physical_to_logical": models[0].physical_to_logical_map.cpu().tolist()}


def map_in_force(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one map of all workers; raises InputError where there is none or they differ."""
    maps = [a["physical_to_logical"] for a in answers if a]
    if not maps:
        raise InputError("EPLB is off (--enable-eplb): experts never move")
    if any(other != maps[0] for other in maps[1:]):
        raise InputError("workers answered between two steps of a rearrangement: ask again")
    return {"ranks": len(answers), "physical_to_logical": maps[0]}


def served_locally(controller: Any, model_state: Any) -> tuple[int, int]:
    """(pairs this rank sent to its own engine's ranks, all its pairs) since experts last moved.

    Measured, replica choice included; the placement's local share assumes an even choice.
    """
    import torch

    fresh = torch.from_numpy(controller.notes.newer_than(controller.changed_step))
    window = model_state.expert_load_window
    sent = window[fresh.to(window.device)].sum(dim=(0, 1)).cpu()
    place = controller.place
    per_source = len(sent) // place.ranks * place.ranks_per_source
    own = sent[place.source * per_source : (place.source + 1) * per_source]
    return int(own.sum()), int(sent.sum())


def combine(answers: Sequence[dict[str, Any]]) -> tuple[SourceCounts, np.ndarray, dict[str, Any]]:
    """Counts per source, physical_to_logical [layers, slots] and metadata of the first model.

    Where other hosts or servers have the rest of the group, the sources are those that answered,
    and ``answered`` in the metadata are their ranks. Raises InputError when a rank of an engine is
    missing or the level is off.
    """
    ranks = sorted((a for a in answers if a), key=lambda a: a["rank"])
    if not ranks:
        raise InputError("the level placement is off, or EPLB is (--enable-eplb)")
    known, together = [a["rank"] for a in ranks], ranks[0]["ranks_per_source"]
    engines = sorted({rank // together for rank in known})
    if known != [e * together + i for e in engines for i in range(together)]:
        raise InputError(
            f"{len(known)} of {ranks[0]['ranks']} ranks answered, not all of an engine"
        )
    first = ranks[0]["models"][0]
    shape = first["layers"], first["experts"]
    rows = np.stack([np.frombuffer(a["models"][0]["row"], "<f8") for a in ranks])
    sources = Sources[first["sources"]]
    counts = per_source(split_rows(rows, *shape), ranks[0]["ranks_per_source"], sources)
    placement = np.frombuffer(first["physical_to_logical"], "<i4").reshape(shape[0], -1)
    facts = {k: v for k, v in ranks[0].items() if k not in ("models", "rank")}
    facts["pressure_us"] = [r["pressure_us"] for r in ranks[:: ranks[0]["ranks_per_source"]]]
    if len(known) < facts["ranks"]:
        facts["answered"] = known
    facts["fallbacks"] = {str(a["rank"]): a["fallbacks"] for a in ranks if a["fallbacks"]}
    served = [(a["models"][0]["local_pairs"], a["models"][0]["pairs"]) for a in ranks]
    pairs = sum(p for _, p in served)
    if pairs and counts.sources is not Sources.UNKNOWN:
        facts["served_locally"] = sum(own for own, _ in served) / pairs
    return counts, placement, facts | {"model": first["name"], "sources": counts.sources.value}


def to_file(answers: Sequence[dict[str, Any]]) -> RoutingFile:
    """The answers of all workers as one recording; raises InputError as `combine` does."""
    counts, placement, facts = combine(answers)
    return RoutingFile(
        counts.routing.counts,
        counts.routing.active,
        counts.decode,
        placement,
        counts.routing.steps,
        facts,
    )
