"""How many keys were read, how long lists were, and which steps were dense.

Published through prometheus_client, so SGLang's ``/metrics`` (``--enable-metrics``) shows them.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache

import numpy as np
from prometheus_client import Counter

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.steps import Batch
from kascade_sglang.sparsity import KeyReads, reads_by_query

KEY_READS = Counter(
    "kascade_key_reads",
    "Keys read per query and KV head, summed over layers. kind: attended (K and V read by "
    "attention), scored (K read by an anchor's selection), dense (what dense attention reads).",
    ["phase", "kind"],
)


LIST_LENGTHS = Counter(
    "kascade_list_lengths",
    "Queries by how many keys their tile's list in a sparse layer holds, its own 32 included: a "
    "cumulative histogram, whose le=+Inf counts all queries.",
    ["phase", "le"],
)
STEPS = Counter(
    "kascade_steps",
    "Steps. dense: yes where every query of the step read all keys, because budgets cover them or "
    "the phase is served densely.",
    ["phase", "dense"],
)
BUCKETS = tuple(2**power for power in range(8, 18))


KINDS = tuple(field.name for field in fields(KeyReads))


class KeyCounter:
    """Counts a step's query-key pairs from its lengths, by phase (prefill or decode).

    context: positions that a request may have. Sums over all positions before each are looked up:
    a decode step has tens of microseconds for this, as the host must stay ahead of the GPU.
    """

    def __init__(self, config: KascadeConfig, layers: range, context: int) -> None:
        self._config, self._layers, self._context = config, layers, context
        positions = np.arange(context)
        self._reads_before = {}  # int64 [3, context + 1] each
        for phase in ("prefill", "decode"):
            reads = reads_by_query(config, positions, layers, phase)
            self._reads_before[phase] = np.pad(reads.cumsum(axis=1), ((0, 0), (1, 0)))
        self._counters = {
            phase: [KEY_READS.labels(phase, kind) for kind in KINDS]
            for phase in ("prefill", "decode")
        }
        prefill = config.prefill_budget if config.sparse_prefill else Budget(ratio=1.0)
        budgets = {"prefill": prefill, "decode": config.budget}
        self._lists = {name: _ListCounter(name, budgets[name], context) for name in budgets}

    def add(self, batch: Batch) -> None:
        """Count one step; requests that pad a batch to a graph's size are left out."""
        begins, ends = batch.spans
        phase = "decode" if batch.decode else "prefill"
        real, before = len(ends) - batch.padding, self._reads_before[phase]
        begins, ends = begins[:real], ends[:real]
        asked = {budget for budget in batch.budgets if budget is not None}
        reads, dense = np.zeros(len(KINDS), np.int64), []
        for budget in asked:
            mine = np.array([own == budget for own in batch.budgets])
            spans = begins[mine], ends[mine]
            positions = np.concatenate([np.arange(*span) for span in zip(*spans, strict=True)])
            reads += reads_by_query(self._config, positions, self._layers, phase, budget).sum(
                axis=1
            )
            dense.append(_list_counter(phase, budget, self._context).add(*spans))
        if asked:
            usual = np.array([budget is None for budget in batch.budgets])
            begins, ends = begins[usual], ends[usual]
        reads += (before[:, ends] - before[:, begins]).sum(axis=1)
        dense.append(self._lists[phase].add(begins, ends))
        for counter, count in zip(self._counters[phase], reads.tolist(), strict=True):
            counter.inc(count)
        if real:
            STEPS.labels(phase, "yes" if all(dense) else "no").inc()


class _ListCounter:
    """Counts queries by the lengths of their lists.

    Lists only grow with the position, so a length is a first position, and no query is looked at.
    """

    def __init__(self, phase: str, budget: Budget, context: int) -> None:
        tiles = np.arange(tile_of(max(context, 1) - 1) + 1)
        lengths = budget.selected_counts(tiles) + TILE
        # The first position whose list is longer than each bucket's bound.
        longer = TILE * np.searchsorted(lengths, BUCKETS, side="right")
        self._ends = np.append(longer, tiles.size * TILE)[:, None]
        bounds = (*map(str, BUCKETS), "+Inf")
        self._lengths = [LIST_LENGTHS.labels(phase, bound) for bound in bounds]
        self._first_sparse = TILE * int(np.sum(lengths == TILE * (tiles + 1)))

    def add(self, begins: np.ndarray, ends: np.ndarray) -> bool:
        """Count a step's queries, at positions [begin, end) of each request: int64 [requests].

        Returns whether each of them reads all keys.
        """
        counts = (np.minimum(ends, self._ends) - np.minimum(begins, self._ends)).sum(axis=1)
        for counter, count in zip(self._lengths, counts.tolist(), strict=True):
            if count:
                counter.inc(count)
        return bool((ends <= self._first_sparse).all())


@lru_cache(maxsize=64)
def _list_counter(phase: str, budget: Budget, context: int) -> _ListCounter:
    """Keep the counters of the budgets that requests asked for last."""
    return _ListCounter(phase, budget, context)
