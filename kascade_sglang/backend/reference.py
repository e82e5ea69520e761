"""A step through the torch reference, tile by tile: on a CPU, and for comparisons anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kascade_kernels.reference import pool_keys, tile_attention, working_dtype
from kascade_kernels.tiles import Tiles, cut_tiles
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.kv import KeyValues
from kascade_sglang.backend.selectors import SELECTORS, Case
from kascade_sglang.backend.tile_lists import selected_counts
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.steps import Batch, Layer

Selection = tuple[torch.Tensor, ...]
"""For every tile of the step, int64 [KV heads, selected] slots, ascending by position."""


class Tile(NamedTuple):
    """The queries of one request that fall into one tile.

    request: index in the batch. queries: where they lie in q. own_start: the tile's first
    position, which is also the number of candidates. end: keys that the last query sees.
    selected: keys to select before the tile. pooled: keys in its candidate pool; 0 without one.
    """

    request: int
    queries: slice
    own_start: int
    end: int
    selected: int
    pooled: int


@dataclass(frozen=True)
class ReferenceStep:
    """One step's tiles and the slots behind them.

    slots: for each request, int64 [sequence length]: its KV slots, copied when the step began
        because the scheduler may rewrite the table while the step runs.
    """

    tiles: Tiles
    selected: tuple[int, ...]
    pooled: tuple[int, ...]
    slots: tuple[torch.Tensor, ...]

    def __iter__(self) -> Iterator[Tile]:
        columns = (*self.tiles, self.tiles.candidates)
        counts = zip(self.selected, self.pooled, strict=True)
        for column, held in zip(zip(*columns, strict=True), counts, strict=True):
            request, end, start, tokens, own_start = map(int, column)
            yield Tile(request, slice(start, start + tokens), own_start, end, *held)


class ReferencePath:
    """Prefill and decoding alike: decoding is the case of one new token a request.

    table: int32 [requests, context], SGLang's.
    """

    attends_densely = False

    def __init__(self, config: KascadeConfig, table: torch.Tensor, kv: KeyValues) -> None:
        self._config, self._table, self._kv = config, table, kv

    def reserve(self, requests: int) -> None:
        """Refuse capture: eager torch chooses shapes by length, which a graph would freeze."""
        raise KascadeError("CUDA graphs: this path computes eagerly; pass --disable-cuda-graph")

    def prepare(self, batch: Batch) -> None:
        """Do nothing: steps are not captured, so ``record`` may use the host."""

    def record(self, batch: Batch) -> ReferenceStep:
        """Cut this step's queries into tiles."""
        begins, ends = batch.spans
        tiles = cut_tiles(begins, ends)
        budget = self._config.budget if batch.decode else self._config.prefill_budget
        selected = selected_counts(tiles, budget, batch.budgets)
        rule = self._config.pool_rule if batch.decode else None
        pooled = rule.pooled_counts(tiles.index, selected) if rule else 0 * selected
        rows = zip(batch.requests.tolist(), ends.tolist(), strict=True)
        slots = tuple(self._table[row, :end].to(torch.int64) for row, end in rows)
        return ReferenceStep(tiles, tuple(selected.tolist()), tuple(pooled.tolist()), slots)

    def select(
        self,
        step: ReferenceStep,
        q: torch.Tensor,
        layer: Layer,
        out: torch.Tensor | None = None,
        store: IndexStore[Selection] | None = None,
    ) -> Selection:
        """Select for every tile; ``out`` must be None."""
        pool = store.pool_of(layer.index) if store is not None and any(step.pooled) else None
        if pool is not None:
            return self._select_in_pool(step, q, layer, *pool)
        k_cache, _ = self._kv.of(layer.index)
        makes_pool = store is not None and store.makes_pool(layer.index)
        selection, pools, request, keys = [], [], -1, None
        for tile in step:
            if tile.request != request:
                request, keys = tile.request, None
            if keys is None and tile.selected < tile.own_start:
                # One gather a request, in the working precision, serves all its tiles.
                keys = k_cache[step.slots[request]]
                keys = keys.to(working_dtype(keys))
            seen = None if keys is None else keys[: tile.end]
            wanted = (selection, tile.selected), (pools, tile.pooled)
            for lists, count in wanted[: 1 + makes_pool]:
                chosen = self._choose(tile, count, tile.own_start, q, seen, layer)
                lists.append(step.slots[request][chosen.expand(k_cache.shape[1], -1)])
        if makes_pool:
            store.put_pool(layer.index, tuple(pools))
        return tuple(selection)

    def _select_in_pool(
        self,
        step: ReferenceStep,
        q: torch.Tensor,
        layer: Layer,
        pools: Selection,
        head_map: torch.Tensor,
    ) -> Selection:
        """Select for every tile of its candidate pool."""
        k_cache, _ = self._kv.of(layer.index)
        selection = []
        for tile, slots in zip(step, pools, strict=True):
            pool, own = slots[head_map], step.slots[tile.request][tile.own_start : tile.end]
            keys = pool_keys(k_cache, pool, own)
            keys = keys.to(working_dtype(keys))
            chosen = self._choose(tile, tile.selected, tile.pooled, q, keys, layer)
            selection.append(pool.gather(1, chosen.expand(len(pool), -1)))
        return tuple(selection)

    def _choose(
        self,
        tile: Tile,
        count: int,
        candidates: int,
        q: torch.Tensor,
        keys: torch.Tensor | None,
        layer: Layer,
    ) -> torch.Tensor:
        """Return the places of the ``count`` best candidates, int64 [H or 1, count].

        keys: [L, H, D], candidates and own tile; not looked at where all candidates are chosen.
        """
        if count in (0, candidates):
            return torch.arange(count, device=q.device).unsqueeze(0)
        scale, pooled, queries = layer.scale, self._config.pooled, q[tile.queries]
        case = Case(queries, keys, count, layer.index, scale, pooled, layer.sinks)
        return SELECTORS[self._config.selection](case)

    def attend(
        self,
        step: ReferenceStep,
        q: torch.Tensor,
        layer: Layer,
        selected: Selection,
        head_map: torch.Tensor,
    ) -> torch.Tensor:
        """Attend every tile to its selection and, causally, to itself; padding stays zero."""
        keys, values = self._kv.of(layer.index)
        out, v_scale = torch.zeros_like(q), layer.v_scale or 1.0
        for tile, slots in zip(step, selected, strict=True):
            queries, own = q[tile.queries], step.slots[tile.request][tile.own_start : tile.end]
            out[tile.queries] = tile_attention(
                queries, keys, values, slots[head_map], own, layer.scale, v_scale, layer.sinks
            )
        return out
