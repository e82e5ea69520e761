"""One pass over a request's keys for one new query: logits, and attention where asked for.

Requests that share a prefix share the pass over it.
"""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LOGIT_BOUND,
    bounded_lse,
    encode_score,
    list_of,
    load_sinks,
    load_slots,
    load_values,
    load_visible,
    own_tile_start,
    power_of_2,
    slots_of,
    soften,
    store_counts,
    store_part,
    to_meet,
)


@triton.jit
def _quantise_rows(q):
    """Rows [M, D] -> int8 rows and their float32 scales [M]."""
    scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-30) / 127.0
    return tl.floor(q / scale[:, None] + 0.5).to(tl.int8), scale


@triton.jit(do_not_specialize=["pool_offsets", "pool_map"])
def decode_scores_kernel(
    q,  # [rows, Hq, D]
    k,  # [slots, H, D], or int8 with EIGHT_BIT
    k_scales,  # float32 [slots, H], read with EIGHT_BIT
    v,  # [slots, H, D], read with ATTEND
    table,  # int32 [requests, max_context], or slots of pools
    requests,  # [rows]
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    spans,  # int32 [rows], blocks of one program
    shared_keys,  # int32 [rows]
    shared_rows,  # int32 [rows, MEMBERS]
    pool_offsets,  # int64 [rows, LISTS]: where pools begin in the table, or None
    pool_map,  # int32 [H], read with pools
    logits,  # float16 [rows, Hq, stride]: base 2, less the block's maximum
    block_max,  # float32 [rows, Hq, stride / BLOCK]
    part_lse,  # float32 [rows, Hq, SPLITS]
    part_out,  # float32 [rows, Hq, SPLITS, D], written with ATTEND
    scale_log2,
    stride_q,
    stride_k,
    stride_table,
    stride_logits_head,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    MEMBERS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    ATTEND: tl.constexpr,
):
    # Grid: (HEADS, rows, SPLITS). Splits last: those without keys then wait behind the others.
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own_end = tl.load(ends + row).to(tl.int32)
    span = tl.load(spans + row) * BLOCK
    lo = split * span
    hi = tl.minimum(lo + span, own_end)
    common = tl.load(shared_keys + row) if pool_offsets is None else 0
    together = lo + span <= common

    # Each lane is a query head of a row: of this row alone, or where a group of rows shares these
    # keys, of all of them, in the program of the group's first row.
    lane = tl.arange(0, GROUP_PAD)
    member = lane // GROUP
    grouped = shared_rows + row * MEMBERS + member
    grouped = tl.load(grouped, mask=(member < MEMBERS) & together, other=-1)
    lane_row = tl.where(together, grouped, tl.where(member == 0, row, -1))
    real = lane_row >= 0
    if tl.max(lane_row, 0) < 0:
        return
    end = tl.load(ends + lane_row, mask=real, other=1).to(tl.int32)
    of_list = lane_row * LISTS + list_of(head, LISTS)
    scored = tl.load(counts + of_list, mask=real, other=1) < end
    any_scored = tl.max(scored.to(tl.int32), 0) > 0
    if not (any_scored or ATTEND):
        return
    dim = tl.arange(0, D)
    lane_head = head * GROUP + lane % GROUP
    q_heads = lane_row.to(tl.int64) * (HEADS * GROUP) + lane_head  # [GROUP_PAD]
    part = q_heads * SPLITS + split
    if lo >= hi:
        tl.store(part_lse + part, float("-inf"), mask=real)
        return
    q_rows = lane_row.to(tl.int64) * stride_q + lane_head * D
    queries = tl.load(q + q_rows[:, None] + dim[None, :], mask=real[:, None], other=0.0)
    queries = to_meet(queries, k)
    if EIGHT_BIT:
        queries, q_scales = _quantise_rows(queries.to(tl.float32))
    row_slots = slots_of(table, requests, stride_table, pool_offsets, pool_map, row, head, LISTS)

    largest = tl.full([GROUP_PAD], -LOGIT_BOUND, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D], tl.float32)
    for start in tl.range(lo, hi, BLOCK):
        position = start + tl.arange(0, BLOCK)
        visible = position < hi
        slot = load_slots(row_slots, position, visible)
        address = slot[:, None] * stride_k + head * D + dim[None, :]
        keys = load_visible(k, address, visible)
        if EIGHT_BIT:
            k_scale = tl.load(k_scales + slot * HEADS + head, mask=visible, other=0.0)
            products = tl.dot(queries, tl.trans(keys), out_dtype=tl.int32).to(tl.float32)
            s = products * (q_scales * scale_log2)[:, None] * k_scale[None, :]
        else:
            s = tl.dot(queries, tl.trans(keys)) * scale_log2
        s = tl.where(visible[None, :], s, float("-inf"))
        m_block = tl.minimum(tl.maximum(tl.max(s, 1), -LOGIT_BOUND), LOGIT_BOUND)
        if any_scored:
            # The block's maximum apart: half precision is then finest where scores are largest.
            where = q_heads * stride_logits_head + start
            less = (s - m_block[:, None]).to(tl.float16)
            offsets = where[:, None] + tl.arange(0, BLOCK)[None, :]
            # Rows have room for whole blocks, so that every store is as wide as it can be.
            tl.store(logits + offsets, less, mask=scored[:, None])
            tl.store(block_max + where // BLOCK, m_block, mask=scored)
        weights, shrink, largest, total = soften(s, m_block, largest, total)
        if ATTEND:
            values = load_values(v, slot, stride_k, head * D, visible, D)
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])

    if ATTEND:
        store_part(part_lse, part_out, part, acc, largest, total, real, D)
    else:
        tl.store(part_lse + part, bounded_lse(largest, total), mask=real)


