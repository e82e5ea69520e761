"""Body of ``tile_attention``. Logits are in base 2; query rows are numbered as in _tiles."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LEAST_TOTAL,
    LOGIT_BOUND,
    TILE,
    VARY,
    load_sinks,
    own_tile_start,
    soften,
)
from kascade_kernels._triton._tiles import (
    block_count,
    block_rows,
    clamped_slots,
    gather_keys,
    load_queries,
)


@triton.jit
def attend(queries, keys, values, hidden, acc, largest, total, scale_log2, MASKED: tl.constexpr):
    """Take keys and values [N, D] into the running softmax; hidden keys get no weight.

    acc: [ROWS, D]; largest, total: [ROWS], the largest logit and the sum of weights so far.
    """
    products = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [ROWS, N]
    if MASKED:
        products = tl.where(hidden, float("-inf"), products)
    block_largest = tl.max(products, axis=1) * scale_log2
    weights, shrink, largest, total = soften(products * scale_log2, block_largest, largest, total)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, largest, total


@triton.jit
def begin_softmax(sinks, q_head, live):
    """Largest logit and sum of weights, [ROWS], before any key: those of the sinks, if any."""
    largest = tl.full(q_head.shape, -LOGIT_BOUND, tl.float32)
    total = tl.zeros(q_head.shape, tl.float32)
    if sinks is not None:
        sink = load_sinks(sinks, q_head, live)
        largest = tl.maximum(sink, largest)
        total = tl.exp2(sink - largest)
    return largest, total


@triton.jit(do_not_specialize=VARY)
def tile_attention_kernel(
    q,  # [tokens, Hq, D]
    k,  # [slots, H, D]
    v,  # [slots, H, D]
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    ends,  # [rows]
    starts,  # int32 [rows]
    tokens,  # int32 [rows]
    slots,  # int32 [total]
    offsets,  # int64 [rows, LISTS]
    counts,  # int32 [rows, LISTS]
    head_map,  # int32 [H]
    sinks,  # [Hq], or None
    out,  # [tokens, Hq, D]
    v_scale,
    scale_log2,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_table,
    stride_out,
    stride_out_head,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attention of one block of query rows to its own tile, then to its list, in order.

    Whole steps of the list need no mask, which would be an eighth of the loop's instructions.
    """
    # Grid: (H * blocks, rows). Later rows, which are the longer ones, start first.
    ROWS: tl.constexpr = block_rows(GROUP, 0)
    BLOCKS: tl.constexpr = block_count(GROUP)
    row = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0) // BLOCKS
    query_row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    count = tl.load(tokens + row)
    if tl.program_id(0) % BLOCKS * ROWS >= count * GROUP:
        return

    query = query_row // GROUP
    q_head = head * GROUP + query_row % GROUP
    token = tl.load(starts + row) + query
    queries = load_queries(q, k, token, q_head, query < count, stride_q, stride_q_head, D)
    acc = tl.zeros([ROWS, D], tl.float32)
    largest, total = begin_softmax(sinks, q_head, query < count)

    end = tl.load(ends + row).to(tl.int32)
    row_slots = table + tl.load(requests + row).to(tl.int64) * stride_table
    own = own_tile_start(end) + tl.arange(0, TILE)
    own_slot = clamped_slots(row_slots, own, end - 1)
    own_keys = gather_keys(k, own_slot, head, stride_k, stride_k_head, D)
    own_values = gather_keys(v, own_slot, head, stride_v, stride_v_head, D)
    unseen = own[None, :] > tl.minimum(end - count + query, end - 1)[:, None]
    acc, largest, total = attend(
        queries, own_keys, own_values, unseen, acc, largest, total, scale_log2, True
    )

    # Loads by one address, so that the loop's ends and pointers are one for all threads: those of
    # of_mapped_list spill registers in it. That they wait for the map does not matter here.
    list_ = row * LISTS + tl.load(head_map + head)
    selected = tl.load(counts + list_)
    list_slots = slots + tl.load(offsets + list_)
    whole = selected // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        slot = tl.load(list_slots + first + tl.arange(0, BLOCK)).to(tl.int64)
        keys = gather_keys(k, slot, head, stride_k, stride_k_head, D)
        values = gather_keys(v, slot, head, stride_v, stride_v_head, D)
        acc, largest, total = attend(
            queries, keys, values, None, acc, largest, total, scale_log2, False
        )
    if whole < selected:
        index = whole + tl.arange(0, BLOCK)
        last_slot = clamped_slots(list_slots, index, selected - 1)
        last_keys = gather_keys(k, last_slot, head, stride_k, stride_k_head, D)
        last_values = gather_keys(v, last_slot, head, stride_v, stride_v_head, D)
        past = index[None, :] >= selected
        acc, largest, total = attend(
            queries, last_keys, last_values, past, acc, largest, total, scale_log2, True
        )

    # Read again: row offsets kept through the loop would spill registers.
    token = tl.load(starts + row) + query_row // GROUP
    live = query_row // GROUP < tl.load(tokens + row)
    at = token.to(tl.int64) * stride_out + q_head * stride_out_head
    if v_scale is not None:
        acc *= v_scale
    result = (acc / tl.maximum(total, LEAST_TOTAL)[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] + tl.arange(0, D)[None, :], result, mask=live[:, None])
