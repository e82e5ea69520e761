"""What several kernels share. Logarithms and exponentials are in base 2."""

import triton
import triton.language as tl

TILE = tl.constexpr(32)
PPM = tl.constexpr(1_000_000)
CODE_STEPS = tl.constexpr(1024)
"""Steps of a score code per octave: a rounding of 0.03 %, finer than half precision."""
CODE_BIAS = tl.constexpr(48)
"""Octaves below 1 that a score code can tell apart; smaller scores share code 0."""


@triton.jit
def own_tile_start(end):
    """First position of the tile that holds position ``end - 1``: the number of candidates."""
    return (end - 1) // TILE * TILE


@triton.jit
def selected_count(end, ratio_ppm, min_k):
    """Keys selected before the tile of position ``end - 1``: ``Budget.selected`` on the device."""
    own_start = own_tile_start(end)
    share = (own_start + TILE).to(tl.int64) * ratio_ppm // PPM
    wanted = tl.maximum(share, min_k) - TILE
    return tl.minimum(wanted, own_start).to(tl.int32)


@triton.jit
def encode_score(score):
    """Score in [0, 2^16) -> uint16 that orders like it: log2 in steps of 1/1024 octave."""
    steps = (tl.log2(score) + CODE_BIAS) * CODE_STEPS + 0.5
    return tl.minimum(tl.maximum(steps, 0.0), 65535.0).to(tl.uint16)


@triton.jit
def load_slots(table, position, visible):
    """KV slots of positions in one request's row of the table; slot 0 where not visible."""
    return tl.load(table + position, mask=visible, other=0).to(tl.int64)


@triton.jit
def store_counts(counts, index, byte, counted):
    """Count the values of a byte, at most 2^15 - 1 of them, into row ``index`` of [..., 256]."""
    found = tl.histogram(byte.to(tl.int32), 256, mask=counted)
    tl.store(counts + index * 256 + tl.arange(0, 256), found.to(tl.int16))
