"""Expert placement: which logical expert each physical slot of each rank holds.

`heuristic.plan` is the planner, `gate.decide` says whether its plan is worth the stall and
`verify.check` whether a map is safe. A placer is one class with one method (`contracts.Placer`);
registering it is one line here, and nothing but its name is loaded before somebody asks for it.
"""

from __future__ import annotations

from gimbal.core.contracts import Placer
from gimbal.core.registry import Registry

PLACERS: Registry[Placer] = Registry("placer", "gimbal.placer", ("place",))
_HERE = "gimbal.core.placement"
PLACERS.register("gimbal", f"{_HERE}.heuristic:GimbalPlacer")
PLACERS.register("eplb", f"{_HERE}.eplb:EplbPlacer")
PLACERS.register("eplb-gated", f"{_HERE}.eplb_gated:GatedEplbPlacer")
PLACERS.register("swift", f"{_HERE}.swift:SwiftPlacer")
PLACERS.register("moe-tuner", f"{_HERE}.affinity:MoeTunerPlacer")
PLACERS.register("sem-moe", f"{_HERE}.affinity:SemMoePlacer")
PLACERS.register("static", f"{_HERE}.static:StaticPlacer")
