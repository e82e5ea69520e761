"""The dynamic programme against trying every set of anchors."""

from itertools import combinations

import numpy as np
import pytest

from kascade_sglang.calibration.anchors import pick_anchors, total_gain


def gain_of(gain: np.ndarray, anchors: tuple[int, ...]) -> float:
    return sum(
        gain[max(anchor for anchor in anchors if anchor <= layer), layer]
        for layer in range(len(gain))
    )


def every_choice(layers: int, count: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in combinations(range(1, layers), count - 1)]


@pytest.mark.parametrize("layers", range(1, 11))
def test_equals_brute_force(layers: int) -> None:
    gain = np.random.default_rng(layers).random((layers, layers))
    for count in range(1, layers + 1):
        choice = pick_anchors(gain, count)
        best = max(every_choice(layers, count), key=lambda anchors: gain_of(gain, anchors))
        assert choice.anchors == best
        assert choice.objective == pytest.approx(gain_of(gain, best))
        assert choice.objective == pytest.approx(total_gain(gain, best))


@pytest.mark.parametrize("seed", range(20))
def test_ties_go_to_the_lower_layers(seed: int) -> None:
    # Small whole numbers add exactly, so equal totals are equal.
    gain = np.random.default_rng(seed).integers(0, 3, (8, 8)).astype(float)
    for count in range(1, 9):
        choices = every_choice(8, count)
        top = max(gain_of(gain, anchors) for anchors in choices)
        lowest = min(anchors for anchors in choices if gain_of(gain, anchors) == top)
        assert pick_anchors(gain, count).anchors == lowest


def test_lower_triangle_has_no_say() -> None:
    gain = np.random.default_rng(0).random((6, 6))
    spoiled = np.where(np.tri(6, k=-1, dtype=bool), np.nan, gain)
    assert pick_anchors(spoiled, 3) == pick_anchors(gain, 3)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_refuses_an_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4"):
        pick_anchors(np.ones((4, 4)), count)


def test_refuses_gains_that_are_not_finite() -> None:
    gain = np.ones((4, 4))
    gain[1, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        pick_anchors(gain, 2)
