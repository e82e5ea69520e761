"""A prefill step through the kernels: tiles of absolute positions, in groups of bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kascade_kernels.arena import Arena
from kascade_kernels.budget import TILE
from kascade_kernels.select_slots import CodeBuffer, count_high, select_slots
from kascade_kernels.structs import Lists, Rows
from kascade_kernels.tile_attention import tile_attention
from kascade_kernels.tile_lse import tile_lse
from kascade_kernels.tile_scores import tile_scores
from kascade_kernels.tiles import cut_tiles
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.kv import KeyValues
from kascade_sglang.backend.sizes import Sizes
from kascade_sglang.backend.tile_lists import lay_out_lists, selected_counts
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer

LSE_STRIDE = 4
"""The default weighs queries against each other by one key in so many (and all near the ends):
0.5 % less attention mass than the exact selection on heavy-tailed attention, at a ratio of 0.1."""


@dataclass(frozen=True)
class TileGroup:
    """The tiles [first, last) of a step, scored together; what follows is of these tiles.

    keys: the most candidates. is_dense: none of the tiles needs scores.
    """

    first: int
    last: int
    keys: int
    is_dense: bool
    rows: Rows
    lists: Lists


@dataclass(frozen=True)
class ExtendStep:
    """One step's tiles, a row each.

    lists: of all rows; their counts are decided, their slots come from ``select``.
    tokens: of the whole step; what q holds behind them is padding.
    """

    rows: Rows
    lists: Lists
    groups: tuple[TileGroup, ...]
    tokens: int


def allocate_lists(slots: int, device: str) -> torch.Tensor:
    """Allocate the slots of a step's lists, int32."""
    return torch.empty(max(slots, 1), dtype=torch.int32, device=device)


class ExtendPath:
    """New tokens after a cached prefix of any length, requests of different lengths together.

    table: int32 [requests, context], SGLang's. arena: room for the scores of one group of tiles.
    """

    attends_densely = False

    def __init__(
        self, config: KascadeConfig, sizes: Sizes, table: torch.Tensor, kv: KeyValues, arena: Arena
    ) -> None:
        self._config, self._sizes = config, sizes
        self._table, self._kv, self._arena = table, kv, arena

    def reserve(self, requests: int) -> None:
        """Refuse capture: tiles are cut on the host."""
        raise KascadeError("CUDA graphs: prefill steps cut tiles on the host; capture decoding")

    def prepare(self, batch: Batch) -> None:
        """Do nothing: steps are not captured, so ``record`` may use the host."""

    def record(self, batch: Batch) -> ExtendStep:
        """Cut the new tokens into tiles and decide how long their lists are."""
        tiles = cut_tiles(*batch.spans)
        selected = selected_counts(tiles, self._config.prefill_budget, batch.budgets)
        lists, device = self._sizes.lists, str(self._table.device)
        counts = np.repeat(selected[:, None], lists, axis=1)
        offsets, total = lay_out_lists(tiles, counts, batch.budgets)
        flat = np.concatenate([*tiles, counts.ravel(), offsets.ravel()])
        host = torch.from_numpy(flat)
        if len(flat) and device.startswith("cuda"):
            host = host.pin_memory()
        on_device = host.to(device, non_blocking=True)
        count = len(selected)
        small = on_device[: count * (4 + lists)].to(torch.int32)
        _, ends, starts, tokens = small[: 4 * count].view(4, count)
        rows = Rows(batch.requests[on_device[:count]], ends, starts, tokens)
        where = Lists(
            allocate_lists(total, device),
            on_device[count * (4 + lists) :].view(count, lists),
            small[4 * count :].view(count, lists),
        )
        groups = self._cut_groups(tiles.candidates, selected, rows, where)
        return ExtendStep(rows, where, groups, int(tiles.tokens.sum()))

    def _cut_groups(
        self, candidates: np.ndarray, selected: np.ndarray, rows: Rows, lists: Lists
    ) -> tuple[TileGroup, ...]:
        """Cut the tiles, in order, so that each group's codes fit the arena."""
        groups, first = [], 0
        per_tile = [self._bytes_per_tile(max(TILE, int(n))) for n in candidates]
        dense = selected == candidates
        while first < len(candidates):
            last, most = first, 0
            while last < len(candidates):
                most_with = max(most, per_tile[last])
                if last > first and most_with * (last + 1 - first) > self._arena.size:
                    break
                last, most = last + 1, most_with
            mine = slice(first, last)
            groups.append(
                TileGroup(
                    first,
                    last,
                    keys=max(TILE, int(candidates[mine].max())),
                    is_dense=bool(dense[mine].all()),
                    rows=Rows(*(column[mine] for column in rows)),
                    lists=lists.rows(first, last),
                )
            )
            first = last
        return tuple(groups)

    def _bytes_per_tile(self, keys: int) -> int:
        sums = 4 * keys if self._config.pooled else 0
        return CodeBuffer.bytes_per_row(self._sizes.lists, keys) + sums

    def select(
        self,
        step: ExtendStep,
        q: torch.Tensor,
        layer: Layer,
        out: torch.Tensor | None = None,
        store: IndexStore[Lists] | None = None,
    ) -> Lists:
        """Select for every tile, of all keys: only decoding has candidate pools.

        ``out`` must be None.
        """
        for group in step.groups:
            codes = self._score(group, q, layer)
            select_slots(codes, self._table, group.rows, group.lists, append_own=False)
        return step.lists

    def _score(self, group: TileGroup, q: torch.Tensor, layer: Layer) -> CodeBuffer:
        """Return the codes of a group's candidates, in memory that the next group takes."""
        count, pooled, empty = group.last - group.first, self._config.pooled, self._arena.cut()
        codes = CodeBuffer.allocate(count, self._sizes.lists, group.keys, empty)
        if group.is_dense:
            return codes
        rows, lists, table, scale = group.rows, group.lists, self._table, layer.scale
        lse = tile_lse(
            q,
            self._kv.of(layer.index)[0],
            table,
            rows,
            lists,
            scale,
            sinks=layer.sinks,
            stride=1 if self._config.exact else LSE_STRIDE,
            max_end=group.keys + TILE,
        )
        tile_scores(
            q,
            self._kv.scoring_keys(layer.index),
            table,
            rows,
            lists,
            lse,
            scale,
            pooled=pooled,
            out=codes.codes,
            sums=empty((count, group.keys), torch.float32) if pooled else None,
        )
        count_high(codes, rows, lists)
        return codes

    def attend(
        self,
        step: ExtendStep,
        q: torch.Tensor,
        layer: Layer,
        selected: Lists,
        head_map: torch.Tensor,
    ) -> torch.Tensor:
        """Attend every tile to the lists of its anchor and to itself; padding stays zero."""
        keys, values = self._kv.of(layer.index)
        out = torch.empty_like(q)
        out[step.tokens :].zero_()
        return tile_attention(
            q,
            keys,
            values,
            self._table,
            step.rows,
            selected,
            head_map,
            layer.scale,
            v_scale=layer.v_scale,
            sinks=layer.sinks,
            out=out,
        )
