"""What several kernels share. Logarithms and exponentials are in base 2."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
TILE = tl.constexpr(32)
CODE_SHIFT = tl.constexpr(13)
CODE_HALF = tl.constexpr(1 << 12)
CODE_OFFSET = tl.constexpr(79 << 10)
"""Codes are the upper bits of float32: 10 bits of mantissa, exponents from 2^-48 to 2^16."""

LOGIT_BOUND = tl.constexpr(1e30)
"""A logit beyond it is as good as infinite. Softmaxes start at its negative as the largest so far:
keys of -inf then have no weight, also where there are no others. One of +inf or NaN makes the
weights of its row NaN, and of no other row."""
LEAST_TOTAL = tl.constexpr(1e-30)
"""Less than the sum of weights of any key: what divides where no key has weight, for zeros."""

VARY = """requests ends starts tokens offsets counts head_map rows room pool_offsets pool_map
    pool_ends pool_counts pool_spans""".split()
"""Arguments that differ from step to step in alignment or size: a server must not compile again
for a prompt of another length."""


@triton.constexpr_function
def power_of_2(size: int) -> int:
    """Smallest power of two that is at least ``size``.

    Not ``triton.next_power_of_2``: SGLang replaces that one by a function kernels cannot call.
    """
    return 1 << (size - 1).bit_length()


@triton.jit
def own_tile_start(end):
    """First position of the tile that holds position ``end - 1``: the number of candidates."""
    return (end - 1) // TILE * TILE


@triton.jit
def list_of(head, LISTS: tl.constexpr):
    """Which of a row's lists is a KV head's own: that of its number, or the only one."""
    return 0 if LISTS == 1 else head


@triton.jit
def of_mapped_list(values, row, head_map, head, LISTS: tl.constexpr):
    """The value [rows, LISTS] of the list that a KV head reads.

    A row's values are loaded together with the map, not after it: programs of a decode step are
    short, and one load that waits for another was 5 % of their time.
    """
    if LISTS == 1:
        return tl.load(values + row)
    list_ = tl.arange(0, power_of_2(LISTS))
    of_row = tl.load(values + row * LISTS + list_, mask=list_ < LISTS, other=0)
    return tl.sum(tl.where(list_ == tl.load(head_map + head), of_row, 0), 0)


@triton.jit
def widen(keys):
    """Keys or values as products take them: fp8 in half precision, which holds it exactly.

    Not in bfloat16: Hopper converts two values to half precision in one instruction, and to
    bfloat16 in three.
    """
    return keys.to(tl.float16) if keys.dtype.is_fp8() else keys


@triton.jit
def load_visible(states, address, visible):
    """Keys or values at an address each, as they are multiplied; zeros where not visible."""
    return widen(tl.load(states + address, mask=visible[:, None], other=0.0))


@triton.jit
def load_values(v, slot, stride, at, visible, D: tl.constexpr):
    """Values [N, D] of a head whose first is at ``at`` in a slot, as they are multiplied.

    fp8 comes in pairs: a product reads its second operand along the other axis, for which shared
    memory turns two bytes around at once, and single bytes one after another.
    """
    if v.dtype.element_ty.is_fp8():
        pairs = v.to(tl.pointer_type(tl.int16), bitcast=True)
        address = slot[:, None] * (stride // 2) + at // 2 + tl.arange(0, D // 2)[None, :]
        pair = tl.load(pairs + address, mask=visible[:, None], other=0)
        even = pair.to(tl.int8).to(v.dtype.element_ty, bitcast=True)
        odd = (pair >> 8).to(tl.int8).to(v.dtype.element_ty, bitcast=True)
        return tl.interleave(widen(even), widen(odd))
    else:
        address = slot[:, None] * stride + at + tl.arange(0, D)[None, :]
        return load_visible(v, address, visible)


@triton.jit
def to_meet(queries, k):
    """Queries as they are multiplied with the keys that ``k`` points at, once widened."""
    return queries.to(tl.float16) if k.dtype.element_ty.is_fp8() else queries


@triton.jit
def load_sinks(sinks, q_head, real):
    """Sinks of query heads as logits: in base 2, with differences that are finite."""
    sink = tl.load(sinks + q_head, mask=real, other=0.0).to(tl.float32) * LOG2_E
    return tl.minimum(tl.maximum(sink, -2 * LOGIT_BOUND), LOGIT_BOUND)


@triton.jit
def bounded_lse(largest, total):
    """Log-sum-exp of a softmax: LOGIT_BOUND where it met +inf, its negative where NaN or no key."""
    lse = tl.maximum(largest + tl.log2(total), -LOGIT_BOUND)
    return tl.where(largest >= LOGIT_BOUND, LOGIT_BOUND, lse)


@triton.jit
def soften(logits, block_largest, largest, total):
    """Take logits [M, N], at most block_largest [M] in a row, into a running softmax.

    largest, total: [M], the largest logit and the sum of weights so far. Returns the logits'
    weights, the factor that earlier weights shrink by, and the new largest and total.
    """
    previous = largest
    largest = tl.maximum(previous, block_largest)
    shrink = tl.exp2(previous - largest)
    weights = tl.exp2(logits - largest[:, None])
    return weights, shrink, largest, total * shrink + tl.sum(weights, 1)


@triton.jit
def store_part(part_lse, part_out, part, acc, largest, total, real, D: tl.constexpr):
    """Store a softmax's mean [M, D] and log-sum-exp [M] as parts that merge_parts can join."""
    tl.store(part_lse + part, bounded_lse(largest, total), mask=real)
    at = part[:, None] * D + tl.arange(0, D)[None, :]
    mean = acc / tl.maximum(total, LEAST_TOTAL)[:, None]
    tl.store(part_out + at, mean, mask=real[:, None])


@triton.jit
def encode_score(score):
    """Score in [0, 2^16) -> uint16 that orders like it, rounded by at most 0.05 %."""
    bits = score.to(tl.int32, bitcast=True) + CODE_HALF
    code = (bits >> CODE_SHIFT) - CODE_OFFSET
    return tl.minimum(tl.maximum(code, 0), 65535).to(tl.uint16)


@triton.jit
def load_slots(table, position, visible):
    """KV slots of positions in one request's row of the table; slot 0 where not visible."""
    return tl.load(table + position, mask=visible, other=0).to(tl.int64)


@triton.jit
def slots_of(table, requests, stride_table, pool_offsets, pool_map, row, head, LISTS: tl.constexpr):
    """Where the slots begin that a head scores: the request's in the table, or a pool's."""
    # One way out: what stands behind a return is compiled, too.
    if pool_offsets is None:
        first = tl.load(requests + row).to(tl.int64) * stride_table
    else:
        first = of_mapped_list(pool_offsets, row, pool_map, head, LISTS)
    return table + first


@triton.jit
def store_counts(counts, index, byte, counted):
    """Count the values of a byte, at most 2^15 - 1 of them, into row ``index`` of [..., 256]."""
    found = tl.histogram(byte.to(tl.int32), 256, mask=counted)
    tl.store(counts + index * 256 + tl.arange(0, 256), found.to(tl.int16))
