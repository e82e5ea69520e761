"""A prefill step through the kernels: tiles of absolute positions, in groups of bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import KeyCopy, Rows, Selection
from kascade_kernels.tile_attention import tile_attention
from kascade_kernels.tile_scores import tile_lse, tile_scores
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.key_copies import KeyCopies
from kascade_sglang.backend.metadata import new_spans
from kascade_sglang.backend.rank_shape import RankShape
from kascade_sglang.compat import key_value_caches
from kascade_sglang.config import KascadeConfig

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch, ModelRunner, RadixAttention

LSE_STRIDE = 4
"""The default weighs queries against each other by one key in so many (and all near the ends):
0.5 % less attention mass than the exact selection on heavy-tailed attention, at a ratio of 0.1."""


class TileTable(NamedTuple):
    """A step's tiles on the host, int64 [tiles] each; see ``Rows`` for the first four."""

    batch_index: np.ndarray
    ends: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    selected: np.ndarray

    @property
    def candidates(self) -> np.ndarray:
        """Keys before each tile."""
        return (self.ends - 1) // TILE * TILE

    @staticmethod
    def build(spans: list[tuple[int, int]], config: KascadeConfig) -> TileTable:
        """Cut each request's positions [begin, end) at multiples of the tile size."""
        begins, lasts = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        first_tile = begins // TILE
        tiles = np.where(lasts > begins, (lasts - 1) // TILE - first_tile + 1, 0)
        batch_index = np.repeat(np.arange(len(spans)), tiles)
        ordinal = np.arange(tiles.sum()) - np.repeat(tiles.cumsum() - tiles, tiles)
        tile = first_tile[batch_index] + ordinal
        positions = np.maximum(tile * TILE, begins[batch_index])
        ends = np.minimum((tile + 1) * TILE, lasts[batch_index])
        row_of_request = (lasts - begins).cumsum() - (lasts - begins)
        starts = row_of_request[batch_index] + positions - begins[batch_index]
        selected = config.budget.selected_counts(tile)
        return TileTable(batch_index, ends, starts, ends - positions, selected)


class Group(NamedTuple):
    """Tiles scored together. keys: the most candidates. is_dense: none of them needs scores."""

    first: int
    last: int
    keys: int
    is_dense: bool


class ExtendPath:
    """New tokens after a cached prefix of any length, requests of different lengths together."""

    delegates_dense = True

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

    def begin(self, batch: ForwardBatch) -> None:
        """Prepare a step; all its host work happens here."""
        self.begin_spans(new_spans(batch), batch.req_pool_indices)

    def begin_spans(self, spans: list[tuple[int, int]], requests: torch.Tensor) -> None:
        """Cut positions [begin, end) of each request into tiles.

        requests: int64 [requests], their rows of the slot table.
        """
        tiles = TileTable.build(spans, self._config)
        lists = self._shape.lists
        offsets = lists * (tiles.selected.cumsum() - tiles.selected)
        packed = torch.from_numpy(np.stack([*tiles, offsets]))
        if packed.shape[1] and self._shape.device != "cpu":
            packed = packed.pin_memory()
        device = packed.to(self._shape.device, non_blocking=True)
        small = device[:5].to(torch.int32)
        self._rows = Rows(requests[device[0]], small[1], small[2], small[3])
        total = lists * int(tiles.selected.sum())
        slots = torch.empty(max(total, 1), dtype=torch.int32, device=self._shape.device)
        self._selection = Selection(slots, device[5], small[4], lists)
        self._groups = list(self._cut_groups(tiles))
        self._tokens = int(tiles.counts.sum())

    def _cut_groups(self, tiles: TileTable) -> list[Group]:
        """Cut the tiles, in order, so that each group's codes fit the arena."""
        groups, first, candidates = [], 0, tiles.candidates
        per_tile = [self._bytes_per_tile(max(TILE, int(n))) for n in candidates]
        dense = tiles.selected == candidates
        while first < len(candidates):
            last, most = first, 0
            while last < len(candidates):
                most_with = max(most, per_tile[last])
                if last > first and most_with * (last + 1 - first) > self._arena.size:
                    break
                last, most = last + 1, most_with
            keys = max(TILE, int(candidates[first:last].max()))
            groups.append(Group(first, last, keys, bool(dense[first:last].all())))
            first = last
        return groups

    def _bytes_per_tile(self, keys: int) -> int:
        sums = 4 * keys if self._config.pooled else 0
        return CodeBuffer.bytes_per_row(self._shape.lists, keys) + sums

    def select(self, q: torch.Tensor, layer: RadixAttention) -> None:
        """Select for every tile."""
        keys, _ = key_value_caches(self._pool, layer.layer_id)
        scoring_keys = self._copies.scoring_keys(layer.layer_id, keys)
        for group in self._groups:
            rows = Rows(*(column[group.first : group.last] for column in self._rows))
            count, lists = group.last - group.first, self._shape.lists
            empty = self._arena.cut()
            codes = CodeBuffer.allocate(count, lists, group.keys, empty)
            pooled = self._config.pooled
            sums = empty((count, group.keys), torch.float32) if pooled else None
            if not group.is_dense:
                self._score(q, keys, scoring_keys, rows, layer.scaling, codes, sums)
            selection = self._selection._replace(
                offsets=self._selection.offsets[group.first : group.last],
                counts=self._selection.counts[group.first : group.last],
            )
            budget = self._config.budget
            select_slots(codes, self._table, rows, budget, selection, append_own=False)
        self._store.put(layer.layer_id, self._selection)

    def _score(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        scoring_keys: torch.Tensor | KeyCopy,
        rows: Rows,
        scale: float,
        codes: CodeBuffer,
        sums: torch.Tensor | None,
    ) -> None:
        budget, table = self._config.budget, self._table
        stride = 1 if self._config.exact else LSE_STRIDE
        most = codes.codes.shape[2] + TILE
        lse = tile_lse(q, keys, table, rows, scale, budget, stride=stride, max_end=most)
        tile_scores(
            q,
            scoring_keys,
            table,
            rows,
            lse,
            scale,
            budget,
            pooled=sums is not None,
            out=codes.codes,
            sums=sums,
        )
        count_high(codes, rows, budget)

    def attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Attend every tile to the lists of its anchor and to itself; padding stays zero."""
        keys, values = key_value_caches(self._pool, layer.layer_id)
        selection, head_map = self._store.get(layer.layer_id)
        out = torch.empty_like(q)
        out[self._tokens :].zero_()
        return tile_attention(
            q, keys, values, self._table, self._rows, selection, head_map, layer.scaling, out=out
        )