@triton.jit
def pool_scores_kernel(
    logits,  # float16 [rows, Hq, stride]
    block_max,  # float32 [rows, Hq, stride / BLOCK]
    part_lse,  # float32 [rows, Hq, SPLITS]
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    sinks,  # [Hq], or None
    codes,  # uint16 [rows, LISTS, stride]
    high_counts,  # int16 [rows, LISTS, chunks, 256]
    stride_logits_head,
    LISTS: tl.constexpr,
    PER_LIST: tl.constexpr,  # query heads summed into one list
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Grid: (programs of one list, LISTS, rows).
    program, list_, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(ends + row).to(tl.int32)
    candidates = own_tile_start(end)
    chunks = tl.cdiv(candidates, CHUNK)
    list_index = row.to(tl.int64) * LISTS + list_
    if program >= chunks or tl.load(counts + list_index) == end:
        return
    member = tl.arange(0, power_of_2(PER_LIST))
    head = list_index * PER_LIST + member
    address = head[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    parts = tl.load(part_lse + address, mask=member[:, None] < PER_LIST, other=0.0)
    top = tl.maximum(tl.max(parts, 1), -LOGIT_BOUND)
    if sinks is not None:
        sink = load_sinks(sinks, list_ * PER_LIST + member, member < PER_LIST)
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(parts - top[:, None]), 1)
    if sinks is not None:
        total += tl.exp2(sink - top)
    lse = top + tl.log2(total)  # [PER_LIST padded]
    # Finite also where no key has weight, and so that keys of +inf get more mass than any others.
    lse = tl.minimum(tl.maximum(lse, -LOGIT_BOUND), LOGIT_BOUND / 2)
    for chunk in tl.range(program, chunks, tl.num_programs(0)):
        block = chunk * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
        position = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        visible = position < candidates
        begun = block * BLOCK < candidates
        score = tl.zeros([CHUNK // BLOCK, BLOCK], tl.float32)
        for index in tl.range(PER_LIST, loop_unroll_factor=4):
            where = (list_index * PER_LIST + index) * stride_logits_head
            less = tl.load(logits + where + position, mask=visible, other=float("-inf"))
            m_block = tl.load(block_max + where // BLOCK + block, mask=begun, other=0.0)
            m_block -= tl.sum(tl.where(member == index, lse, 0.0), 0)
            score += tl.exp2(less.to(tl.float32) + m_block[:, None])
        code = encode_score(score)
        tl.store(codes + list_index * stride_logits_head + position, code, mask=visible)
        # One tensor is flattened, in any order: two might each get an order of their own.
        high = tl.ravel(tl.where(visible, (code >> 8).to(tl.int32), 256), can_reorder=True)
        store_counts(high_counts, list_index * CHUNKS + chunk, high, high < 256)
