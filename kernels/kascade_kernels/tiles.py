"""New tokens cut at tile borders: the one place that does so."""

from typing import NamedTuple

import numpy as np

from kascade_kernels.budget import TILE


class Tiles(NamedTuple):
    """Query tiles of a step on the host, in the order of q; int64 [tiles] each.

    batch_index: which request of the batch. ends: keys that the tile's last query sees.
    starts: the tile's first query in q. tokens: its queries, 1 to 32.
    """

    batch_index: np.ndarray
    ends: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray

    @property
    def index(self) -> np.ndarray:
        """Each tile's number within its request: tile t holds positions [32t, 32t + 32)."""
        return (self.ends - 1) // TILE

    @property
    def candidates(self) -> np.ndarray:
        """Keys before each tile."""
        return TILE * self.index


def cut_tiles(begins: np.ndarray, ends: np.ndarray) -> Tiles:
    """Cut each request's positions [begin, end), int64 [requests] each, at tile borders.

    >>> tiles = cut_tiles(np.array([40]), np.array([100]))  # 60 new tokens after 40 cached ones
    >>> tiles.index.tolist(), tiles.starts.tolist(), tiles.tokens.tolist()
    ([1, 2, 3], [0, 24, 56], [24, 32, 4])
    """
    first_tile = begins // TILE
    tiles = np.where(ends > begins, (ends - 1) // TILE - first_tile + 1, 0)
    batch_index = np.repeat(np.arange(len(begins)), tiles)
    ordinal = np.arange(tiles.sum()) - np.repeat(tiles.cumsum() - tiles, tiles)
    tile = first_tile[batch_index] + ordinal
    positions = np.maximum(tile * TILE, begins[batch_index])
    tile_ends = np.minimum((tile + 1) * TILE, ends[batch_index])
    row_of_request = (ends - begins).cumsum() - (ends - begins)
    starts = row_of_request[batch_index] + positions - begins[batch_index]
    return Tiles(batch_index, tile_ends, starts, tile_ends - positions)
