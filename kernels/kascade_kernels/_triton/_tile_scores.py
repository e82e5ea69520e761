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
def quantise(queries, TILES: tl.constexpr):
    """Query rows [TILES * R, D] in 8 bits, and each tile's scale: largest magnitude / 127.

    One scale for all rows of a tile: a row's logits then err no more than those of the row with
    the largest query, and the loop over keys needs neither a register nor a product for each row.
    """
    queries = queries.to(tl.float32)
    by_tile = tl.reshape(queries, (TILES, queries.shape[0] // TILES, queries.shape[1]))
    q_scale = tl.max(tl.max(tl.abs(by_tile), axis=2), axis=1) / INT8_MAX  # [TILES]
    steps = by_tile / tl.where(q_scale > 0, q_scale, 1.0)[:, None, None]
    return tl.reshape(tl.floor(steps + 0.5), queries.shape).to(tl.int8), q_scale


@triton.jit
def attention_mass(
    keys, k_scale, queries, q_scale, lse, TILES: tl.constexpr, EIGHT_BIT: tl.constexpr
):
    """Attention mass [BLOCK, TILES] of keys [BLOCK, D], summed over each tile's rows.

    The keys are the rows of the product, so that most of the sum stays within a thread.
    """
    shape: tl.constexpr = (keys.shape[0], TILES, queries.shape[0] // TILES)
    if EIGHT_BIT:
        product = tl.dot(keys, tl.trans(queries), out_dtype=tl.int32).to(tl.float32)
        factor = (k_scale[:, None] * q_scale[None, :])[:, :, None]
    else:
        product = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        factor = k_scale
    logits = tl.reshape(product, shape) * factor
    return tl.sum(tl.exp2(logits - tl.reshape(lse, shape[1:])[None, :, :]), axis=2)


@triton.jit
def scored_candidates(requests, ends, counts, row, rows, request, list_, LISTS: tl.constexpr):
    """Candidates of each row whose list is sparse and that is the request's; 0 for the others."""
    exists = row < rows
    end = tl.load(ends + row, mask=exists, other=1).to(tl.int32)
    ours = exists & (tl.load(requests + row, mask=exists, other=-1) == request)
    candidates = own_tile_start(end)
    selected = tl.load(counts + row * LISTS + list_, mask=exists, other=0)
    return tl.where(ours & (selected < candidates), candidates, 0)


@triton.jit(do_not_specialize=VARY)
def tile_scores_kernel(
    q,  # [tokens, Hq, D]
    k,  # [slots, H, D]
    k_scales,  # float32 [slots, H], read with EIGHT_BIT
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    ends,  # [rows]
    starts,  # int32 [rows]
    tokens,  # int32 [rows]
    counts,  # int32 [rows, LISTS]
    lse,  # float32 [rows, HEADS, TILE * GROUP]
    sums,  # float32 [rows, keys], the mass of the heads so far where POOLED
    codes,  # uint16 [rows, LISTS, keys]
    scale_log2,
    rows,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_scales,
    stride_scales_head,
    stride_table,
    stride_sums,
    stride_codes,
    stride_codes_list,
    HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    POOLED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Score codes of one span of keys for a bundle of TILES rows, which share each load of keys.

    Requests that meet in a bundle take turns. Sums are read and written by the program that owns
    the span alone.
    """
    # Grid: (bundles, HEADS or 1, spans): programs that run together read the same keys.
    BLOCKS: tl.constexpr = block_count(GROUP)
    bundle = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILES
    row = bundle + tl.arange(0, TILES)
    span_start = tl.program_id(2) * SPAN
    first_head = 0 if POOLED else tl.program_id(1)
    last_head = HEADS - 1 if POOLED else first_head
    list_ = list_of(first_head, LISTS)
    for leader in range(bundle, tl.minimum(bundle + TILES, rows)):
        request = tl.load(requests + leader)
        before = tl.load(requests + leader - 1, mask=leader > bundle, other=-1)
        limit = scored_candidates(requests, ends, counts, row, rows, request, list_, LISTS)
        span_end = tl.minimum(span_start + SPAN, tl.max(limit, axis=0))
        taken = (request != before) & (span_start < span_end)
        row_slots = table + request.to(tl.int64) * stride_table
        for head in range(first_head, tl.where(taken, last_head + 1, first_head)):
            blocks, q_scales, lses = (), (), ()
            for block in tl.static_range(BLOCKS):
                column = tl.arange(0, TILES * block_rows(GROUP, block))
                of_row = bundle + column // block_rows(GROUP, block)
                query_row = MAX_ROWS * block + column % block_rows(GROUP, block)
                scored = scored_candidates(
                    requests, ends, counts, of_row, rows, request, list_, LISTS
                )
                count = tl.load(tokens + of_row, mask=scored > 0, other=0)
                start = tl.load(starts + of_row, mask=scored > 0, other=0)
                live = query_row // GROUP < count
                token = start + query_row // GROUP
                q_head = head * GROUP + query_row % GROUP
                queries = load_queries(q, k, token, q_head, live, stride_q, stride_q_head, D)
                lse_at = (of_row.to(tl.int64) * HEADS + head) * (TILE * GROUP) + query_row
                lse_rows = tl.load(lse + lse_at, mask=live, other=float("inf"))
                q_scale = 1.0
                if EIGHT_BIT:
                    queries, q_scale = quantise(queries, TILES)
                blocks, q_scales, lses = (
                    blocks + (queries,),
                    q_scales + (q_scale,),
                    lses + (lse_rows,),
                )

            for first in range(span_start, span_end, BLOCK):
                position = first + tl.arange(0, BLOCK)
                slot = clamped_slots(row_slots, position, span_end - 1)
                keys = gather_keys(k, slot, head, stride_k, stride_k_head, D)
                k_scale = scale_log2
                if EIGHT_BIT:
                    scale_at = slot * stride_scales + head * stride_scales_head
                    k_scale = tl.load(k_scales + scale_at) * scale_log2  # [BLOCK]
                mass = tl.zeros([BLOCK, TILES], tl.float32)
                for block in tl.static_range(BLOCKS):
                    mass += attention_mass(
                        keys, k_scale, blocks[block], q_scales[block], lses[block], TILES, EIGHT_BIT
                    )
                wanted = position[:, None] < limit[None, :]  # [BLOCK, TILES]
                of_code = codes + row.to(tl.int64)[None, :] * stride_codes
                if POOLED:
                    of_sum = sums + row.to(tl.int64)[None, :] * stride_sums
                    sum_at = of_sum + position[:, None]
                    mass += tl.load(sum_at, mask=wanted & (head > 0), other=0.0)
                    tl.store(sum_at, mass, mask=wanted & (head < last_head))
                    wanted &= head == last_head
                else:
                    of_code += head * stride_codes_list
                tl.store(of_code + position[:, None], encode_score(mass), mask=wanted)
            if POOLED:
                # Other threads may add the next head's mass than those that stored the sums.
                tl.debug_barrier()
