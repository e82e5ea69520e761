"""How many keys were read, beside how many dense attention would have read.

Published through prometheus_client, so SGLang's ``/metrics`` (``--enable-metrics``) shows them.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from prometheus_client import Counter

from kascade_kernels.budget import Budget
from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.steps import Batch
from kascade_sglang.sparsity import KeyReads, reads_by_query

KEY_READS = Counter(
    "kascade_key_reads",
    "Keys read per query and KV head, summed over layers. kind: attended (K and V read by "
    "attention), scored (K read by an anchor's selection), dense (what dense attention reads).",
    ["phase", "kind"],
)


KINDS = tuple(field.name for field in fields(KeyReads))


class KeyCounter:
    """Counts a step's query-key pairs from its lengths, by phase (prefill or decode).

    context: positions that a request may have. Sums over all positions before each are looked up:
    a decode step has tens of microseconds for this, as the host must stay ahead of the GPU.
    """

    def __init__(self, config: KascadeConfig, layers: range, context: int) -> None:
        self._config, self._layers = config, layers
        positions = np.arange(context)
        self._reads_before = {}  # int64 [3, context + 1] each
        for phase in ("prefill", "decode"):
            reads = reads_by_query(config, positions, layers, phase)
            self._reads_before[phase] = np.pad(reads.cumsum(axis=1), ((0, 0), (1, 0)))
        self._counters = {
            phase: [KEY_READS.labels(phase, kind) for kind in KINDS]
            for phase in ("prefill", "decode")
        }

    def add(self, batch: Batch) -> None:
        """Count one step; requests that pad a batch to a graph's size are left out."""
        begins, ends = batch.spans
        phase = "decode" if batch.decode else "prefill"
        real, before = len(ends) - batch.padding, self._reads_before[phase]
        begins, ends = begins[:real], ends[:real]
        asked = {budget for budget in batch.budgets if budget is not None}
        reads = sum(self._asked_reads(batch, phase, budget, begins, ends) for budget in asked)
        if asked:
            usual = np.array([budget is None for budget in batch.budgets])
            begins, ends = begins[usual], ends[usual]
        reads = reads + (before[:, ends] - before[:, begins]).sum(axis=1)
        for counter, count in zip(self._counters[phase], reads.tolist(), strict=True):
            counter.inc(count)

    def _asked_reads(
        self, batch: Batch, phase: str, budget: Budget, begins: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        """Count the reads of the requests that asked for a budget, int64 [3]."""
        mine = [row for row, own in enumerate(batch.budgets) if own == budget]
        positions = np.concatenate([np.arange(begins[row], ends[row]) for row in mine])
        return reads_by_query(self._config, positions, self._layers, phase, budget).sum(axis=1)
