"""From statistics to a plan: pick anchors, keep the rows that reuse layers need, say how."""

import datetime
from collections.abc import Sequence
from typing import Any

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.anchors import AnchorChoice, pick_anchors, total_gain
from kascade_sglang.calibration.collect import MASS_RATIOS, LayerStats
from kascade_sglang.calibration.similarity import anchor_gain, layer_similarity
from kascade_sglang.plan.schema import ModelShape, Plan

CRITERIA = ("kl", "mass")
"""``kl``: divergence of the model's answers, in nats, where all layers are sparse. ``mass``: the
paper's (section 3.3), recovered attention mass times importance."""
COUNTS = range(3, 9)
"""Counts of anchors whose best choice by mass is named (section 3.3 tries these)."""


def choices_by_mass(
    stats: LayerStats, heads: str, anchors: int | Sequence[int]
) -> list[AnchorChoice]:
    """The anchors asked for, then the best of every count in COUNTS; objectives are gains.

    anchors: how many, or the layers themselves, of ``stats.layers``.
    """
    score = stats.pooled if heads == "pooled" else layer_similarity(stats.similarity)
    gain = anchor_gain(score, stats.importance)
    counts = [count for count in COUNTS if count <= len(stats.layers)]
    if isinstance(anchors, int):
        found = [pick_anchors(gain, anchors)]
    else:
        places = tuple(stats.layers.index(layer) for layer in anchors)
        found = [AnchorChoice(places, total_gain(gain, places))]
    found += [pick_anchors(gain, count) for count in counts]
    # Measured layers are numbered on their own.
    return [
        AnchorChoice(tuple(stats.layers[place] for place in places), gain) for places, gain in found
    ]


def build_plan(
    stats: LayerStats,
    choice: AnchorChoice,
    choices: Sequence[AnchorChoice],
    model: str,
    shape: ModelShape,
    budget: Budget,
    heads: str,
    provenance: dict[str, Any],
    makers: tuple[int, ...] = (),
    pool_share: float | None = None,
) -> Plan:
    """Build the plan of measured statistics and chosen anchors.

    choices: the best of other counts, to be named beside it. model: the name to write.
    makers, pool_share: see ``Plan``.
    provenance: what the plan was made from; scores, importance, mass and choices are added here.
    """
    score = stats.pooled if heads == "pooled" else layer_similarity(stats.similarity)
    by_layer: list[float | None] = [None] * shape.layers
    for layer, value in zip(stats.layers, stats.importance, strict=True):
        by_layer[layer] = round(float(value), 4)
    return Plan(
        model=model,
        shape=shape,
        anchors=choice.anchors,
        similarity=_borrowed_rows(stats, choice.anchors, makers),
        budget=budget,
        heads=heads,
        makers=makers,
        pool_share=pool_share if makers else None,
        windowed=tuple(layer for layer in range(shape.layers) if layer not in stats.layers),
        provenance={
            **provenance,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "prompts": stats.prompts,
            "tokens": stats.tokens,
            "tiles": stats.tiles,
            "objective": round(choice.objective, 6),
            "choices": [
                {"anchors": list(one.anchors), "objective": round(one.objective, 6)}
                for one in choices
            ],
            "importance": by_layer,
            "layer_score": [row[i + 1 :].round(4).tolist() for i, row in enumerate(score)],
            "mass": {
                f"{ratio:g}": table.round(4).tolist()
                for ratio, table in zip(MASS_RATIOS, stats.mass, strict=True)
            },
        },
    )


def _borrowed_rows(
    stats: LayerStats, anchors: Sequence[int], makers: Sequence[int]
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """For every layer that borrows, its heads' similarity to the heads that it borrows from.

    A reuse layer borrows from the last anchor before it, an anchor from the last maker.
    """
    rows = {}
    for place, layer in enumerate(stats.layers):
        lenders = makers if layer in anchors else anchors
        earlier = [one for one in lenders if one < layer]
        if earlier and layer not in makers:
            table = stats.similarity[stats.layers.index(earlier[-1]), place].round(6).tolist()
            rows[layer] = tuple(tuple(row) for row in table)
    return rows
