"""An 8-bit copy of a layer's keys, kept in step with the pool because it is written with it."""

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._copy_keys import copy_keys_kernel
from kascade_kernels.checks import require_heads_together, require_shape
from kascade_kernels.structs import KeyCopy


def allocate_key_copy(slots: int, heads: int, dim: int, device: torch.device | str) -> KeyCopy:
    """Allocate the copy of a pool of ``slots`` tokens: heads * (dim + 4) bytes a token."""
    return KeyCopy(
        torch.zeros(slots, heads, dim, dtype=torch.int8, device=device),
        torch.zeros(slots, heads, dtype=torch.float32, device=device),
    )


def copy_keys(k_cache: torch.Tensor, written: torch.Tensor, copy: KeyCopy) -> None:
    """Round the keys of the slots ``written``, [tokens], from the pool into the copy.

    k_cache: [slots, H, D].
    """
    slots, heads, dim = k_cache.shape
    require_heads_together("k_cache", k_cache)
    require_shape("copy.values", copy.values, (None, heads, dim))
    copy_keys_kernel[(written.shape[0],)](
        k=k_cache,
        written=written,
        values=copy.values,
        k_scales=copy.scales,
        stride_k=k_cache.stride(0),
        HEADS=heads,
        HEADS_PAD=triton.next_power_of_2(heads),
        D=dim,
        **tuning.launch("copy_keys", k_cache.device).options(),
    )
