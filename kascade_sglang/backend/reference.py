"""A step through the torch reference, tile by tile: on a CPU, and for comparisons anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kascade_kernels.reference import tile_attention, working_dtype
from kascade_kernels.tiles import Tiles, cut_tiles
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
    selected: keys to select before the tile.
    """

    request: int
    queries: slice
    own_start: int
    end: int
    selected: int


@dataclass(frozen=True)
class ReferenceStep:
    """One step's tiles and the slots behind them.

    slots: for each request, int64 [sequence length]: its KV slots, copied when the step began
        because the scheduler may rewrite the table while the step runs.
    """

    tiles: Tiles
    selected: tuple[int, ...]
    slots: tuple[torch.Tensor, ...]

    def __iter__(self) -> Iterator[Tile]:
        columns = (*self.tiles, self.tiles.candidates)
        for column, selected in zip(zip(*columns, strict=True), self.selected, strict=True):
            request, end, start, tokens, own_start = map(int, column)
            yield Tile(request, slice(start, start + tokens), own_start, end, selected)


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
        rows = zip(batch.requests.tolist(), ends.tolist(), strict=True)
        slots = tuple(self._table[row, :end].to(torch.int64) for row, end in rows)
        return ReferenceStep(tiles, tuple(selected.tolist()), slots)

    def select(
        self, step: ReferenceStep, q: torch.Tensor, layer: Layer, out: torch.Tensor | None = None
    ) -> Selection:
        """Select for every tile; ``out`` must be None."""
        k_cache, _ = self._kv.of(layer.index)
        selector, heads = SELECTORS[self._config.selection], k_cache.shape[1]
        selection, request, keys = [], -1, None
        for tile in step:
            if tile.request != request:
                request, keys = tile.request, None
            if tile.selected == tile.own_start:
                positions = torch.arange(tile.selected, device=q.device).unsqueeze(0)
            else:
                if keys is None:
                    # One gather a request, in the working precision, serves all its tiles.
                    keys = k_cache[step.slots[request]]
                    keys = keys.to(working_dtype(keys))
                case = Case(
                    q[tile.queries],
                    keys[: tile.end],
                    tile.selected,
                    layer.index,
                    layer.scale,
                    self._config.pooled,
                    layer.sinks,
                )
                positions = selector(case)
            selection.append(step.slots[request][positions.expand(heads, -1)])
        return tuple(selection)

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
