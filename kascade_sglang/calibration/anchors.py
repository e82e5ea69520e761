"""Which layers to make anchors: a dynamic programme over layers (section 3.3)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class AnchorChoice(NamedTuple):
    """The anchors and the total gain of serving every layer from the nearest one before it."""

    anchors: tuple[int, ...]
    objective: float


def total_gain(gain: np.ndarray, anchors: Sequence[int]) -> float:
    """Gain of serving every layer from the nearest of ascending anchors from 0."""
    ends = [*anchors[1:], len(gain)]
    return float(sum(gain[a, a:end].sum() for a, end in zip(anchors, ends, strict=True)))


def pick_anchors(gain: np.ndarray, count: int) -> AnchorChoice:
    """Choose ``count`` anchors, layer 0 among them, with the greatest total gain.

    gain: [layers, layers]; ``gain[i, j]``, i <= j, is the worth of serving layer j from anchor i.
    Among equals the lower layer becomes the next anchor. O(count * layers^2).
    Raises ValueError for a count outside 1..layers or a gain that is not finite.
    """
    layers = len(gain)
    if not 1 <= count <= layers:
        raise ValueError(f"anchors: expected 1 to {layers}, the model's layers, got {count}")
    upper = np.triu(gain)
    if not np.isfinite(upper).all():
        raise ValueError("anchors: the layer scores are not finite numbers")
    # served[i, j]: layers i..j-1 from anchor i.
    served = np.concatenate([np.zeros((layers, 1)), upper.cumsum(axis=1)], axis=1)

    # best[i]: greatest gain of layers i.. when i is an anchor and `left` more follow it.
    best = served[:, layers].copy()
    following: list[np.ndarray] = []
    for left in range(1, count):
        longer = np.full(layers, -np.inf)
        after = np.zeros(layers, dtype=np.int64)
        for anchor in range(layers - left):
            totals = served[anchor, anchor + 1 : layers] + best[anchor + 1 :]
            after[anchor] = anchor + 1 + int(totals.argmax())
            longer[anchor] = totals.max()
        best = longer
        following.append(after)

    anchors = [0]
    for after in reversed(following):
        anchors.append(int(after[anchors[-1]]))
    return AnchorChoice(tuple(anchors), float(best[0]))
