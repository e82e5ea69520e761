"""Attention of one new query to the keys of its list, split over the list."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LOGIT_BOUND,
    load_values,
    load_visible,
    of_mapped_list,
    soften,
    store_part,
    to_meet,
)


@triton.jit
def decode_attention_kernel(
    q,  # [rows, Hq, D]
    k,  # [slots, H, D]
    v,  # [slots, H, D]
    slots,  # int32 [total]
    offsets,  # int64 [rows, LISTS]
    counts,  # int32 [rows, LISTS]
    spans,  # int32 [rows], blocks of one program
    head_map,  # int32 [H]
    part_lse,  # float32 [rows, Hq, SPLITS]
    part_out,  # float32 [rows, Hq, SPLITS, D]
    scale_log2,
    stride_q,
    stride_k,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # Grid: (HEADS, rows, SPLITS). Splits last: those without keys then wait behind the others.
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = of_mapped_list(counts, row, head_map, head, LISTS)
    span = tl.load(spans + row) * BLOCK
    lo = split * span
    hi = tl.minimum(lo + span, count)

    group = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, D)
    real = group < GROUP
    part = (row.to(tl.int64) * (HEADS * GROUP) + head * GROUP + group) * SPLITS + split
    if lo >= hi:
        tl.store(part_lse + part, float("-inf"), mask=real)
        return
    list_ = slots + of_mapped_list(offsets, row, head_map, head, LISTS)
    q_rows = row.to(tl.int64) * stride_q + (head * GROUP + group) * D
    queries = tl.load(q + q_rows[:, None] + dim[None, :], mask=real[:, None], other=0.0)
    queries = to_meet(queries, k)

    largest = tl.full([GROUP_PAD], -LOGIT_BOUND, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D], tl.float32)
    for start in tl.range(lo, hi, BLOCK):
        index = start + tl.arange(0, BLOCK)
        visible = index < hi
        slot = tl.load(list_ + index, mask=visible, other=0).to(tl.int64)
        address = slot[:, None] * stride_k + head * D + dim[None, :]
        keys = load_visible(k, address, visible)
        s = tl.dot(queries, tl.trans(keys)) * scale_log2
        s = tl.where(visible[None, :], s, float("-inf"))
        weights, shrink, largest, total = soften(s, tl.max(s, 1), largest, total)
        values = load_values(v, slot, stride_k, head * D, visible, D)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])

    store_part(part_lse, part_out, part, acc, largest, total, real, D)
