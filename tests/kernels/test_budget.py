"""The budget of every tile: design formula, properties, refusals."""

import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from kascade_kernels.budget import TILE, Budget, PoolRule, tile_of

BUDGETS = [
    pytest.param(Budget(ratio, min_k), id=f"{ratio}-{min_k}")
    for ratio in (0.1, 0.05, 0.2, 0.333333, 1, 1e-6)
    for min_k in (64, 100, 128, 2048)
]
TILES = [*range(200), 1023, 4095, 32767]


@pytest.mark.parametrize("budget", BUDGETS)
def test_formula(budget: Budget) -> None:
    """min(max(min_k, floor(ratio L)) - 32, 32t) with L = 32(t + 1), in exact arithmetic."""
    ratio = Fraction(str(budget.ratio))
    for tile in TILES:
        length = 32 * (tile + 1)
        wanted = max(budget.min_k, math.floor(ratio * length)) - 32
        assert budget.selected(tile) == min(wanted, 32 * tile)


@pytest.mark.parametrize("budget", BUDGETS)
def test_many_tiles_at_once(budget: Budget) -> None:
    counts = budget.selected_counts(np.array(TILES))
    assert counts.tolist() == [budget.selected(tile) for tile in TILES]


@pytest.mark.parametrize("budget", BUDGETS)
def test_properties(budget: Budget) -> None:
    previous = 0
    for tile in range(2000):
        selected = budget.selected(tile)
        assert 0 <= selected <= budget.candidates(tile) == 32 * tile
        assert selected >= previous  # a later tile never attends to fewer keys
        assert selected >= min(budget.min_k - TILE, 32 * tile)
        assert budget.is_dense(tile) == (selected == 32 * tile)
        previous = selected


@pytest.mark.parametrize(
    "tile, selected",
    [(0, 0), (1, 32), (3, 96), (4, 96), (39, 96), (40, 99), (319, 992), (4095, 13075)],
)
def test_default_budget_by_hand(tile: int, selected: int) -> None:
    assert Budget().selected(tile) == selected


def test_first_sparse_tile_of_the_default_budget() -> None:
    assert [Budget().is_dense(tile) for tile in range(6)] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("budget", BUDGETS)
def test_attended_counts_own_tile_causally(budget: Budget) -> None:
    for position in (0, 1, 31, 32, 33, 1000, 131071):
        tile = tile_of(position)
        own = len(range(TILE * tile, position + 1))
        assert budget.attended(position) == budget.selected(tile) + own <= position + 1


def test_ratio_one_is_dense_everywhere() -> None:
    assert all(Budget(1.0, 64).is_dense(tile) for tile in range(5000))


@pytest.mark.parametrize("position, tile", [(0, 0), (31, 0), (32, 1), (63, 1), (131072, 4096)])
def test_tile_of(position: int, tile: int) -> None:
    assert tile_of(position) == tile


def test_ratio_ppm_rounds() -> None:
    # 0.00397 * 1e6 is 3969.9999999999995 in binary floating point.
    assert Budget(0.00397).ratio_ppm == 3970


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), "0.1", None])
def test_refuses_ratio(ratio: object) -> None:
    with pytest.raises(ValueError, match="topk_ratio: expected a number in"):
        Budget(ratio, 128)  # type: ignore[arg-type]


@pytest.mark.parametrize("min_k", [63, 0, -1, 128.0, "128", None])
def test_refuses_min_k(min_k: object) -> None:
    with pytest.raises(ValueError, match="min_k: expected a whole number of at least 64"):
        Budget(0.1, min_k)  # type: ignore[arg-type]


def test_an_ablation_may_change_the_tile() -> None:
    command = "import kascade_sglang; from kascade_kernels.budget import TILE, Budget, tile_of; "
    command += "print(TILE, tile_of(100), Budget(0.1, 64).selected(100))"
    environment = {**os.environ, "KASCADE_TILE": "16"}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["16", "6", str(1616 // 10 - 16)]


@pytest.mark.parametrize("share", [0.001, 0.25, 0.9])
def test_pools_hold_the_budget_twice_and_whole_tiles(share: float) -> None:
    rule = PoolRule(share)
    for budget in (Budget(0.1, 64), Budget(0.4, 96), Budget(1.0, 64)):
        tiles = np.arange(400)
        selected = budget.selected_counts(tiles)
        pooled = rule.pooled_counts(tiles, selected)
        assert (pooled % TILE == 0).all() and (pooled <= TILE * tiles).all()
        least = np.maximum(2 * selected, np.ceil(TILE * tiles * share))
        assert (pooled >= np.minimum(least, TILE * tiles)).all()
        assert (pooled < least + TILE).all() and (np.diff(pooled) >= 0).all()
        assert [rule.pooled(tile, budget) for tile in (0, 7, 399)] == pooled[[0, 7, 399]].tolist()


@pytest.mark.parametrize("share", [0, 1, -0.5, "0.5", True, None])
def test_refuses_shares_that_are_none(share: object) -> None:
    with pytest.raises(ValueError, match="pool_share: expected a number between 0 and 1"):
        PoolRule(share)
