"""How many keys queries read: what the budget says, for counters and reports."""

from dataclasses import dataclass

import numpy as np

from kascade_kernels.budget import TILE, Budget
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import LayerRole

QUEST_PAGE = 16
"""Keys in a page of the ``quest`` comparison (arXiv 2406.10774, section 4.1)."""


@dataclass(frozen=True)
class KeyReads:
    """Keys read per query and KV head, summed over layers and queries.

    attended: K and V read by attention. scored: K read by an anchor's selection. dense: what
    dense attention reads.
    """

    attended: int
    scored: int
    dense: int


def key_reads(
    config: KascadeConfig,
    positions: np.ndarray,
    layers: range | None = None,
    phase: str = "prefill",
) -> KeyReads:
    """Count the reads of the queries at ``positions``, int64 [queries], through ``layers``.

    layers: those of one pipeline stage; None means all. phase: ``prefill`` or ``decode``.
    """
    return KeyReads(*map(int, reads_by_query(config, positions, layers, phase).sum(axis=1)))


def reads_by_query(
    config: KascadeConfig,
    positions: np.ndarray,
    layers: range | None = None,
    phase: str = "prefill",
    budget: Budget | None = None,
) -> np.ndarray:
    """Count likewise, query by query: int64 [3, queries], in the order of ``KeyReads``.

    budget: what the queries' request asked for; None is the configuration's.
    """
    plan, prefills = config.plan, phase == "prefill"
    budget = budget or (config.prefill_budget if prefills else config.budget)
    roles = [plan.role(layer) for layer in layers or range(plan.shape.layers)]
    windowed, dense = roles.count(LayerRole.WINDOW), roles.count(LayerRole.DENSE)
    in_windows = windowed * np.minimum(positions + 1, config.window)
    seen = (len(roles) - windowed) * (positions + 1) + in_windows
    if prefills and not config.sparse_prefill:
        return np.stack([seen, np.zeros_like(seen), seen])
    # In decoding some anchors score a candidate pool alone.
    pools = 0 if prefills else sum(layer in plan.maker_of for layer in layers or range(len(roles)))
    selecting, sparse = dense + roles.count(LayerRole.ANCHOR), len(roles) - dense - windowed
    tiles = positions // TILE
    selected = budget.selected_counts(tiles)
    selects = selected < TILE * tiles
    own = positions - TILE * tiles + 1
    attended = selected + own
    scored = (selecting - pools) * _scored(config.selection, positions)
    if pools:
        scored += pools * (config.pool_rule.pooled_counts(tiles, selected) + own)
    return np.stack(
        [
            sparse * attended + dense * (positions + 1) + in_windows,
            np.where(selects, scored, 0),
            seen,
        ]
    )


def _scored(selection: str, positions: np.ndarray) -> np.ndarray:
    """Keys that selecting for a query reads, int64 [queries]."""
    if selection in ("window", "random"):
        return np.zeros_like(positions)
    if selection == "quest":  # The least and the greatest K of every page before the tile.
        return 2 * (positions // TILE) * (TILE // QUEST_PAGE)
    return positions + 1
