"""Keys in 8 bits, one scale per token and head, for scoring only."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3e38)
"""What infinite keys count as, so that a scale is finite."""


@triton.jit
def copy_keys_kernel(
    k,  # [slots, H, D]
    written,  # [tokens], slots
    values,  # int8 [slots, H, D]
    k_scales,  # float32 [slots, H]
    stride_k,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D: tl.constexpr,
):
    # Grid: (tokens,).
    slot = tl.load(written + tl.program_id(0)).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, D)
    inside = (head < HEADS)[:, None]
    address = head[:, None] * D + dim[None, :]
    key = tl.load(k + slot * stride_k + address, mask=inside, other=0.0).to(tl.float32)
    key = tl.minimum(tl.maximum(key, -LARGEST), LARGEST)
    scale = tl.maximum(tl.max(tl.abs(key), 1), 1e-30) / 127.0
    tl.store(k_scales + slot * HEADS + head, scale, mask=head < HEADS)
    rounded = tl.floor(key / scale[:, None] + 0.5).to(tl.int8)
    tl.store(values + slot * (HEADS * D) + address, rounded, mask=inside)
