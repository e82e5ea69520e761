"""From statistics to a plan: pick anchors, keep the rows that reuse layers need, say how."""

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.anchors import AnchorChoice, pick_anchors, total_gain
from kascade_sglang.calibration.collect import MASS_RATIOS, LayerStats
from kascade_sglang.calibration.similarity import anchor_gain, layer_similarity
from kascade_sglang.plan.schema import ModelShape, Plan

CRITERIA = ("error", "mass")
"""``error``: what borrowed keys do to the model's last hidden state. ``mass``: the paper's (section
3.3), recovered attention mass times importance."""
COUNTS = range(3, 9)
"""Counts of anchors whose best choice every plan names (section 3.3 tries these)."""


def build_plan(
    stats: LayerStats,
    anchors: int | Sequence[int],
    model: str,
    shape: ModelShape,
    budget: Budget,
    heads: str,
    criterion: str,
    provenance: dict[str, Any],
) -> Plan:
    """Build the plan of measured statistics.

    anchors: how many to pick, or the layers themselves, of ``stats.layers``.
    model: the name to write. criterion: one of CRITERIA, of what was measured; the objective
    grows with the plan's worth. provenance: what the statistics were made from; objective, scores,
    importance, mass, error and the best choice of every count are added here. Errors are of
    selections per head, whatever ``heads`` says.
    """
    score = stats.pooled if heads == "pooled" else layer_similarity(stats.similarity)
    gain = anchor_gain(score, stats.importance) if criterion == "mass" else -stats.error
    if isinstance(anchors, int):
        choice = pick_anchors(gain, anchors)
    else:
        places = tuple(stats.layers.index(layer) for layer in anchors)
        choice = AnchorChoice(places, total_gain(gain, places))
    by_layer: list[float | None] = [None] * shape.layers
    for layer, value in zip(stats.layers, stats.importance, strict=True):
        by_layer[layer] = round(float(value), 4)
    return Plan(
        model=model,
        shape=shape,
        anchors=_layers_at(stats, choice.anchors),
        similarity=_borrowed_rows(stats, choice.anchors),
        budget=budget,
        heads=heads,
        windowed=tuple(layer for layer in range(shape.layers) if layer not in stats.layers),
        provenance={
            **provenance,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "prompts": stats.prompts,
            "tokens": stats.tokens,
            "tiles": stats.tiles,
            "anchors_by": "dynamic programme" if isinstance(anchors, int) else "the user",
            "criterion": criterion,
            "objective": round(choice.objective, 6),
            "choices": _choices(stats, gain),
            "importance": by_layer,
            "layer_score": [row[i + 1 :].round(4).tolist() for i, row in enumerate(score)],
            "error": None if stats.error is None else _rounded(stats.error),
            "error_rows": stats.rows,
            "mass": {
                f"{ratio:g}": table.round(4).tolist()
                for ratio, table in zip(MASS_RATIOS, stats.mass, strict=True)
            },
        },
    )


def _rounded(error: np.ndarray) -> list[list[float]]:
    """Row i, from its diagonal on, to four digits: errors of different layers are far apart."""
    return [[float(f"{value:.4g}") for value in row[i:]] for i, row in enumerate(error)]


def _layers_at(stats: LayerStats, places: Sequence[int]) -> tuple[int, ...]:
    """Measured layers are numbered on their own; return the model's numbers."""
    return tuple(stats.layers[place] for place in places)


def _borrowed_rows(
    stats: LayerStats, anchors: Sequence[int]
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """For every reuse layer, its heads' similarity to the heads of its nearest earlier anchor."""
    rows = {}
    for place, layer in enumerate(stats.layers):
        anchor = max(anchor for anchor in anchors if anchor <= place)
        if anchor != place:
            table = stats.similarity[anchor, place].round(6).tolist()
            rows[layer] = tuple(tuple(row) for row in table)
    return rows


def _choices(stats: LayerStats, gain: np.ndarray) -> list[dict[str, Any]]:
    """The best anchors of every count that the model has layers for, and their objective."""
    best = [pick_anchors(gain, count) for count in COUNTS if count <= len(stats.layers)]
    return [
        {
            "anchors": list(_layers_at(stats, choice.anchors)),
            "objective": round(choice.objective, 6),
        }
        for choice in best
    ]
