"""Query tiles of prefill: their blocks of query rows, and the keys that these read.

A tile's query rows are numbered query-major: row ``r`` of KV head ``h`` is query
``r // GROUP`` of the tile and query head ``h * GROUP + r % GROUP``. A block is up to MAX_ROWS
consecutive query rows.
"""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import TILE, to_meet, widen

MAX_ROWS = tl.constexpr(128)


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
def load_queries(q, k, token, q_head, live, token_stride, head_stride, D: tl.constexpr):
    """Query rows [N, D] of tokens [N] and query heads [N], to meet ``k``; zero where not live."""
    at = token.to(tl.int64) * token_stride + q_head * head_stride
    dim = tl.arange(0, D)
    return to_meet(tl.load(q + at[:, None] + dim[None, :], mask=live[:, None], other=0.0), k)


@triton.jit
def clamped_slots(row_slots, position, last):
    """KV slots of positions in a request's row of the table; past the last, the last one's.

    So the keys that are gathered always exist and need no mask, which would be a tenth of the
    instructions of the score loop.
    """
    return tl.load(row_slots + tl.minimum(position, last)).to(tl.int64)


@triton.jit
def gather_keys(k, slot, head, slot_stride, head_stride, D: tl.constexpr):
    """Keys [N, D] of one head in slots [N], as products take them."""
    at = slot * slot_stride + head * head_stride
    return widen(tl.load(k + at[:, None] + tl.arange(0, D)[None, :]))
