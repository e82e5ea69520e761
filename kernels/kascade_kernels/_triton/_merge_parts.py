"""Merge of partial attention results by their log-sum-exp."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LEAST_TOTAL,
    LOGIT_BOUND,
    load_sinks,
    of_mapped_list,
)


@triton.jit
def merge_parts_kernel(
    part_out,  # float32 [rows, Hq, SPLITS, D]
    part_lse,  # float32 [rows, Hq, SPLITS]
    lengths,  # [rows, LISTS], keys that were cut into parts
    spans,  # int32 [rows], steps of one part
    head_map,  # int32 [H], which of a row's lengths a KV head has; read where LISTS > 1
    sinks,  # [Hq], or None
    out,  # [rows, Hq, D]
    v_scale,
    STEP: tl.constexpr,
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,  # parts read at once
):
    # Grid: (Q_HEADS, rows).
    q_head, row = tl.program_id(0), tl.program_id(1)
    length = of_mapped_list(lengths, row, head_map, q_head // GROUP, LISTS).to(tl.int32)
    used = tl.cdiv(length, tl.load(spans + row) * STEP)
    index = row.to(tl.int64) * Q_HEADS + q_head
    dim = tl.arange(0, D)
    split = tl.arange(0, SPLITS)
    lse = tl.load(part_lse + index * SPLITS + split, mask=split < used, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), -LOGIT_BOUND)
    if sinks is not None:
        sink = load_sinks(sinks, q_head, True)
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(lse - top), 0)
    if sinks is not None:
        # No part knows of it, so it counts once however many there are.
        total += tl.exp2(sink - top)
    total = tl.maximum(total, LEAST_TOTAL)
    merged = tl.zeros([D], tl.float32)
    for first in range(0, used, BLOCK):
        part = first + tl.arange(0, BLOCK)
        one = tl.load(part_lse + index * SPLITS + part, mask=part < used, other=float("-inf"))
        address = (index * SPLITS + part)[:, None] * D + dim[None, :]
        values = tl.load(part_out + address, mask=(part < used)[:, None], other=0.0)
        merged += tl.sum(values * tl.exp2(one - top)[:, None], 0)
    if v_scale is not None:
        merged *= v_scale
    tl.store(out + index * D + dim, (merged / total).to(out.dtype.element_ty))
