"""A decode step through the kernels, safe to capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE, tile_of
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.decode_spans import Spans, decode_spans
from kascade_kernels.merge_parts import Parts, most_parts
from kascade_kernels.row_slots import allocate_row_slots, copy_row_slots
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

    Steps of fewer requests use the same: they run one after the other.
    """

    def __init__(self, rows: int, shape: RankShape, config: KascadeConfig) -> None:
        self.rows = rows
        room = list_room(shape.context, config)
        device = shape.device
        self.slots = torch.empty(rows * shape.lists * room, dtype=torch.int32, device=device)
        self.offsets = torch.arange(rows, device=device) * (shape.lists * room)
        self.counts = torch.empty(rows, dtype=torch.int32, device=device)
        self.selection = Selection(self.slots, self.offsets, self.counts, shape.lists)
        self.table = allocate_row_slots(rows, shape.context, device)
        self.requests = torch.arange(rows, device=device)
        self.shared = SharedPrefix.allocate(rows, shape.q_heads // shape.kv_heads, device)
        self.steps = torch.empty(2, rows, dtype=torch.int32, device=device)
        parts = _parts(rows, shape, config)
        self.parts = Parts.empty(parts, shape.head_dim, device)

    @staticmethod
    def bytes(rows: int, shape: RankShape, config: KascadeConfig) -> int:
        """Bytes that ``rows`` requests take, but for a few."""
        slots = shape.lists * list_room(shape.context, config) + shape.context
        return 4 * rows * slots + 4 * _parts(rows, shape, config) * (shape.head_dim + 1)

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


def _parts(rows: int, shape: RankShape, config: KascadeConfig) -> int:
    invariant = config.batch_invariant
    return most_parts(rows, shape.kv_heads, shape.q_heads, batch_invariant=invariant)


def list_room(context: int, config: KascadeConfig) -> int:
    """Slots of the longest list: the selected keys and the query's own tile."""
    return config.budget.selected(tile_of(context - 1)) + TILE


class DecodePath:
    """One new token a request. Layer 0 attends to everything and scores in the same pass.

    Positions become slots through a copy of SGLang's table. The scheduler rewrites the row of a
    request that has ended as soon as a graph runs, and the request's last token, which that step
    still computes, stays in the prefix cache.
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

    def reserve(self, rows: int) -> None:
        """Allocate what graphs of up to ``rows`` requests use."""
        self._graph_buffers = DecodeBuffers(rows, self._shape, self._config)

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare an eager step."""
        self.copy_slots(batch)
        self.begin_in_graph(batch)

    def copy_slots(self, batch: ForwardBatch) -> None:
        """Copy the requests' slots, before SGLang lets the scheduler go on: outside a graph."""
        rows = Rows(batch.req_pool_indices, batch.seq_lens)
        copy_row_slots(self._table, rows, self._buffers_for(len(rows.ends)).table)

    def begin_in_graph(self, batch: ForwardBatch) -> None:
        """Prepare the rest of a step; recorded in graphs. Reads lengths on the device only."""
        count, shape, budget = len(batch.seq_lens), self._shape, self._config.budget
        invariant = self._config.batch_invariant
        self._buffers = self._buffers_for(count)
        self._rows = Rows(self._buffers.requests[:count], batch.seq_lens)
        self._spans = Spans.within(
            self._buffers.steps, count, shape.kv_heads, batch_invariant=invariant
        )
        decode_spans(batch.seq_lens, shape.kv_heads, budget, self._spans, batch_invariant=invariant)
        self._launches = list(self._cut_into_launches())
        for *_, rows, spans, shared in self._launches:
            find_shared_prefixes(self._buffers.table, rows, spans, shared)

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
            self._eager_buffers = None
            room = min(triton.next_power_of_2(rows), self._table.shape[0])
            self._eager_buffers = DecodeBuffers(room, self._shape, self._config)
        return self._eager_buffers

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
        shape, budget, buffers = self._shape, self._config.budget, self._buffers
        for first, last, rows, spans, shared in self._launches:
            scratch = ScoreScratch.allocate(
                last - first, shape.q_heads, shape.lists, shape.context, self._arena.cut()
            )
            decode_scores(
                q[first:last],
                keys,
                buffers.table,
                rows,
                spans,
                shared,
                budget,
                layer.scaling,
                scratch,
                buffers.parts,
                values,
                None if out is None else out[first:last],
            )
            lists = buffers.of_rows(first, last)
            select_slots(scratch.codes, buffers.table, rows, budget, lists, append_own=True)
        self._store.put(layer.layer_id, buffers.of_rows(0, len(q)))

    def attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Attend every request to the lists of its anchor."""
        keys, values = key_value_caches(self._pool, layer.layer_id)
        selection, head_map = self._store.get(layer.layer_id)
        parts = self._buffers.parts
        return decode_attention(
            q, keys, values, selection, self._spans, head_map, layer.scaling, parts
        )
