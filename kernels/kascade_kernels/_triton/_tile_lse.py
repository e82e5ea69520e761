"""Body of ``tile_lse``: how much a tile's queries look at all their keys, in base 2."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LOGIT_BOUND,
    TILE,
    VARY,
    bounded_lse,
    list_of,
    load_sinks,
    own_tile_start,
    power_of_2,
)
from kascade_kernels._triton._tiles import (
    block_count,
    block_rows,
    clamped_slots,
    gather_keys,
    load_queries,
)

EDGE = tl.constexpr(128)
"""Candidates at either end that a sampled log-sum-exp reads one by one."""


@triton.jit
def sampled_middle(candidates, STRIDE: tl.constexpr):
    """Keys between the two edges, and how many of them are read."""
    middle = tl.maximum(candidates - 2 * EDGE, 0)
    return middle, tl.cdiv(middle, STRIDE)


@triton.jit
def sampled_position(index, middle, STRIDE: tl.constexpr):
    """Position of the index-th key that is read: first edge, last edge, then the middle."""
    at_edge = tl.where(index < EDGE, index, index + middle)
    return tl.where(index < 2 * EDGE, at_edge, EDGE + (index - 2 * EDGE) * STRIDE)


@triton.jit
def add_exponentials(
    queries, keys, hidden, weight, largest, total, scale_log2, MASKED: tl.constexpr
):
    """Take keys [N, D] into a running log-sum-exp [ROWS]; each stands for 2^weight keys."""
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [ROWS, N]
    if MASKED:
        products = tl.where(hidden, float("-inf"), products)
    previous = largest
    largest = tl.maximum(largest, tl.max(products, axis=1) * scale_log2 + weight)
    total = total * tl.exp2(previous - largest)
    total += tl.sum(tl.exp2(products * scale_log2 - (largest - weight)[:, None]), axis=1)
    return largest, total


@triton.jit(do_not_specialize=VARY)
def tile_lse_kernel(
    q,  # [tokens, Hq, D]
    k,  # [slots, H, D]
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    ends,  # [rows]
    starts,  # int32 [rows]
    tokens,  # int32 [rows]
    counts,  # int32 [rows, LISTS]
    part_lse,  # float32 [rows, HEADS, room, TILE * GROUP]
    scale_log2,
    room,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_table,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-sum-exp of one block of query rows over one span of the keys that are read.

    Span 0 takes in the own tile. A step of BLOCK keys must divide EDGE and SPAN, so that all its
    keys have one weight.
    """
    # Grid: (rows, HEADS * blocks, room). Later rows, which are the longer ones, start first.
    ROWS: tl.constexpr = block_rows(GROUP, 0)
    BLOCKS: tl.constexpr = block_count(GROUP)
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // BLOCKS
    query_row = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    span = tl.program_id(2)

    end = tl.load(ends + row).to(tl.int32)
    candidates = own_tile_start(end)
    middle, picked = sampled_middle(candidates, STRIDE)
    indices = candidates - middle + picked
    count = tl.load(tokens + row)
    dense = tl.load(counts + row * LISTS + list_of(head, LISTS)) == candidates
    without_query = tl.program_id(1) % BLOCKS * ROWS >= count * GROUP
    if dense | without_query | (span * SPAN >= indices):
        return

    row_slots = table + tl.load(requests + row).to(tl.int64) * stride_table
    query = query_row // GROUP
    live = query < count
    token = tl.load(starts + row) + query
    q_head = head * GROUP + query_row % GROUP
    queries = load_queries(q, k, token, q_head, live, stride_q, stride_q_head, D)

    largest = tl.full([ROWS], -LOGIT_BOUND, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if span == 0:
        own = candidates + tl.arange(0, TILE)
        own_slot = clamped_slots(row_slots, own, end - 1)
        own_keys = gather_keys(k, own_slot, head, stride_k, stride_k_head, D)
        unseen = own[None, :] > tl.minimum(end - count + query, end - 1)[:, None]
        largest, total = add_exponentials(
            queries, own_keys, unseen, 0.0, largest, total, scale_log2, True
        )
    stands_for = tl.maximum(middle, 1).to(tl.float32) / tl.maximum(picked, 1).to(tl.float32)
    middle_weight = tl.log2(stands_for)
    stop = tl.minimum(span * SPAN + SPAN, indices)
    whole = span * SPAN + (stop - span * SPAN) // BLOCK * BLOCK
    for first in range(span * SPAN, whole, BLOCK):
        position = sampled_position(first + tl.arange(0, BLOCK), middle, STRIDE)
        slot = tl.load(row_slots + position).to(tl.int64)
        keys = gather_keys(k, slot, head, stride_k, stride_k_head, D)
        weight = tl.where(first < 2 * EDGE, 0.0, middle_weight)
        largest, total = add_exponentials(
            queries, keys, None, weight, largest, total, scale_log2, False
        )
    if whole < stop:
        index = whole + tl.arange(0, BLOCK)
        tail = sampled_position(tl.minimum(index, stop - 1), middle, STRIDE)
        tail_slot = tl.load(row_slots + tail).to(tl.int64)
        tail_keys = gather_keys(k, tail_slot, head, stride_k, stride_k_head, D)
        weight = tl.where(whole < 2 * EDGE, 0.0, middle_weight)
        past = index[None, :] >= stop
        largest, total = add_exponentials(
            queries, tail_keys, past, weight, largest, total, scale_log2, True
        )

    at = ((row.to(tl.int64) * HEADS + head) * room + span) * (TILE * GROUP) + query_row
    tl.store(part_lse + at, bounded_lse(largest, total), mask=live)


@triton.jit(do_not_specialize=VARY)
def merge_lse_kernel(
    part_lse,  # float32 [rows, HEADS, room, TILE * GROUP]
    ends,  # [rows]
    tokens,  # int32 [rows]
    counts,  # int32 [rows, LISTS]
    sinks,  # [Hq], or None
    lse,  # float32 [rows, HEADS, TILE * GROUP]
    room,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Merge the spans of one row and KV head, and sinks, in order; +inf where there is no query."""
    # Grid: (rows, HEADS).
    row, head = tl.program_id(0), tl.program_id(1)
    end = tl.load(ends + row).to(tl.int32)
    candidates = own_tile_start(end)
    if tl.load(counts + row * LISTS + list_of(head, LISTS)) == candidates:
        return
    middle, picked = sampled_middle(candidates, STRIDE)
    used = tl.cdiv(candidates - middle + picked, SPAN)
    query_row = tl.arange(0, power_of_2(TILE * GROUP))
    live = query_row // GROUP < tl.load(tokens + row)
    of_head = row.to(tl.int64) * HEADS + head
    parts = part_lse + of_head * room * (TILE * GROUP) + query_row

    largest = tl.full(query_row.shape, float("-inf"), tl.float32)
    for span in range(used):
        part = tl.load(parts + span * (TILE * GROUP), mask=live, other=0.0)
        largest = tl.maximum(largest, part)
    total = tl.zeros(query_row.shape, tl.float32)
    if sinks is not None:
        # No span knows of it, so it counts once however many there are.
        sink = load_sinks(sinks, head * GROUP + query_row % GROUP, live)
        largest = tl.maximum(largest, sink)
        total += tl.exp2(sink - largest)
    for span in range(used):
        part = tl.load(parts + span * (TILE * GROUP), mask=live, other=0.0)
        total += tl.exp2(part - largest)
    merged = tl.where(live, largest + tl.log2(total), float("inf"))
    tl.store(lse + of_head * (TILE * GROUP) + query_row, merged, mask=query_row < TILE * GROUP)
