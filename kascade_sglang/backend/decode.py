"""A decode step through the kernels, safe to capture in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton

from kascade_kernels.arena import Arena
from kascade_kernels.budget import Budget
from kascade_kernels.copy_row_slots import copy_row_slots, row_width
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists, most_splits
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.find_shared_prefixes import SharedPrefix, find_shared_prefixes
from kascade_kernels.merge_parts import Parts, most_parts
from kascade_kernels.select_slots import CodeBuffer, select_slots
from kascade_kernels.structs import Lists, Pool, PoolKeys, Rows
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.kv import KeyValues
from kascade_sglang.backend.sizes import Sizes
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer

ALIGNED_ROWS = 4
"""Numbers of so many rows fill 16 bytes: kernels are compiled again for other alignments."""


class DecodeBuffers:
    """What a step of up to ``most`` requests writes, at addresses that a graph may keep.

    Steps of fewer requests use the same: they run one after the other. A request has
    ``sizes.chain`` rows, one a token.
    table: int32 [most, context padded], the requests' own slots. It lies at the beginning of
        ``lists.slots``, so that it can be the list of a request that asked for every key.
    requests: int64 [rows], each row's request in ``table``.
    pool: candidate pools, whose slots follow the lists'; None where no layer makes any.
    """

    def __init__(self, most: int, sizes: Sizes, config: KascadeConfig, device: str) -> None:
        self.most, self._chain = most, sizes.chain
        self.rows = rows = most * sizes.chain
        count, room = rows * sizes.lists, sizes.longest_list
        width = row_width(sizes.context)
        filled = most * width, count * room, count * sizes.longest_pool
        slots = torch.zeros(sum(filled), dtype=torch.int32, device=device)
        self.table = slots[: most * width].view(most, width)
        self._lists_at = (filled[0], room), (sum(filled[:2]), sizes.longest_pool)
        self._budget, self._per_row = config.budget, sizes.lists
        offsets, pool_offsets = (torch.from_numpy(each).to(device) for each in self._offsets())
        counts = torch.empty_like(offsets, dtype=torch.int32)
        self.lists = Lists(slots, offsets, counts)
        self.pool = None
        if config.pool_rule is not None:
            lists = Lists(slots, pool_offsets, torch.empty_like(counts))
            ends, spans = torch.empty(2, rows, dtype=torch.int32, device=device)
            self.pool = Pool(lists, ends, spans)
        columns = (config.budget.ratio_ppm, config.budget.min_k)
        self.budgets = Budgets(*(torch.full_like(counts[:, 0], value) for value in columns))
        self._asked: tuple[Budget | None, ...] = ()
        self.requests = torch.arange(most, device=device).repeat_interleave(sizes.chain)
        self.shared = SharedPrefix.allocate(rows, sizes.group, device)
        self.steps = torch.empty(2, rows, dtype=torch.int32, device=device)
        sized = (rows, sizes.kv_heads, sizes.q_heads, self.steps.device)
        parts = most_parts(*sized, batch_invariant=config.batch_invariant)
        self.parts = Parts.empty(parts, sizes.head_dim, device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; the table is a part of the lists' slots."""
        single = (self.requests, self.steps)
        tensors = (*single, *self.lists, *self.budgets, *self.shared, *self.parts)
        if self.pool is not None:
            _, offsets, counts = self.pool.lists
            tensors += (offsets, counts, self.pool.ends, self.pool.spans)
        return sum(tensor.nbytes for tensor in tensors)

    def _offsets(self) -> np.ndarray:
        """Where each row's lists and pools begin, int64 [2, rows, lists]."""
        numbers = np.arange(self.rows * self._per_row).reshape(self.rows, self._per_row)
        return np.stack([first + room * numbers for first, room in self._lists_at])

    def ask(self, budgets: tuple[Budget | None, ...]) -> None:
        """Give the first requests' rows the budgets that these asked for, None: the server's.

        The other rows have the server's. Outside a graph, which reads what is in force then.
        A budget that is not of everything must fit the lists' room.
        """
        if budgets == self._asked:
            return
        self._asked = budgets
        offsets = self._offsets()
        columns = np.empty((2, self.rows), np.int32)
        columns[:] = [[self._budget.ratio_ppm], [self._budget.min_k]]
        for request, budget in enumerate(budgets):
            if budget is not None:
                mine = slice(request * self._chain, (request + 1) * self._chain)
                columns[:, mine] = [[budget.ratio_ppm], [budget.min_k]]
                if budget.is_everything:
                    offsets[:, mine] = request * self.table.shape[1]
        written = [*zip(self.budgets, columns, strict=True), (self.lists.offsets, offsets[0])]
        if self.pool is not None:
            written.append((self.pool.lists.offsets, offsets[1]))
        for buffer, values in written:
            host = torch.from_numpy(values)
            buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)


