"""Body of ``tile_scores``: how much a tile's queries look at every key. Logits are in base 2."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    TILE,
    VARY,
    encode_score,
    list_of,
    own_tile_start,
)
from kascade_kernels._triton._tiles import (
    MAX_ROWS,
    block_count,
    block_rows,
    clamped_slots,
    gather_keys,
    load_queries,
)

INT8_MAX = tl.constexpr(127.0)


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
