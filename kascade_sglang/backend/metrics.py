"""How many keys were read, beside how many dense attention would have read.

Published through prometheus_client, so SGLang's ``/metrics`` (``--enable-metrics``) shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import Counter

from kascade_sglang.backend.metadata import new_spans
from kascade_sglang.config import KascadeConfig
from kascade_sglang.sparsity import key_reads

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch

KEY_READS = Counter(
    "kascade_key_reads",
    "Keys read per query and KV head, summed over layers. kind: attended (K and V read by "
    "attention), scored (K read by an anchor's selection), dense (what dense attention reads).",
    ["phase", "kind"],
)


class KeyCounter:
    """Counts a step's query-key pairs from its lengths, by phase (prefill or decode)."""

    def __init__(self, config: KascadeConfig, layers: range) -> None:
        self._config, self._layers = config, layers

    def add(self, batch: ForwardBatch) -> None:
        """Count one step; requests that pad a batch to a graph's size are left out."""
        spans = new_spans(batch)
        spans = spans[: len(spans) - getattr(batch, "num_padding", 0)]
        if not spans:
            return
        positions = np.concatenate([np.arange(begin, end) for begin, end in spans])
        reads = key_reads(self._config, positions, self._layers)
        phase = "decode" if batch.forward_mode.is_decode() else "prefill"
        for kind in ("attended", "scored", "dense"):
            KEY_READS.labels(phase, kind).inc(getattr(reads, kind))
