"""What a step computes: every request's new tokens, cut into tiles of absolute positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from kascade_kernels.budget import TILE, Budget, tile_of

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch


class TileRow(NamedTuple):
    """The queries of one request that fall into one tile.

    request: index in the batch. start, count: the queries' rows in q.
    position: absolute position of the first. selected: keys to select before the tile.
    """

    request: int
    start: int
    count: int
    position: int
    tile: int
    selected: int

    @property
    def end(self) -> int:
        """One past the last query's absolute position: the number of keys it may see."""
        return self.position + self.count

    @property
    def own_start(self) -> int:
        """First position of the tile, which is also the number of candidates."""
        return TILE * self.tile

    @property
    def is_dense(self) -> bool:
        """Whether the budget covers every key before the tile."""
        return self.selected == self.own_start


@dataclass(frozen=True)
class StepMetadata:
    """One step's tiles and the slots behind them.

    rows: all tiles of the batch, in the order of q.
    slots: for each request, int64 [sequence length]: its KV slots, copied when the step was
        built because the scheduler may rewrite the table while the step runs.
    """

    rows: tuple[TileRow, ...]
    slots: tuple[torch.Tensor, ...]

    @staticmethod
    def build(batch: ForwardBatch, req_to_token: torch.Tensor, budget: Budget) -> StepMetadata:
        """Cut a batch; decoding is the case of one new token a request."""
        spans = new_spans(batch)
        tables = zip(batch.req_pool_indices.tolist(), spans, strict=True)
        slots = tuple(req_to_token[row, :end].to(torch.int64) for row, (_, end) in tables)
        return StepMetadata(tuple(_cut(spans, budget)), slots)


def new_spans(batch: ForwardBatch) -> list[tuple[int, int]]:
    """Positions [begin, end) that each request of a batch computes."""
    if batch.forward_mode.is_decode():
        return [(end - 1, end) for end in batch.seq_lens_cpu.tolist()]
    lengths = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)
    return [(int(prefix), int(prefix) + int(new)) for prefix, new in lengths]


def _cut(spans: list[tuple[int, int]], budget: Budget) -> list[TileRow]:
    """Split each request's positions [begin, end) at multiples of the tile size."""
    rows, start = [], 0
    for request, (position, end) in enumerate(spans):
        while position < end:
            tile = tile_of(position)
            count = min(end, TILE * (tile + 1)) - position
            rows.append(TileRow(request, start, count, position, tile, budget.selected(tile)))
            start, position = start + count, position + count
    return rows
