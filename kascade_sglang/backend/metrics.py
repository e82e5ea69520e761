"""How many keys were read, beside how many dense attention would have read.

Published through prometheus_client, so SGLang's ``/metrics`` (``--enable-metrics``) shows them.
"""

from prometheus_client import Counter

from kascade_sglang.backend.index_store import Selection
from kascade_sglang.backend.metadata import StepMetadata

KEY_READS = Counter(
    "kascade_key_reads",
    "Keys read per query and KV head, summed over layers. kind: attended (K and V read by "
    "attention), scored (K read by an anchor's selection), dense (what dense attention reads).",
    ["phase", "kind"],
)


class KeyCounter:
    """Counts query-key pairs of each layer as it runs, by phase (prefill or decode)."""

    def add_dense(self, step: StepMetadata) -> None:
        """Count a layer that attends to everything."""
        visible = _visible(step)
        self._add(step, "attended", visible)
        self._add(step, "dense", visible)

    def add_scored(self, step: StepMetadata, selection_method: str) -> None:
        """Count a selection; comparisons that ignore the keys read none."""
        if selection_method == "topk":
            tiles = (row for row in step.rows if not row.is_dense)
            self._add(step, "scored", sum(_visible_to(row.position, row.count) for row in tiles))

    def add_attended(self, step: StepMetadata, selection: Selection) -> None:
        """Count a layer that attends to selected keys and its own tile."""
        attended = 0
        for row, selected in zip(step.rows, selection, strict=True):
            own = _visible_to(row.position - row.own_start, row.count)
            attended += row.count * selected.shape[1] + own
        self._add(step, "attended", attended)
        self._add(step, "dense", _visible(step))

    def _add(self, step: StepMetadata, kind: str, amount: int) -> None:
        phase = "decode" if step.is_decode else "prefill"
        KEY_READS.labels(phase, kind).inc(amount)


def _visible_to(position: int, count: int) -> int:
    """Keys visible to ``count`` queries from ``position``: sum of position + 1, ... + count."""
    return count * position + count * (count + 1) // 2


def _visible(step: StepMetadata) -> int:
    return sum(_visible_to(row.position, row.count) for row in step.rows)
