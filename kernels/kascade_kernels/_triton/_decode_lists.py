"""How many keys each list holds, and how many of each row one program takes."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import TILE, VARY, own_tile_start, power_of_2

PPM = tl.constexpr(1_000_000)
POOL_FACTOR = tl.constexpr(2)


@triton.jit
def selected_count(end, ratio_ppm, min_k):
    """Keys selected before the tile of position ``end - 1``: ``Budget.selected`` on the device."""
    own_start = own_tile_start(end)
    share = (own_start + TILE).to(tl.int64) * ratio_ppm // PPM
    wanted = tl.maximum(share, min_k) - TILE
    return tl.minimum(wanted, own_start).to(tl.int32)


@triton.jit
def pooled_count(end, selected, share_ppm):
    """Keys of a candidate pool before that tile: ``PoolRule.pooled`` on the device."""
    own_start = own_tile_start(end)
    share = tl.cdiv(own_start.to(tl.int64) * share_ppm, PPM)
    wanted = tl.maximum(share, POOL_FACTOR * selected)
    return tl.minimum(tl.cdiv(wanted, TILE) * TILE, own_start).to(tl.int32)


@triton.jit
def _spans(keys, total, PROGRAMS: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr):
    """Steps of equal shares for about PROGRAMS programs, at most MOST for a row."""
    share = tl.maximum(tl.cdiv(total, PROGRAMS), tl.cdiv(keys, MOST))
    return tl.cdiv(share, STEP)


@triton.jit(do_not_specialize=VARY)
def decode_lists_kernel(
    ends,  # [rows]
    score_spans,  # int32 [rows], in steps
    attend_spans,  # int32 [rows], in steps
    counts,  # int32 [rows, LISTS]
    ratios_ppm,  # int32 [rows]
    min_ks,  # int32 [rows]
    pool_counts,  # int32 [rows, LISTS], or None where there are no pools
    pool_ends,  # int32 [rows]
    pool_spans,  # int32 [rows], in steps
    rows,
    ROWS: tl.constexpr,
    LISTS: tl.constexpr,
    SCORE_PROGRAMS: tl.constexpr,
    SCORE_MOST: tl.constexpr,
    ATTEND_PROGRAMS: tl.constexpr,
    ATTEND_MOST: tl.constexpr,
    STEP: tl.constexpr,
    SHARE_PPM: tl.constexpr,  # of keys in a pool
    BATCH_INVARIANT: tl.constexpr,
):
    # Grid: (1,). Spans are in steps of STEP keys.
    row = tl.arange(0, ROWS)
    real = row < rows
    end = tl.load(ends + row, mask=real, other=0).to(tl.int32)
    ratio_ppm = tl.load(ratios_ppm + row, mask=real, other=0)
    min_k = tl.load(min_ks + row, mask=real, other=0)
    selected, own = selected_count(end, ratio_ppm, min_k), end - own_tile_start(end)
    listed = selected + own
    listed = tl.where(real, listed, 0)
    list_ = tl.arange(0, power_of_2(LISTS))
    inside = real[:, None] & (list_ < LISTS)[None, :]
    alike = tl.broadcast_to(listed[:, None], inside.shape).to(tl.int32)
    tl.store(counts + row[:, None] * LISTS + list_[None, :], alike, mask=inside)
    # Zero where a row must not depend on its batch: its own share then decides.
    all_keys = 0 if BATCH_INVARIANT else tl.sum(end.to(tl.int64), 0)
    all_listed = 0 if BATCH_INVARIANT else tl.sum(listed.to(tl.int64), 0)
    # Rows that share a prefix must be cut alike; the longest program decides how long a step takes.
    keys = end if BATCH_INVARIANT else tl.where(real, tl.max(end, 0), 0)
    score = _spans(keys, all_keys, SCORE_PROGRAMS, SCORE_MOST, STEP)
    attend = _spans(listed, all_listed, ATTEND_PROGRAMS, ATTEND_MOST, STEP)
    tl.store(score_spans + row, score.to(tl.int32), mask=real)
    tl.store(attend_spans + row, attend.to(tl.int32), mask=real)
    if pool_counts is not None:
        pooled = tl.where(real, pooled_count(end, selected, SHARE_PPM) + own, 0)
        tl.store(pool_ends + row, pooled, mask=real)
        alike = tl.broadcast_to(pooled[:, None], inside.shape)
        tl.store(pool_counts + row[:, None] * LISTS + list_[None, :], alike, mask=inside)
        all_pooled = 0 if BATCH_INVARIANT else tl.sum(pooled.to(tl.int64), 0)
        score = _spans(pooled, all_pooled, SCORE_PROGRAMS, SCORE_MOST, STEP)
        tl.store(pool_spans + row, score.to(tl.int32), mask=real)
