"""A decode step through the kernels, safe to capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.decode_spans import Spans, decode_spans
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import select_slots
from kascade_kernels.shared_prefix import SharedPrefix, find_shared_prefixes
from kascade_kernels.structs import Rows, Selection
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.key_copies import KeyCopies
from kascade_sglang.backend.rank_shape import RankShape
from kascade_sglang.compat import key_value_caches
from kascade_sglang.config import KascadeConfig

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch, ModelRunner, RadixAttention


class DecodeBuffers:
    """What a step of up to ``rows`` requests writes, at addresses that a graph may keep.

    room: slots of one list, enough for the longest context.
    """

    def __init__(self, rows: int, shape: RankShape, config: KascadeConfig) -> None:
        self.rows = rows
        room = list_room(shape.context, config)
        device = shape.device
        self.slots = torch.empty(rows * shape.lists * room, dtype=torch.int32, device=device)
        self.offsets = torch.arange(rows, device=device) * (shape.lists * room)
        self.counts = torch.empty(rows, dtype=torch.int32, device=device)
        self.selection = Selection(self.slots, self.offsets, self.counts, shape.lists)
        group = shape.q_heads // shape.kv_heads
        self.shared = SharedPrefix.allocate(rows, group, shape.context, device)

    @staticmethod
    def bytes_per_row(lists: int, context: int, config: KascadeConfig) -> int:
        """Bytes that each row takes, but for a few."""
        return 4 * lists * list_room(context, config) + SharedPrefix.bytes_per_row(context)

    def of_rows(self, first: int, last: int) -> Selection:
        """Return the lists of some of the rows."""
        offsets, counts = self.offsets[first:last], self.counts[first:last]
        return self.selection._replace(offsets=offsets, counts=counts)


class Launch(NamedTuple):
    """The rows [first, last) of a step, scored together; what follows is of these rows."""

    first: int
    last: int
    rows: Rows
    spans: Spans
    shared: SharedPrefix


def list_room(context: int, config: KascadeConfig) -> int:
    """Slots of the longest list: the selected keys and the query's own tile."""
    return config.budget.selected(tile_of(context - 1)) + TILE


class DecodePath:
    """One new token a request. Layer 0 attends to everything and scores in the same pass.

    Positions become slots through SGLang's table while the step runs. The scheduler may rewrite
    the row of a request that has ended meanwhile: entries stay valid slots, and what is computed
    for such a row is discarded.
    """

    delegates_dense = False

    def __init__(
        self,
        runner: ModelRunner,
        config: KascadeConfig,
        shape: RankShape,
        store: IndexStore,
        copies: KeyCopies,
        arena: Arena,
    ) -> None:
        self._table = runner.req_to_token_pool.req_to_token
        self._pool = runner.token_to_kv_pool
        self._config, self._shape = config, shape
        self._store, self._copies, self._arena = store, copies, arena
        per_row = ScoreScratch.bytes_per_row(shape.q_heads, shape.lists, shape.context)
        self._rows_scored_at_once = arena.size // per_row
        self._graph_buffers: DecodeBuffers | None = None
        self._eager_buffers: DecodeBuffers | None = None
        self._cuts: dict[int, tuple[Spans, Parts]] = {}

    def reserve(self, rows: int) -> None:
        """Allocate what graphs of up to ``rows`` requests use."""
        self._graph_buffers = DecodeBuffers(rows, self._shape, self._config)

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare a step; also recorded in graphs. Reads lengths on the device only."""
        self._rows = Rows(batch.req_pool_indices, batch.seq_lens)
        count = len(batch.seq_lens)
        self._buffers = self._buffers_for(count)
        self._spans, self._parts = self._cut(count)
        decode_spans(
            self._rows.ends,
            self._shape.kv_heads,
            self._config.budget,
            self._spans,
            batch_invariant=self._config.batch_invariant,
        )
        self._launches = list(self._cut_into_launches())
        for *_, rows, spans, shared in self._launches:
            find_shared_prefixes(self._table, rows, spans, shared)

    def _cut_into_launches(self) -> Iterator[Launch]:
        """Cut the step's rows into as few launches as have room for their scores."""
        count = len(self._rows.ends)
        step = -(-count // -(-count // self._rows_scored_at_once))
        for first in range(0, count, step):
            last = min(first + step, count)
            rows = Rows(self._rows.requests[first:last], self._rows.ends[first:last])
            spans, shared = (of.rows(first, last) for of in (self._spans, self._buffers.shared))
            yield Launch(first, last, rows, spans, shared)

    def _buffers_for(self, rows: int) -> DecodeBuffers:
        if self._graph_buffers is not None and rows <= self._graph_buffers.rows:
            return self._graph_buffers
        if self._eager_buffers is None or rows > self._eager_buffers.rows:
            self._eager_buffers = DecodeBuffers(rows, self._shape, self._config)
        return self._eager_buffers

    def _cut(self, rows: int) -> tuple[Spans, Parts]:
        """Return buffers for one batch size, kept because graphs hold their addresses."""
        if rows not in self._cuts:
            shape, invariant = self._shape, self._config.batch_invariant
            spans = Spans.allocate(rows, shape.kv_heads, shape.device, batch_invariant=invariant)
            self._cuts[rows] = spans, Parts.allocate(spans, shape.q_heads, shape.head_dim)
        return self._cuts[rows]

    def attend_all(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Attend densely, and select."""
        keys, values = key_value_caches(self._pool, layer.layer_id)
        out = torch.empty_like(q)
        self._score_and_select(q, keys, layer, values, out)
        return out

    def select(self, q: torch.Tensor, layer: RadixAttention) -> None:
        """Select for every request."""
        keys, _ = key_value_caches(self._pool, layer.layer_id)
        self._score_and_select(q, self._copies.scoring_keys(layer.layer_id, keys), layer)

    def _score_and_select(
        self,
        q: torch.Tensor,
        keys: object,
        layer: RadixAttention,
        values: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> None:
        shape, budget = self._shape, self._config.budget
        for first, last, rows, spans, shared in self._launches:
            scratch = ScoreScratch.allocate(
                last - first, shape.q_heads, shape.lists, shape.context, self._arena.cut()
            )
            decode_scores(
                q[first:last],
                keys,
                self._table,
                rows,
                spans,
                shared,
                budget,
                layer.scaling,
                scratch,
                self._parts,
                values,
                None if out is None else out[first:last],
            )
            lists = self._buffers.of_rows(first, last)
            select_slots(scratch.codes, self._table, rows, budget, lists, append_own=True)
        self._store.put(layer.layer_id, self._buffers.of_rows(0, len(q)))

    def attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Attend every request to the lists of its anchor."""
        keys, values = key_value_caches(self._pool, layer.layer_id)
        selection, head_map = self._store.get(layer.layer_id)
        return decode_attention(
            q, keys, values, selection, self._spans, head_map, layer.scaling, self._parts
        )
