"""Merge of partial attention results by their log-sum-exp."""

import triton
import triton.language as tl


@triton.jit
def merge_parts_kernel(
    part_out,  # float32 [rows, Hq, SPLITS, D]
    part_lse,  # float32 [rows, Hq, SPLITS], -inf where a part has no keys
    out,  # [rows, Hq, D]
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, D)
    split = tl.arange(0, SPLITS)
    lse = tl.load(part_lse + row * SPLITS + split)
    weight = tl.exp2(lse - tl.max(lse, 0))
    address = (row * SPLITS + split)[:, None] * D + dim[None, :]
    parts = tl.load(part_out + address, mask=weight[:, None] > 0, other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + dim, merged.to(out.dtype.element_ty))
