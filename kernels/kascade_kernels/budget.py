"""How many keys a query tile attends to: a function of the tile's absolute position alone.

Because neither the prompt's length nor the chunk enters, a chunked prefill and a prefix-cache hit
give a position the same budget. Decoding has one of its own.
"""

from dataclasses import dataclass

import numpy as np

TILE = 32
"""Positions in one query tile; tile ``t`` holds positions ``[32t, 32t + 32)``.

Kernels know 32 only. For ablations on the torch reference ``kascade_sglang`` sets another as it
is imported, before other modules copy it.
"""

PPM = 1_000_000
MOST_KEYS = 2**31
"""More than any context holds."""


def tile_of(position: int) -> int:
    """Return the index of the tile that holds an absolute position."""
    return position // TILE


@dataclass(frozen=True)
class Budget:
    """The share of the context that a tile attends to, with a floor.

    ratio: share of the positions up to the end of the tile, in (0, 1].
    min_k: least number of positions attended to, own tile included; at least two tiles.

    Raises ValueError for values outside these ranges.

    >>> budget = Budget(ratio=0.1, min_k=128)
    >>> budget.attended(127), budget.attended(9_999)
    (128, 985)
    >>> budget.is_dense(tile_of(127)), budget.is_dense(tile_of(9_999))
    (True, False)
    """

    ratio: float = 0.1
    min_k: int = 128

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 < self.ratio <= 1:
            raise ValueError(
                f"topk_ratio: expected a number in (0, 1], got {self.ratio!r}; "
                "0.1 attends to a tenth of the context"
            )
        if not isinstance(self.min_k, int) or not 2 * TILE <= self.min_k < MOST_KEYS:
            raise ValueError(
                f"min_k: expected a whole number of at least {2 * TILE} keys, below {MOST_KEYS}, "
                f"got {self.min_k!r}"
            )

    @property
    def is_everything(self) -> bool:
        """Whether every tile attends to all keys that it may see."""
        return self.ratio_ppm == PPM

    @property
    def ratio_ppm(self) -> int:
        """The ratio in millionths, so that host and device round alike."""
        return round(self.ratio * PPM)

    def candidates(self, tile: int) -> int:
        """Number of keys before the tile, among which it selects."""
        return TILE * tile

    def selected(self, tile: int) -> int:
        """Number of keys selected before the tile: min(max(min_k, floor(ratio L)) - 32, 32t)."""
        return int(self.selected_counts(np.array(tile)))

    def selected_counts(self, tiles: np.ndarray) -> np.ndarray:
        """``selected`` of many tiles, int64."""
        wanted = np.maximum(self.min_k, TILE * (tiles + 1) * self.ratio_ppm // PPM) - TILE
        return np.minimum(wanted, TILE * tiles)

    def is_dense(self, tile: int) -> bool:
        """Whether the budget covers every key the tile may see."""
        return self.selected(tile) == self.candidates(tile)

    def attended(self, position: int) -> int:
        """Number of keys that the query at this position attends to, its own key included."""
        tile = tile_of(position)
        return self.selected(tile) + position - TILE * tile + 1


POOL_FACTOR = 2
"""A candidate pool holds at least so many times the keys that are selected from it."""


@dataclass(frozen=True)
class PoolRule:
    """How many keys a maker leaves for the anchors after it to select from: its candidate pool.

    share: of the keys before a tile, in (0, 1). A pool holds no less than twice what the budget
    selects, in whole tiles, so that pool and own tile are cut into tiles as a shorter context is.

    Raises ValueError for a share outside this range.

    >>> rule = PoolRule(share=0.25)
    >>> rule.pooled(tile_of(9_999), Budget(ratio=0.1)), rule.pooled(tile_of(127), Budget())
    (2496, 96)
    """

    share: float

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share < 1:
            raise ValueError(
                f"pool_share: expected a number between 0 and 1, got {self.share!r}; 0.25 leaves "
                "a quarter of the keys"
            )

    @property
    def share_ppm(self) -> int:
        """The share in millionths, so that host and device round alike."""
        return round(self.share * PPM)

    def pooled(self, tile: int, budget: Budget) -> int:
        """Number of keys before the tile in its pool, of which ``budget`` selects."""
        return int(self.pooled_counts(np.array(tile), budget.selected_counts(np.array(tile))))

    def pooled_counts(self, tiles: np.ndarray, selected: np.ndarray) -> np.ndarray:
        """``pooled`` of many tiles, int64; selected: keys that each tile selects."""
        before = TILE * tiles
        share = -(-before * self.share_ppm // PPM)
        wanted = np.maximum(share, POOL_FACTOR * selected)
        return np.minimum(-(-wanted // TILE) * TILE, before)
