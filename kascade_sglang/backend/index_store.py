"""The keys that this step's anchors selected, as KV slots."""

from typing import Generic

import torch

from kascade_sglang.backend.path import SelectedT
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError


class IndexStore(Generic[SelectedT]):
    """Hands an anchor's selection to the layers that reuse it, with the head map to read it by.

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
            plan.local_head_map(layer, heads) if layer in plan.reuse_layers else range(len(heads))
            for layer in range(plan.shape.layers)
        ]
        table = torch.tensor(list(map(list, maps)), dtype=torch.int32, device=device)
        self._head_maps = torch.zeros_like(table) if one_list else table
        self._anchor_of = plan.anchor_of
        self._kept: tuple[int, SelectedT] | None = None

    def clear(self) -> None:
        """Forget the last step."""
        self._kept = None

    def put(self, anchor: int, selected: SelectedT) -> None:
        """Keep an anchor's selection; the one before it is no longer needed."""
        self._kept = anchor, selected

    def get(self, layer: int) -> tuple[SelectedT, torch.Tensor]:
        """Return what ``layer`` attends to, its own selection or its anchor's, and its head map."""
        anchor = self._anchor_of[layer]
        if self._kept is None or self._kept[0] != anchor:
            raise KascadeError(f"layer {layer} ran before its anchor, layer {anchor}, in this step")
        return self._kept[1], self._head_maps[layer]
