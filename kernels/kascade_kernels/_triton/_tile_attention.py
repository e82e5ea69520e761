"""Body of ``tile_attention``. Logits are in base 2; query rows are numbered as in _tiles."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    LEAST_TOTAL,
    LOGIT_BOUND,
    TILE,
    VARY,
    bounded,
    load_sinks,
    of_mapped_list,
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


@triton.jit
def attend_bounded(
    queries,
    sinks,
    q_head,
    live,
    k,
    v,
    row_slots,
    list_slots,
    selected,
    end,
    newest,
    head,
    scale_log2,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    BLOCK: tl.constexpr,
):
    """Attention of query rows that met a logit of +inf or NaN, with all logits bounded.

    newest: [ROWS], the last position that each sees. Returns acc [ROWS, D] and total [ROWS].
    """
    acc = tl.zeros(queries.shape, tl.float32)
    largest, total = begin_softmax(sinks, q_head, live)
    for first in tl.range(0, selected + TILE, BLOCK, num_stages=1):
        index = first + tl.arange(0, BLOCK)
        own = own_tile_start(end) + index
        listed = (index >= TILE) & (index < selected + TILE)
        # Hidden keys are the last own one, too: values of others might be NaN.
        slot = clamped_slots(row_slots, own, end - 1)
        slot = tl.where(listed, tl.load(list_slots + index - TILE, mask=listed, other=0), slot)
        keys = gather_keys(k, slot, head, stride_k, stride_k_head, queries.shape[1])
        values = gather_keys(v, slot, head, stride_v, stride_v_head, queries.shape[1])
        seen = listed[None, :] | ((index < TILE)[None, :] & (own[None, :] <= newest[:, None]))
        products = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        logits = tl.where(seen, bounded(products * scale_log2), float("-inf"))
        weights, shrink, largest, total = soften(logits, tl.max(logits, 1), largest, total)
        weights = weights.to(values.dtype)
        acc = tl.dot(weights, values, acc * shrink[:, None], input_precision="ieee")
    return acc, total


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

    selected = of_mapped_list(counts, row, head_map, head, LISTS)
    list_slots = slots + of_mapped_list(offsets, row, head_map, head, LISTS)
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
    count = tl.load(tokens + row)
    token = tl.load(starts + row) + query_row // GROUP
    live = query_row // GROUP < count
    # Rows that met +inf or NaN are rare: looking for them in the loop would be a tenth of its
    # instructions. Pointers are read again for the same reason as above.
    if tl.max((total != total).to(tl.int32), axis=0) > 0:
        row_slots = table + tl.load(requests + row).to(tl.int64) * stride_table
        selected = of_mapped_list(counts, row, head_map, head, LISTS)
        list_slots = slots + of_mapped_list(offsets, row, head_map, head, LISTS)
        newest = tl.minimum(end - count + query_row // GROUP, end - 1)
        again = load_queries(q, k, token, q_head, live, stride_q, stride_q_head, D)
        acc, total = attend_bounded(
            again,
            sinks,
            q_head,
            live,
            k,
            v,
            row_slots,
            list_slots,
            selected,
            end,
            newest,
            head,
            scale_log2,
            stride_k,
            stride_k_head,
            stride_v,
            stride_v_head,
            BLOCK,
        )
    at = token.to(tl.int64) * stride_out + q_head * stride_out_head
    if v_scale is not None:
        acc *= v_scale
    result = (acc / tl.maximum(total, LEAST_TOTAL)[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] + tl.arange(0, D)[None, :], result, mask=live[:, None])
