"""8-bit copies of the anchors' keys, for scoring.

A copy is written where the pool is, slot by slot, in the same step. So whatever the pool's slots
go through (prefix hits, eviction, retraction), the copy holds the same tokens.
"""

import torch

from kascade_kernels.key_copy import allocate_key_copy, copy_keys
from kascade_kernels.structs import KeyCopy
from kascade_sglang.backend.rank_shape import RankShape


class KeyCopies:
    """Copies of some layers' keys; the other layers score with the pool's own.

    layers: which. Needs ``bytes_per_slot`` for each.
    """

    def __init__(self, layers: list[int], shape: RankShape) -> None:
        self._copies = {
            layer: allocate_key_copy(shape.slots, shape.kv_heads, shape.head_dim, shape.device)
            for layer in layers
        }

    @staticmethod
    def bytes_per_slot(kv_heads: int, head_dim: int) -> int:
        """Bytes of one layer's copy for one token: 8-bit values and a float32 scale a head."""
        return kv_heads * (head_dim + 4)

    def write(self, layer: int, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Bring the copy up to date; keys: the pool's [slots, H, D], slots: those just written."""
        if layer in self._copies:
            copy_keys(keys, slots, self._copies[layer])

    def scoring_keys(self, layer: int, keys: torch.Tensor) -> torch.Tensor | KeyCopy:
        """Return what a layer scores with."""
        return self._copies.get(layer, keys)
