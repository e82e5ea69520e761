"""What was measured of a model, from which plans of any anchors are built."""

from typing import Any, NamedTuple

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.build import build_plan, choices_by_mass
from kascade_sglang.calibration.collect import LayerStats
from kascade_sglang.calibration.elimination import chosen
from kascade_sglang.calibration.pools import PoolChoice
from kascade_sglang.plan.schema import POOL_SHARE, ModelShape, Plan

ANCHORS = 8
"""How many ``--criterion mass`` picks where nobody says."""


class Measured(NamedTuple):
    """What any plan of one model can be built from.

    choices: by ``kl``, of ``elimination.choose``; empty otherwise. pools: of
    ``pools.choose_makers``, where makers were to be chosen. model: the name to write.
    """

    stats: LayerStats
    choices: list[AnchorChoice]
    pools: list[PoolChoice]
    model: str
    shape: ModelShape
    budget: Budget
    provenance: dict[str, Any]

    def plan(
        self,
        anchors: int | tuple[int, ...] | None,
        heads: str,
        criterion: str = "kl",
        makers: tuple[int, ...] = (),
        pool_share: float = POOL_SHARE,
    ) -> Plan:
        """Build a plan; see ``CalibrationConfig``. By ``kl``, anchors are of ``choices``."""
        if criterion == "mass":
            count = min(ANCHORS, len(self.stats.layers)) if anchors is None else anchors
            choice, *choices = choices_by_mass(self.stats, heads, count)
        else:
            choice, choices = chosen(self.choices, anchors), self.choices
        by = "the user" if isinstance(anchors, tuple) else criterion
        said = {**self.provenance, "anchors_by": by, "criterion": criterion}
        if self.pools:
            said["pools"] = [
                {"makers": list(one.makers), "objective": round(one.objective, 6)}
                for one in self.pools
            ]
        measured = (self.stats, choice, choices, self.model, self.shape, self.budget)
        return build_plan(*measured, heads, said, makers, pool_share)
