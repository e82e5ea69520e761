"""Body of ``tile_attention``. Logits are in base 2; query rows are numbered as in _tiles."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import TILE, VARY, of_mapped_list, own_tile_start
from kascade_kernels._triton._tiles import (
    block_count,
    block_rows,
    clamped_slots,
    gather_keys,
    load_queries,
)


@triton.jit
def attend(q, k, v, hidden, acc, largest, total, scale, MASKED: tl.constexpr):
    """Take keys and values [N, DIM] into the running softmax; hidden keys get no weight.

    acc: [ROWS, DIM]; largest, total: [ROWS], the largest logit and the sum of weights so far.
    """
    products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, N]
    if MASKED:
        products = tl.where(hidden, float("-inf"), products)
    previous = largest
    largest = tl.maximum(largest, tl.max(products, axis=1) * scale)
    shrink = tl.exp2(previous - largest)
    weights = tl.exp2(products * scale - largest[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, largest, total


@triton.jit(do_not_specialize=VARY)
def tile_attention_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    request_ptr,
    end_ptr,
    start_ptr,
    count_ptr,
    slot_ptr,
    offset_ptr,
    selected_ptr,
    head_map_ptr,
    out_ptr,
    # Numbers
    scale,
    q_token_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    out_token_stride,
    out_head_stride,
    # Meta-parameters
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Attention of one block of query rows to its own tile, then to its list, in order.

    Whole steps of the list need no mask, which would be an eighth of the loop's instructions.
    Grid: (heads * blocks, rows). Later rows, which are the longer ones, start first.
    """
    ROWS: tl.constexpr = block_rows(GROUP, 0)
    BLOCKS: tl.constexpr = block_count(GROUP)
    row = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0) // BLOCKS
    query_row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    count = tl.load(count_ptr + row)
    if tl.program_id(0) % BLOCKS * ROWS >= count * GROUP:
        return

    query = query_row // GROUP
    q_head = head * GROUP + query_row % GROUP
    token = tl.load(start_ptr + row) + query
    q = load_queries(q_ptr, token, q_head, query < count, q_token_stride, q_head_stride, DIM)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)

    end = tl.load(end_ptr + row).to(tl.int32)
    table = table_ptr + tl.load(request_ptr + row).to(tl.int64) * table_stride
    own = own_tile_start(end) + tl.arange(0, TILE)
    own_slots = clamped_slots(table, own, end - 1)
    own_k = gather_keys(k_ptr, own_slots, head, k_slot_stride, k_head_stride, DIM)
    own_v = gather_keys(v_ptr, own_slots, head, v_slot_stride, v_head_stride, DIM)
    unseen = own[None, :] > tl.minimum(end - count + query, end - 1)[:, None]
    acc, largest, total = attend(q, own_k, own_v, unseen, acc, largest, total, scale, True)

    selected = of_mapped_list(selected_ptr, row, head_map_ptr, head, LISTS)
    slots_ptr = slot_ptr + of_mapped_list(offset_ptr, row, head_map_ptr, head, LISTS)
    whole = selected // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        slots = tl.load(slots_ptr + first + tl.arange(0, BLOCK_K)).to(tl.int64)
        k = gather_keys(k_ptr, slots, head, k_slot_stride, k_head_stride, DIM)
        v = gather_keys(v_ptr, slots, head, v_slot_stride, v_head_stride, DIM)
        acc, largest, total = attend(q, k, v, None, acc, largest, total, scale, False)
    if whole < selected:
        index = whole + tl.arange(0, BLOCK_K)
        last_slots = clamped_slots(slots_ptr, index, selected - 1)
        last_k = gather_keys(k_ptr, last_slots, head, k_slot_stride, k_head_stride, DIM)
        last_v = gather_keys(v_ptr, last_slots, head, v_slot_stride, v_head_stride, DIM)
        past = index[None, :] >= selected
        acc, largest, total = attend(q, last_k, last_v, past, acc, largest, total, scale, True)

    # Read again: row offsets kept through the loop would spill registers.
    token = tl.load(start_ptr + row) + query_row // GROUP
    live = query_row // GROUP < tl.load(count_ptr + row)
    at = token.to(tl.int64) * out_token_stride + q_head * out_head_stride
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + tl.arange(0, DIM)[None, :], out, mask=live[:, None])
