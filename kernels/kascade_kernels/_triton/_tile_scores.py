"""Bodies of ``tile_lse`` and ``tile_scores``: how much a tile's queries look at every key.

A tile's query rows are numbered query-major: row ``r`` of KV head ``h`` is query
``r // GROUP`` of the tile and query head ``h * GROUP + r % GROUP``. A block is up to MAX_ROWS
consecutive query rows. Logits and log-sum-exps are in base 2.
"""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    TILE,
    VARY,
    encode_score,
    list_of,
    own_tile_start,
    power_of_2,
)

MAX_ROWS = tl.constexpr(128)
EDGE = tl.constexpr(128)
"""Candidates at either end that a sampled log-sum-exp reads one by one."""
INT8_MAX = tl.constexpr(127.0)


@triton.constexpr_function
def block_rows(group: int, block: int) -> int:
    """Query rows of one tile in a block, padded to a power of two."""
    left = TILE.value * group - MAX_ROWS.value * block
    return min(MAX_ROWS.value, 1 << (left - 1).bit_length())


@triton.constexpr_function
def block_count(group: int) -> int:
    """Blocks that hold the query rows of one tile and KV head."""
    return -(-TILE.value * group // MAX_ROWS.value)


@triton.jit
def load_queries(q_ptr, token, q_head, live, token_stride, head_stride, DIM: tl.constexpr):
    """Query rows [N, DIM] of tokens [N] and query heads [N]; zero where not live."""
    at = token.to(tl.int64) * token_stride + q_head * head_stride
    dim = tl.arange(0, DIM)
    return tl.load(q_ptr + at[:, None] + dim[None, :], mask=live[:, None], other=0.0)


@triton.jit
def clamped_slots(table, position, last):
    """KV slots of positions in a request's row of the table; past the last, the last one's.

    So the keys that are gathered always exist and need no mask, which would be a tenth of the
    instructions of the score loop.
    """
    return tl.load(table + tl.minimum(position, last)).to(tl.int64)


@triton.jit
def gather_keys(k_ptr, slots, head, slot_stride, head_stride, DIM: tl.constexpr):
    """Keys [N, DIM] of one head in slots [N]."""
    at = slots * slot_stride + head * head_stride
    return tl.load(k_ptr + at[:, None] + tl.arange(0, DIM)[None, :])


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
def add_exponentials(q, k, hidden, weight, largest, total, scale, MASKED: tl.constexpr):
    """Take keys [N, DIM] into a running log-sum-exp [ROWS]; each stands for 2^weight keys."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, N]
    if MASKED:
        products = tl.where(hidden, float("-inf"), products)
    previous = largest
    largest = tl.maximum(largest, tl.max(products, axis=1) * scale + weight)
    total = total * tl.exp2(previous - largest)
    total += tl.sum(tl.exp2(products * scale - (largest - weight)[:, None]), axis=1)
    return largest, total


@triton.jit(do_not_specialize=VARY)
def tile_lse_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    table_ptr,
    request_ptr,
    end_ptr,
    start_ptr,
    count_ptr,
    selected_ptr,
    part_ptr,
    # Numbers
    scale,
    spans,
    q_token_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    table_stride,
    # Meta-parameters
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Log-sum-exp of one block of query rows over one span of the keys that are read.

    part: float32 [rows, HEADS, spans, TILE * GROUP]. Span 0 takes in the own tile. A step of
    BLOCK_K keys must divide EDGE and SPAN, so that all its keys have one weight.
    Grid: (rows, HEADS * blocks, spans). Later rows, which are the longer ones, start first.
    """
    ROWS: tl.constexpr = block_rows(GROUP, 0)
    BLOCKS: tl.constexpr = block_count(GROUP)
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) // BLOCKS
    query_row = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    span = tl.program_id(2)

    end = tl.load(end_ptr + row).to(tl.int32)
    candidates = own_tile_start(end)
    middle, picked = sampled_middle(candidates, STRIDE)
    indices = candidates - middle + picked
    count = tl.load(count_ptr + row)
    dense = tl.load(selected_ptr + row * LISTS + list_of(head, LISTS)) == candidates
    without_query = tl.program_id(1) % BLOCKS * ROWS >= count * GROUP
    if dense | without_query | (span * SPAN >= indices):
        return

    table = table_ptr + tl.load(request_ptr + row).to(tl.int64) * table_stride
    query = query_row // GROUP
    live = query < count
    token = tl.load(start_ptr + row) + query
    q_head = head * GROUP + query_row % GROUP
    q = load_queries(q_ptr, token, q_head, live, q_token_stride, q_head_stride, DIM)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if span == 0:
        own = candidates + tl.arange(0, TILE)
        own_slots = clamped_slots(table, own, end - 1)
        own_k = gather_keys(k_ptr, own_slots, head, k_slot_stride, k_head_stride, DIM)
        unseen = own[None, :] > tl.minimum(end - count + query, end - 1)[:, None]
        largest, total = add_exponentials(q, own_k, unseen, 0.0, largest, total, scale, True)
    stands_for = tl.maximum(middle, 1).to(tl.float32) / tl.maximum(picked, 1).to(tl.float32)
    middle_weight = tl.log2(stands_for)
    stop = tl.minimum(span * SPAN + SPAN, indices)
    whole = span * SPAN + (stop - span * SPAN) // BLOCK_K * BLOCK_K
    for first in range(span * SPAN, whole, BLOCK_K):
        position = sampled_position(first + tl.arange(0, BLOCK_K), middle, STRIDE)
        slots = tl.load(table + position).to(tl.int64)
        k = gather_keys(k_ptr, slots, head, k_slot_stride, k_head_stride, DIM)
        weight = tl.where(first < 2 * EDGE, 0.0, middle_weight)
        largest, total = add_exponentials(q, k, None, weight, largest, total, scale, False)
    if whole < stop:
        index = whole + tl.arange(0, BLOCK_K)
        tail = sampled_position(tl.minimum(index, stop - 1), middle, STRIDE)
        tail_slots = tl.load(table + tail).to(tl.int64)
        tail_k = gather_keys(k_ptr, tail_slots, head, k_slot_stride, k_head_stride, DIM)
        weight = tl.where(whole < 2 * EDGE, 0.0, middle_weight)
        past = index[None, :] >= stop
        largest, total = add_exponentials(q, tail_k, past, weight, largest, total, scale, True)

    at = ((row.to(tl.int64) * HEADS + head) * spans + span) * (TILE * GROUP) + query_row
    tl.store(part_ptr + at, largest + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=VARY)
