"""How many keys queries read: what the budget says, for counters and reports."""

from dataclasses import dataclass

import numpy as np

from kascade_kernels.budget import TILE
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import LayerRole


@dataclass(frozen=True)
class KeyReads:
    """Keys read per query and KV head, summed over layers and queries.

    attended: K and V read by attention. scored: K read by an anchor's selection; comparisons
    that ignore the keys score none. dense: what dense attention reads.
    """

    attended: int
    scored: int
    dense: int


def key_reads(
    config: KascadeConfig, positions: np.ndarray, layers: range | None = None
) -> KeyReads:
    """Count the reads of the queries at ``positions``, int64 [queries], through ``layers``.

    layers: those of one pipeline stage; None means all.
    """
    plan, budget = config.plan, config.budget
    roles = [plan.role(layer) for layer in layers or range(plan.shape.layers)]
    dense = roles.count(LayerRole.DENSE)
    selecting = dense + roles.count(LayerRole.ANCHOR) if config.selection == "topk" else 0
    tiles = positions // TILE
    selected = budget.selected_counts(tiles)
    sparse = selected < TILE * tiles
    visible = int((positions + 1).sum())
    attended = int((selected + positions - TILE * tiles + 1).sum())
    return KeyReads(
        attended=(len(roles) - dense) * attended + dense * visible,
        scored=selecting * int((positions[sparse] + 1).sum()),
        dense=len(roles) * visible,
    )
