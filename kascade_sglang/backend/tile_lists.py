"""How long the lists of a step's tiles are and where they lie, requests' own budgets included."""

import numpy as np

from kascade_kernels.budget import Budget
from kascade_kernels.tiles import Tiles


def selected_counts(tiles: Tiles, budget: Budget, asked: tuple[Budget | None, ...]) -> np.ndarray:
    """Return how many keys each tile selects, int64 [tiles].

    asked: by request of the batch, the budgets that some asked for; None is ``budget``.
    """
    selected = budget.selected_counts(tiles.index)
    for request, own in enumerate(asked):
        if own is not None:
            mine = tiles.batch_index == request
            selected[mine] = own.selected_counts(tiles.index[mine])
    return selected


def lay_out_lists(
    tiles: Tiles, counts: np.ndarray, asked: tuple[Budget | None, ...]
) -> tuple[np.ndarray, int]:
    """Return where lists begin, int64 [tiles, lists] as their counts, and the slots of them all.

    One list is enough for a request that asked for every key: each of its tiles' lists is the
    beginning of the next tile's.
    """
    everything = [n for n, own in enumerate(asked) if own is not None and own.is_everything]
    apart = np.where(np.isin(tiles.batch_index, everything)[:, None], 0, counts)
    offsets, total = apart.cumsum().reshape(apart.shape) - apart, int(apart.sum())
    for request in everything:
        mine = tiles.batch_index == request
        offsets[mine] = total
        total += int(counts[mine].max(initial=0))
    return offsets, total
