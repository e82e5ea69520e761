"""The KV pool as attention reads it, and 8-bit copies of the anchors' keys, for scoring.

A copy is written where the pool is, slot by slot, in the same step. So whatever the pool's slots
go through (prefix hits, eviction, retraction), the copy holds the same tokens. What was drafted and
rejected is written anew with the next chain. SGLang moves keys from slot to slot for trees of
drafts alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from kascade_kernels.structs import KeyCopy
from kascade_sglang.host.runtime import key_value_caches, write_kv

if TYPE_CHECKING:
    from kascade_sglang.host.runtime import ForwardBatch, MHATokenToKVPool, RadixAttention


class KeyValues:
    """Keys and values of every layer, [slots, H, D] each.

    copied: layers with an 8-bit copy; the others score with the pool's own keys.
    slots: the pool's.
    """

    def __init__(
        self,
        pool: MHATokenToKVPool,
        copied: list[int],
        slots: int,
        kv_heads: int,
        head_dim: int,
        device: str,
    ) -> None:
        self._pool = pool
        self._copies = {
            layer: allocate_key_copy(slots, kv_heads, head_dim, device) for layer in copied
        }

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values."""
        return key_value_caches(self._pool, layer)

    def scoring_keys(self, layer: int) -> torch.Tensor | KeyCopy:
        """Return what a layer scores with."""
        return self._copies[layer] if layer in self._copies else self.of(layer)[0]

    def write(
        self, layer: RadixAttention, batch: ForwardBatch, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store a step's new keys and values."""
        write_kv(self._pool, layer, batch, k, v)

    def copy(self, layer: int, written: torch.Tensor) -> None:
        """Bring a layer's copy up to date; written: the slots just written, [tokens]."""
        if layer in self._copies:
            copy_keys(self.of(layer)[0], written, self._copies[layer])
