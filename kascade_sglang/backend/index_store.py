"""The keys that this step's anchors selected, and candidate pools, as KV slots."""

from typing import Generic

import torch

from kascade_sglang.backend.path import SelectedT
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError

ALIGNED = 4
"""Numbers of a head map that fill 16 bytes."""


class IndexStore(Generic[SelectedT]):
    """Hands an anchor's selection to the layers that reuse it, with the head map to read it by.

    Likewise a maker's candidate pool to the anchors that score it.
    A head map is int32 [KV heads]: which of the selection's lists each head attends to. An
    anchor's own is the identity.
    heads: the model's KV heads that this rank holds; head maps stay within them.
    one_list: whether selections hold a single list for all heads.
    """

    def __init__(
        self, config: KascadeConfig, heads: range, device: str, one_list: bool = False
    ) -> None:
        plan = config.plan
        maps = [
            plan.local_head_map(layer, heads) if layer in borrowing else range(len(heads))
            for borrowing in (plan.reuse_layers, plan.maker_of)
            for layer in range(plan.shape.layers)
        ]
        # Every map begins where memory is aligned: kernels are compiled again where one is not.
        width = -(-len(heads) // ALIGNED) * ALIGNED
        table = torch.zeros(len(maps), width, dtype=torch.int32, device=device)[:, : len(heads)]
        if not one_list:
            table.copy_(torch.tensor(list(map(list, maps)), dtype=torch.int32))
        self._head_maps, self._pool_maps = table.split(plan.shape.layers)
        self._anchor_of, self._maker_of = plan.anchor_of, plan.maker_of
        self._kept: tuple[int, SelectedT] | None = None
        self._pool: tuple[int, SelectedT] | None = None

    def clear(self) -> None:
        """Forget the last step."""
        self._kept = self._pool = None

    def put(self, anchor: int, selected: SelectedT) -> None:
        """Keep an anchor's selection; the one before it is no longer needed."""
        self._kept = anchor, selected

    def get(self, layer: int) -> tuple[SelectedT, torch.Tensor]:
        """Return what ``layer`` attends to, its own selection or its anchor's, and its head map."""
        anchor = self._anchor_of[layer]
        return _lent(self._kept, layer, "anchor", anchor), self._head_maps[layer]

    def makes_pool(self, layer: int) -> bool:
        """Whether a layer leaves a candidate pool that another one scores."""
        return layer in self._maker_of.values()

    def put_pool(self, maker: int, pool: SelectedT) -> None:
        """Keep a maker's candidate pool; the one before it is no longer needed."""
        self._pool = maker, pool

    def pool_of(self, layer: int) -> tuple[SelectedT, torch.Tensor] | None:
        """Return the pool an anchor scores, and its head map; None where it scores all keys."""
        maker = self._maker_of.get(layer)
        if maker is None:
            return None
        return _lent(self._pool, layer, "maker", maker), self._pool_maps[layer]


def _lent(kept: tuple[int, SelectedT] | None, layer: int, kind: str, lender: int) -> SelectedT:
    """Return what a layer borrows; raises KascadeError where another lent it, or none has."""
    if kept is None or kept[0] != lender:
        raise KascadeError(f"layer {layer} ran before its {kind}, layer {lender}, in this step")
    return kept[1]