@dataclass(frozen=True)
class RowGroup:
    """The rows [first, last) of a step, scored together; what follows is of these rows.

    pool: their candidate pools, where any layer makes them.
    """

    first: int
    last: int
    rows: Rows
    lists: Lists
    spans: Spans
    shared: SharedPrefix
    pool: Pool | None

    def in_pools(self) -> RowGroup:
        """The same rows as they are scored in their pools: rows of a shorter context."""
        rows = self.rows._replace(ends=self.pool.ends)
        return replace(self, rows=rows, spans=self.spans._replace(score=self.pool.spans))


@dataclass(frozen=True)
class DecodeStep:
    """One step's rows, one a token, and where they write.

    lists, pool: of all rows; their counts are decided, their slots come from ``select``.
    groups: the rows in as few groups as have room for their scores.
    """

    lists: Lists
    pool: Pool | None
    spans: Spans
    groups: tuple[RowGroup, ...]
    buffers: DecodeBuffers


class DecodePath:
    """One new token a request, or a chain of drafts. Layer 0 attends and scores in one pass.

    A draft is a row like any other: it sees the keys up to its own, with those of the drafts
    before it, and selects by itself.

    Positions become slots through a copy of SGLang's table. The scheduler rewrites the row of a
    request that has ended as soon as a graph runs, and the request's last token, which that step
    still computes, stays in the prefix cache.
    table: int32 [requests, context], SGLang's. arena: room for the scores of one group of rows.
    """

    attends_densely = True

    def __init__(
        self, config: KascadeConfig, sizes: Sizes, table: torch.Tensor, kv: KeyValues, arena: Arena
    ) -> None:
        self._config, self._sizes = config, sizes
        self._table, self._kv, self._arena = table, kv, arena
        per_row = ScoreScratch.bytes_per_row(sizes.q_heads, sizes.lists, sizes.context)
        self._rows_scored_at_once = arena.size // per_row
        self._graph_buffers: DecodeBuffers | None = None
        self._eager_buffers: DecodeBuffers | None = None

    def reserve(self, requests: int) -> None:
        """Allocate what graphs of up to ``requests`` requests use."""
        self._graph_buffers = self._allocate(requests)

    def sizes_apart(self, least: int, most: int) -> list[int]:
        """Numbers of requests from ``least`` to ``most`` with all variants of the kernels."""
        sizes: dict[tuple[int, ...], int] = {}
        invariant = self._config.batch_invariant
        for requests in range(least, most + 1):
            count = requests * self._sizes.chain
            groups = {triton.next_power_of_2(last - first) for first, last in self._ranges(count)}
            splits = most_splits(
                count, self._sizes.kv_heads, self._table.device, batch_invariant=invariant
            )
            kind = (triton.next_power_of_2(count), *splits, *sorted(groups))
            sizes[kind] = requests
        return list(sizes.values())

    def prepare(self, batch: Batch) -> None:
        """Copy the requests' slots, before SGLang lets the scheduler go on: outside a graph."""
        buffers = self._buffers_for(batch)
        buffers.ask(batch.budgets)
        copy_row_slots(self._table, Rows(batch.requests, batch.ends), buffers.table)

    def record(self, batch: Batch) -> DecodeStep:
        """Decide how long lists are and how rows are cut, from lengths on the device alone."""
        heads, invariant = self._sizes.kv_heads, self._config.batch_invariant
        buffers, ends = self._buffers_for(batch), batch.row_ends
        count = len(ends)
        rows = Rows(buffers.requests[:count], ends)
        lists = buffers.lists.rows(0, count)
        spans = Spans.within(buffers.steps, count, heads, batch_invariant=invariant)
        budgets = buffers.budgets.rows(count)
        pool = None if buffers.pool is None else buffers.pool.rows(0, count)
        decode_lists(
            rows.ends,
            heads,
            budgets,
            spans,
            lists.counts,
            batch_invariant=invariant,
            pool=pool,
            rule=self._config.pool_rule,
        )
        groups = tuple(self._cut(rows, lists, spans, buffers.shared, pool))
        for group in groups:
            find_shared_prefixes(buffers.table, group.rows, group.spans, group.shared)
        return DecodeStep(lists, pool, spans, groups, buffers)

    def _cut(
        self, rows: Rows, lists: Lists, spans: Spans, shared: SharedPrefix, pool: Pool | None
    ) -> Iterator[RowGroup]:
        for first, last in self._ranges(len(rows.ends)):
            yield RowGroup(
                first,
                last,
                Rows(rows.requests[first:last], rows.ends[first:last]),
                lists.rows(first, last),
                spans.rows(first, last),
                shared.rows(first, last),
                None if pool is None else pool.rows(first, last),
            )

    def _ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """Cut rows into as few ranges as have room, that begin where memory is aligned."""
        most = self._rows_scored_at_once
        step = -(-count // -(-count // most))
        if step < count and most >= ALIGNED_ROWS:
            step = min(-(-step // ALIGNED_ROWS), most // ALIGNED_ROWS) * ALIGNED_ROWS
        return ((first, min(first + step, count)) for first in range(0, count, step))

    def _buffers_for(self, batch: Batch) -> DecodeBuffers:
        count = len(batch.ends)
        if batch.chain != self._sizes.chain:
            raise KascadeError(
                f"decode step: expected {self._sizes.chain} tokens a request, by "
                f"--speculative-num-draft-tokens, got {batch.chain}"
            )
        if self._graph_buffers is not None and count <= self._graph_buffers.most:
            return self._graph_buffers
        if self._eager_buffers is None or count > self._eager_buffers.most:
            self._eager_buffers = None
            room = min(triton.next_power_of_2(count), self._table.shape[0])
            self._eager_buffers = self._allocate(room)
        return self._eager_buffers

    def _allocate(self, requests: int) -> DecodeBuffers:
        return DecodeBuffers(requests, self._sizes, self._config, str(self._table.device))

    def select(
        self,
        step: DecodeStep,
        q: torch.Tensor,
        layer: Layer,
        out: torch.Tensor | None = None,
        store: IndexStore[Lists] | None = None,
    ) -> Lists:
        """Select for every row; with ``out`` the pool's own keys are read, for both."""
        with_pools = store is not None and step.pool is not None
        scored = store.pool_of(layer.index) if with_pools else None
        makes_pool = with_pools and store.makes_pool(layer.index)
        for whole in step.groups:
            group = whole if scored is None else whole.in_pools()
            pool = None if scored is None else PoolKeys(group.pool.lists, scored[1])
            codes, table = self._score(group, q, layer, step.buffers, out, pool), step.buffers.table
            for lists in (group.lists, *([group.pool.lists] if makes_pool else [])):
                select_slots(codes, table, group.rows, lists, append_own=True, pool=pool)
        if makes_pool:
            store.put_pool(layer.index, step.pool.lists)
        return step.lists

    def _score(
        self,
        group: RowGroup,
        q: torch.Tensor,
        layer: Layer,
        buffers: DecodeBuffers,
        out: torch.Tensor | None,
        pool: PoolKeys | None,
    ) -> CodeBuffer:
        """Score all keys of a group of rows, or their pools; with ``out`` also attend to them."""
        keys, values = self._kv.of(layer.index)
        if out is None:
            keys, values = self._kv.scoring_keys(layer.index), None
        sizes, mine = self._sizes, slice(group.first, group.last)
        room = sizes.context if pool is None else sizes.longest_pool
        scratch = ScoreScratch.allocate(
            group.last - group.first, sizes.q_heads, sizes.lists, room, self._arena.cut()
        )
        decode_scores(
            q[mine],
            keys,
            buffers.table,
            group.rows,
            group.lists,
            group.spans,
            group.shared,
            layer.scale,
            scratch,
            buffers.parts,
            values=values,
            out=None if out is None else out[mine],
            v_scale=layer.v_scale,
            sinks=layer.sinks,
            pool=pool,
        )
        return scratch.codes

    def attend(
        self,
        step: DecodeStep,
        q: torch.Tensor,
        layer: Layer,
        selected: Lists,
        head_map: torch.Tensor,
    ) -> torch.Tensor:
        """Attend every row to the lists of its anchor."""
        keys, values = self._kv.of(layer.index)
        return decode_attention(
            q,
            keys,
            values,
            selected,
            step.spans,
            head_map,
            layer.scale,
            step.buffers.parts,
            v_scale=layer.v_scale,
            sinks=layer.sinks,
        )
