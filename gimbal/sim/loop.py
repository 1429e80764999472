"""The simulated cluster's feedback: damped pressure for dispatch, the source mix for placement."""

from __future__ import annotations

import numpy as np

from gimbal.core.contracts import FloatArray, RoutingCounts
from gimbal.core.cost.profile import Profile
from gimbal.core.feedback import damping, pressure, sources
from gimbal.core.feedback.outlook import Outlook
from gimbal.core.feedback.pressure import PERIOD_STEPS
from gimbal.core.placement.problem import constants_of
from gimbal.sim.cluster import Cluster
from gimbal.sim.routing import RoutingTables


class Loop:
    """Collects what the levels tell each other in one run.

    Args:
        pressure: see `gimbal.report.arms.Simulated`.
        off_source_us: time of one pair that leaves its engine; 0 under all-gather.

    Attributes:
        pressure_us: [dp] what dispatch reads.
    """

    def __init__(
        self, cluster: Cluster, profile: Profile, pressure: str, domains: int, off_source_us: float
    ) -> None:
        self._pressed_by, self._tp, self._off_source_us = pressure, cluster.tp, off_source_us
        self._constants = constants_of(profile)
        self._kinds = np.zeros((2, cluster.dp, domains))  # tokens of steps with, without prefill
        self._steps = np.zeros(2)
        self._mixes: list[FloatArray] = []
        self._outlook = Outlook()
        self.pressure_us: FloatArray = np.zeros(cluster.dp)
        self._damped = damping.DampedSignal(cluster.dp, self._gain(profile))

    def _gain(self, profile: Profile) -> float:
        """Filter gain for this machine: K is pressure answered per microsecond published.

        Dispatch answers p microseconds by p / c tokens of backlog, c being its price of a token.
        A token of backlog is at most layers * top_k pairs on the wire (``sending``), or takes
        layers * top_k * us_per_pair of the fullest rank (``owner``).
        """
        pairs = profile.model.layers * profile.model.top_k
        per_pair = self._off_source_us
        if self._pressed_by == "owner":
            per_pair = profile.moe.per_pair_us
        token_us = profile.model.layers * (
            profile.moe.per_group_token_us
            + profile.model.top_k * profile.moe.per_pair_us / profile.layout.ep
            + sum(t.per_unit_us for t in (*profile.per_rank_token, *profile.per_group_token))
        )
        # A decision shows after the step being planned and the window: one step of 32, plus half.
        delay = damping.delay_updates(2.0, 1.0, PERIOD_STEPS)
        return damping.gain(pairs * per_pair / token_us, delay)

    def observe(self, tokens: FloatArray, decodes: FloatArray, tables: RoutingTables) -> None:
        """One step: [dp, domains] tokens, and [dp, domains] of them that decode."""
        kind = 0 if tokens.sum() > decodes.sum() else 1
        self._kinds[kind] += tokens
        self._steps[kind] += 1
        if self._steps.sum() >= PERIOD_STEPS:
            self.pressure_us = self._damped.update(self._measure(tables))
            self._kinds[:] = 0
            self._steps[:] = 0

    def _measure(self, tables: RoutingTables) -> FloatArray:
        per_step = self._kinds / np.maximum(self._steps, 1.0)[:, None, None]
        share = self._steps / self._steps.sum()
        if self._pressed_by == "owner":
            pairs = np.einsum("ked,dlr->klr", per_step, tables.pairs)
            active = np.stack([tables.active_at(kind.sum()) for kind in per_step])
            load = pressure.RankLoad(pairs, active, share)
            straggling = pressure.rank_straggling_us(load, self._constants)
            return pressure.owner_pressure_us(straggling, self._tp)
        leaving = np.einsum("ked,edl->kel", per_step, tables.leaving(self._tp))
        each = [pressure.sending_pressure_us(kind, self._off_source_us) for kind in leaving]
        return np.asarray(share @ np.stack(each))

    def realized(self, predicted_us: float, realized_us: float) -> None:
        """Gains per step of the last rearrangement: as predicted, and as measured."""
        self._outlook.realized(predicted_us, realized_us)

    def plan_for(
        self, counts: RoutingCounts, window: FloatArray, affinity_us: FloatArray | None
    ) -> tuple[RoutingCounts, float]:
        """(expected counts of the next window, windows for which the mix should hold).

        Args:
            window: [dp, domains] tokens of the last window.
            affinity_us: [domains, dp] dispatch's affinity costs, None without affinity.
        """
        self._mixes.append(window.copy())
        if affinity_us is None:
            expected = self._outlook.observe(counts)
            return expected, self._outlook.windows
        preferred = sources.preferred_shares(affinity_us, np.ones(len(window)), window.sum(axis=0))
        likely = sources.expected_tokens(window, preferred, movable=0.5)
        held = sources.stable_windows(self._mixes[-9:])
        return sources.rescaled(counts, window, likely), self._outlook.earned(held)
