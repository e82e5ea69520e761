"""What tensor parallelism costs a plan: head maps that stay within a rank."""

from typing import NamedTuple

import numpy as np

from kascade_sglang.plan.schema import Plan

RANKS = (2, 4, 8)


class RankLoss(NamedTuple):
    """Head maps within each of ``ranks`` ranks against the plan's own.

    moved: share of reuse heads whose best anchor head sits on another rank.
    lost: similarity, the mean over reuse heads, that the rank's own best gives up.
    worst: the most that one head gives up.
    """

    ranks: int
    moved: float
    lost: float
    worst: float


def rank_losses(plan: Plan) -> list[RankLoss]:
    """Losses at 2, 4 and 8 ranks, where these divide the KV heads and any layer reuses."""
    kv_heads = plan.shape.kv_heads
    if not plan.borrowing_layers:
        return []
    return [_loss(plan, ranks) for ranks in RANKS if ranks <= kv_heads and kv_heads % ranks == 0]


def _loss(plan: Plan, ranks: int) -> RankLoss:
    width = plan.shape.kv_heads // ranks
    moved, lost = [], []
    for layer in plan.borrowing_layers:
        for start in range(0, plan.shape.kv_heads, width):
            heads = range(start, start + width)
            for head, local in zip(heads, plan.local_head_map(layer, heads), strict=True):
                row = plan.similarity[layer][head]
                lost.append(max(row) - row[start + local])
                moved.append(plan.head_map[layer][head] != start + local)
    return RankLoss(ranks, float(np.mean(moved)), float(np.mean(lost)), float(np.max(lost)))