def merge_lse_kernel(
    part_ptr,
    end_ptr,
    count_ptr,
    selected_ptr,
    lse_ptr,
    spans,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Merge the spans of one row and KV head in order; +inf where there is no query.

    lse: float32 [rows, HEADS, TILE * GROUP]. Grid: (rows, HEADS).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    end = tl.load(end_ptr + row).to(tl.int32)
    candidates = own_tile_start(end)
    if tl.load(selected_ptr + row * LISTS + list_of(head, LISTS)) == candidates:
        return
    middle, picked = sampled_middle(candidates, STRIDE)
    used = tl.cdiv(candidates - middle + picked, SPAN)
    query_row = tl.arange(0, power_of_2(TILE * GROUP))
    live = query_row // GROUP < tl.load(count_ptr + row)
    of_head = row.to(tl.int64) * HEADS + head
    parts = part_ptr + of_head * spans * (TILE * GROUP) + query_row

    largest = tl.full(query_row.shape, float("-inf"), tl.float32)
    for span in range(used):
        part = tl.load(parts + span * (TILE * GROUP), mask=live, other=0.0)
        largest = tl.maximum(largest, part)
    total = tl.zeros(query_row.shape, tl.float32)
    for span in range(used):
        part = tl.load(parts + span * (TILE * GROUP), mask=live, other=0.0)
        total += tl.exp2(part - largest)
    lse = tl.where(live, largest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + of_head * (TILE * GROUP) + query_row, lse, mask=query_row < TILE * GROUP)


@triton.jit
def quantise(q, TILES: tl.constexpr):
    """Query rows [TILES * R, DIM] in 8 bits, and each tile's scale: largest magnitude / 127.

    One scale for all rows of a tile: a row's logits then err no more than those of the row with
    the largest query, and the loop over keys needs neither a register nor a product for each row.
    """
    q = q.to(tl.float32)
    by_tile = tl.reshape(q, (TILES, q.shape[0] // TILES, q.shape[1]))
    q_scale = tl.max(tl.max(tl.abs(by_tile), axis=2), axis=1) / INT8_MAX  # [TILES]
    steps = by_tile / tl.where(q_scale > 0, q_scale, 1.0)[:, None, None]
    return tl.reshape(tl.floor(steps + 0.5), q.shape).to(tl.int8), q_scale


@triton.jit
def attention_mass(k, k_scale, q, q_scale, lse, TILES: tl.constexpr, EIGHT_BIT: tl.constexpr):
    """Attention mass [BLOCK_K, TILES] of keys [BLOCK_K, DIM], summed over each tile's rows.

    The keys are the rows of the product, so that most of the sum stays within a thread.
    """
    shape: tl.constexpr = (k.shape[0], TILES, q.shape[0] // TILES)
    if EIGHT_BIT:
        product = tl.dot(k, tl.trans(q), out_dtype=tl.int32).to(tl.float32)
        factor = (k_scale[:, None] * q_scale[None, :])[:, :, None]
    else:
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        factor = k_scale
    logits = tl.reshape(product, shape) * factor
    return tl.sum(tl.exp2(logits - tl.reshape(lse, shape[1:])[None, :, :]), axis=2)


@triton.jit
def scored_candidates(
    request_ptr, end_ptr, selected_ptr, row, rows, request, list_, LISTS: tl.constexpr
):
    """Candidates of each row whose list is sparse and that is the request's; 0 for the others."""
    exists = row < rows
    end = tl.load(end_ptr + row, mask=exists, other=1).to(tl.int32)
    ours = exists & (tl.load(request_ptr + row, mask=exists, other=-1) == request)
    candidates = own_tile_start(end)
    selected = tl.load(selected_ptr + row * LISTS + list_, mask=exists, other=0)
    return tl.where(ours & (selected < candidates), candidates, 0)


@triton.jit(do_not_specialize=VARY)
def tile_scores_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    k_scale_ptr,
    table_ptr,
    request_ptr,
    end_ptr,
    start_ptr,
    count_ptr,
    selected_ptr,
    lse_ptr,
    sum_ptr,
    code_ptr,
    # Numbers
    scale,
    rows,
    q_token_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    k_scale_slot_stride,
    k_scale_head_stride,
    table_stride,
    sum_row_stride,
    code_row_stride,
    code_head_stride,
    # Meta-parameters
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    POOLED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Score codes of one span of keys for a bundle of TILES rows, which share each load of keys.

    Requests that meet in a bundle take turns. sum: float32 [rows, keys], the mass of the heads so
    far where POOLED; the program that owns the span alone reads and writes it.
    Grid: (bundles, HEADS or 1, spans), so that programs that run together read the same keys.
    """
    BLOCKS: tl.constexpr = block_count(GROUP)
    bundle = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILES
    row = bundle + tl.arange(0, TILES)
    span_start = tl.program_id(2) * SPAN
    first_head = 0 if POOLED else tl.program_id(1)
    last_head = HEADS - 1 if POOLED else first_head
    list_ = list_of(first_head, LISTS)
    for leader in range(bundle, tl.minimum(bundle + TILES, rows)):
        request = tl.load(request_ptr + leader)
        before = tl.load(request_ptr + leader - 1, mask=leader > bundle, other=-1)
        limit = scored_candidates(
            request_ptr, end_ptr, selected_ptr, row, rows, request, list_, LISTS
        )
        span_end = tl.minimum(span_start + SPAN, tl.max(limit, axis=0))
        taken = (request != before) & (span_start < span_end)
        table = table_ptr + request.to(tl.int64) * table_stride
        for head in range(first_head, tl.where(taken, last_head + 1, first_head)):
            queries, q_scales, lses = (), (), ()
            for block in tl.static_range(BLOCKS):
                column = tl.arange(0, TILES * block_rows(GROUP, block))
                of_row = bundle + column // block_rows(GROUP, block)
                query_row = MAX_ROWS * block + column % block_rows(GROUP, block)
                scored = scored_candidates(
                    request_ptr, end_ptr, selected_ptr, of_row, rows, request, list_, LISTS
                )
                count = tl.load(count_ptr + of_row, mask=scored > 0, other=0)
                start = tl.load(start_ptr + of_row, mask=scored > 0, other=0)
                live = query_row // GROUP < count
                token = start + query_row // GROUP
                q_head = head * GROUP + query_row % GROUP
                q = load_queries(q_ptr, token, q_head, live, q_token_stride, q_head_stride, DIM)
                lse_at = (of_row.to(tl.int64) * HEADS + head) * (TILE * GROUP) + query_row
                lse = tl.load(lse_ptr + lse_at, mask=live, other=float("inf"))
                q_scale = 1.0
                if EIGHT_BIT:
                    q, q_scale = quantise(q, TILES)
                queries, q_scales, lses = queries + (q,), q_scales + (q_scale,), lses + (lse,)

            for first in range(span_start, span_end, BLOCK_K):
                position = first + tl.arange(0, BLOCK_K)
                slots = clamped_slots(table, position, span_end - 1)
                k = gather_keys(k_ptr, slots, head, k_slot_stride, k_head_stride, DIM)
                k_scale = scale
                if EIGHT_BIT:
                    scale_at = slots * k_scale_slot_stride + head * k_scale_head_stride
                    k_scale = tl.load(k_scale_ptr + scale_at) * scale  # [BLOCK_K]
                mass = tl.zeros([BLOCK_K, TILES], tl.float32)
                for block in tl.static_range(BLOCKS):
                    mass += attention_mass(
                        k, k_scale, queries[block], q_scales[block], lses[block], TILES, EIGHT_BIT
                    )
                wanted = position[:, None] < limit[None, :]  # [BLOCK_K, TILES]
                of_code = code_ptr + row.to(tl.int64)[None, :] * code_row_stride
                if POOLED:
                    of_sum = sum_ptr + row.to(tl.int64)[None, :] * sum_row_stride
                    sums = of_sum + position[:, None]
                    mass += tl.load(sums, mask=wanted & (head > 0), other=0.0)
                    tl.store(sums, mass, mask=wanted & (head < last_head))
                    wanted &= head == last_head
                else:
                    of_code += head * code_head_stride
                tl.store(of_code + position[:, None], encode_score(mass), mask=wanted)
            if POOLED:
                # Other threads may add the next head's mass than those that stored the sums.
                tl.debug_barrier()
