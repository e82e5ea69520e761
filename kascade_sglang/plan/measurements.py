"""The measurements that ``kascade calibrate`` leaves in a plan's provenance, as arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kascade_sglang.plan.schema import Plan, PlanError

DAMAGED = (KeyError, TypeError, ValueError, OverflowError)
"""What reading provenance raises that is not ours; a whole number may be larger than any float."""


@dataclass(frozen=True)
class Measurements:
    """What was measured of the M layers with full attention, H KV heads each.

    similarity: [M, M]; [i, j], i <= j, layer j served from layer i. NaN below the diagonal.
    importance: [M], mean over tokens of 1 - cos(x, x + attention(x)).
    mass: budget ratio -> [M, H], the share of attention that a head's own Top-k recovers.
    choices: (anchors, objective) for every count of anchors that was tried; objectives are losses
    of the model's answers in nats, or, where mass has chosen, gains.
    """

    similarity: np.ndarray
    importance: np.ndarray
    mass: dict[float, np.ndarray]
    choices: list[tuple[tuple[int, ...], float]]


def measurements_of(plan: Plan) -> Measurements:
    """Read a plan's measurements; raises PlanError where it holds none, or damaged ones."""
    try:
        return _read(plan)
    except (*DAMAGED, IndexError, AttributeError) as error:
        raise PlanError(
            "plan: expected the measurements that `kascade calibrate` leaves in its provenance, "
            f"found none that can be drawn ({type(error).__name__}: {error}); calibrate again"
        ) from error


def choices_of(plan: Plan) -> list[tuple[tuple[int, ...], float]]:
    """Return (anchors, objective) for every count of anchors tried; empty for other plans."""
    raw = plan.provenance.get("choices")
    try:
        return [(tuple(choice["anchors"]), float(choice["objective"])) for choice in raw or []]
    except DAMAGED:
        return []  # provenance is free-form: a hand-written one may hold anything


def _read(plan: Plan) -> Measurements:
    layers, provenance = plan.full_layers, plan.provenance
    similarity = np.full((len(layers), len(layers)), np.nan)
    np.fill_diagonal(similarity, 1.0)
    for i, row in enumerate(provenance["layer_score"][: len(layers)]):
        similarity[i, i + 1 :] = row
    importance = np.array([provenance["importance"][layer] for layer in layers], dtype=float)
    if not np.isfinite(importance).all():
        raise ValueError("importance is not finite")
    mass = {float(ratio): _table(rows, plan) for ratio, rows in provenance["mass"].items()}
    if not mass:
        raise ValueError("mass is empty")
    return Measurements(similarity, importance, mass, choices_of(plan))


def _table(rows: Any, plan: Plan) -> np.ndarray:
    table = np.array(rows, dtype=float)
    if table.shape != (len(plan.full_layers), plan.shape.kv_heads):
        raise ValueError(f"mass is {list(table.shape)}")
    return table
