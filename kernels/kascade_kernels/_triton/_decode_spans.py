"""How many keys of each row one program takes, from the lengths of the whole batch."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import own_tile_start, selected_count


@triton.jit
def _spans(keys, total, PROGRAMS: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr):
    """Steps of equal shares for about PROGRAMS programs, at most MOST for a row."""
    share = tl.maximum(tl.cdiv(total, PROGRAMS), tl.cdiv(keys, MOST))
    return tl.cdiv(share, STEP)


@triton.jit
def decode_spans_kernel(
    ends,  # [rows]
    score_spans,  # int32 [rows], in steps
    attend_spans,  # int32 [rows], in steps
    rows,
    ratio_ppm,
    min_k,
    ROWS: tl.constexpr,
    SCORE_PROGRAMS: tl.constexpr,
    SCORE_MOST: tl.constexpr,
    ATTEND_PROGRAMS: tl.constexpr,
    ATTEND_MOST: tl.constexpr,
    STEP: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    real = row < rows
    end = tl.load(ends + row, mask=real, other=0).to(tl.int32)
    listed = selected_count(end, ratio_ppm, min_k) + end - own_tile_start(end)
    listed = tl.where(real, listed, 0)
    # Zero where a row must not depend on its batch: its own share then decides.
    all_keys = 0 if BATCH_INVARIANT else tl.sum(end.to(tl.int64), 0)
    all_listed = 0 if BATCH_INVARIANT else tl.sum(listed.to(tl.int64), 0)
    # Rows that share a prefix must be cut alike; the longest program decides how long a step takes.
    keys = end if BATCH_INVARIANT else tl.where(real, tl.max(end, 0), 0)
    score = _spans(keys, all_keys, SCORE_PROGRAMS, SCORE_MOST, STEP)
    attend = _spans(listed, all_listed, ATTEND_PROGRAMS, ATTEND_MOST, STEP)
    tl.store(score_spans + row, score.to(tl.int32), mask=real)
    tl.store(attend_spans + row, attend.to(tl.int32), mask=real)
