"""The keys that this step's anchors selected, as KV slots."""

import torch

from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError

Selection = list[torch.Tensor]
"""For every tile row of the step, int64 [KV heads, selected] slots."""


class IndexStore:
    """Hands an anchor's selection to the layers that reuse it, through the head map.

    heads: the model's KV heads that this rank holds; head maps stay within them.
    """

    def __init__(self, config: KascadeConfig, heads: range, device: str) -> None:
        self._plan = config.plan
        self._head_maps = {
            layer: torch.tensor(config.plan.local_head_map(layer, heads), device=device)
            for layer in config.plan.reuse_layers
        }
        self._by_anchor: dict[int, Selection] = {}

    def clear(self) -> None:
        """Forget the last step."""
        self._by_anchor = {}

    def put(self, anchor: int, selection: Selection) -> None:
        """Keep an anchor's selection; the one before it is no longer needed."""
        self._by_anchor = {anchor: selection}

    def get(self, layer: int) -> Selection:
        """Return what ``layer`` attends to: its own selection, or its anchor's, heads mapped."""
        anchor = self._plan.anchor_of[layer]
        if anchor not in self._by_anchor:
            raise KascadeError(f"layer {layer} ran before its anchor, layer {anchor}, in this step")
        selection = self._by_anchor[anchor]
        if layer == anchor:
            return selection
        return [slots[self._head_maps[layer]] for slots in selection]
