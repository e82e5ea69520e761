"""Exact Top-k of score codes by two rounds of counting, then the keys' slots in order.

A list's codes are cut into chunks, which the programs of its list take in turn. Between the
passes over the codes, one program a list turns the chunks' counts into a threshold and into
where each chunk writes. ``room``: chunks of the longest list. With APPEND_OWN a list also holds
the row's own tile, up to its last query, and its count says so.
"""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import (
    TILE,
    VARY,
    load_slots,
    own_tile_start,
    slots_of,
    store_counts,
)


@triton.jit
def _wanted(ends, counts, row, list_index, APPEND_OWN: tl.constexpr):
    """Keys before the own tile, and how many of them the list holds."""
    end = tl.load(ends + row).to(tl.int32)
    candidates = own_tile_start(end)
    wanted = tl.load(counts + list_index)
    if APPEND_OWN:
        wanted -= end - candidates
    return candidates, wanted


@triton.jit
def _load_counts(counts, list_index, first, chunks, room, BLOCK: tl.constexpr):
    """Counts of a list's chunks from ``first`` on, int32 [BLOCK, 256]; zeros past ``chunks``."""
    chunk = first + tl.arange(0, BLOCK)[:, None]
    address = (list_index * room + chunk) * 256 + tl.arange(0, 256)[None, :]
    return tl.load(counts + address, mask=chunk < chunks, other=0).to(tl.int32)


@triton.jit
def _totals(counts, list_index, chunks, room, BLOCK: tl.constexpr):
    """Counts of a whole list, int32 [256]."""
    totals = tl.zeros([256], tl.int32)
    for first in tl.range(0, chunks, BLOCK):
        totals += tl.sum(_load_counts(counts, list_index, first, chunks, room, BLOCK), 0)
    return totals


@triton.jit
def _largest_reaching(totals, wanted):
    """Largest bin with at least ``wanted`` elements in it or above, and how many lie above."""
    reach = tl.cumsum(totals, 0, reverse=True)
    bin_ = tl.sum((reach >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) == bin_ + 1, reach, 0), 0)
    return bin_, above


@triton.jit(do_not_specialize=VARY)
def count_high_kernel(
    codes,  # uint16 [rows, LISTS, stride]
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    high_counts,  # int16 [rows, LISTS, room, 256]
    room,
    stride_codes_list,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    APPEND_OWN: tl.constexpr,
):
    # Grid: (programs of one list, LISTS, rows).
    program, list_, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_index = row.to(tl.int64) * LISTS + list_
    candidates, wanted = _wanted(ends, counts, row, list_index, APPEND_OWN)
    if wanted == candidates:
        return
    for chunk in tl.range(program, tl.cdiv(candidates, CHUNK), tl.num_programs(0)):
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        visible = position < candidates
        code = tl.load(codes + list_index * stride_codes_list + position, mask=visible, other=0)
        store_counts(high_counts, list_index * room + chunk, code >> 8, visible)


@triton.jit(do_not_specialize=VARY)
def find_high_kernel(
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    high_counts,  # int16 [rows, LISTS, room, 256]
    low_counts,  # int32 [rows, LISTS, room, 256], zeroed here for the next pass
    thresholds,  # int32 [rows, LISTS, 2]: high byte of the threshold
    room,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    APPEND_OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Grid: (LISTS, rows).
    list_, row = tl.program_id(0), tl.program_id(1)
    list_index = row.to(tl.int64) * LISTS + list_
    candidates, wanted = _wanted(ends, counts, row, list_index, APPEND_OWN)
    if wanted == candidates:
        return
    chunks = tl.cdiv(candidates, CHUNK)
    for first in tl.range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)[:, None]
        address = (list_index * room + chunk) * 256 + tl.arange(0, 256)[None, :]
        tl.store(low_counts + address, 0, mask=chunk < chunks)
    totals = _totals(high_counts, list_index, chunks, room, BLOCK)
    high, _ = _largest_reaching(totals, wanted)
    tl.store(thresholds + list_index * 2, high)


@triton.jit(do_not_specialize=VARY)
def count_low_kernel(
    codes,  # uint16 [rows, LISTS, stride]
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    thresholds,  # int32 [rows, LISTS, 2]
    low_counts,  # int32 [rows, LISTS, room, 256]: codes whose high byte is the threshold's
    room,
    stride_codes_list,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    APPEND_OWN: tl.constexpr,
    FEW: tl.constexpr,  # codes that are cheaper to add one at a time than to sum first
):
    # Grid: (programs of one list, LISTS, rows).
    program, list_, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_index = row.to(tl.int64) * LISTS + list_
    candidates, wanted = _wanted(ends, counts, row, list_index, APPEND_OWN)
    if wanted == candidates:
        return
    threshold = tl.load(thresholds + list_index * 2)
    for chunk in tl.range(program, tl.cdiv(candidates, CHUNK), tl.num_programs(0)):
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        visible = position < candidates
        code = tl.load(codes + list_index * stride_codes_list + position, mask=visible, other=0)
        code = code.to(tl.int32)
        counted = visible & ((code >> 8) == threshold)
        low = low_counts + (list_index * room + chunk) * 256
        # Most often few codes share the threshold's high byte; near-uniform or very peaked
        # attention puts most of them there.
        if tl.sum(counted.to(tl.int32), 0) > FEW:
            byte = tl.arange(0, 256)
            tl.store(low + byte, tl.histogram(code & 255, 256, mask=counted))
        else:
            tl.atomic_add(low + (code & 255), 1, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=VARY)
def find_low_kernel(
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    high_counts,  # int16 [rows, LISTS, room, 256]
    low_counts,  # int32 [rows, LISTS, room, 256]
    thresholds,  # int32 [rows, LISTS, 2]: the threshold, and how many equal to it are taken
    before,  # int32 [rows, LISTS, room, 2]: larger codes and ties in earlier chunks
    room,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    APPEND_OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Grid: (LISTS, rows).
    list_, row = tl.program_id(0), tl.program_id(1)
    list_index = row.to(tl.int64) * LISTS + list_
    candidates, wanted = _wanted(ends, counts, row, list_index, APPEND_OWN)
    if wanted == candidates:
        return
    chunks = tl.cdiv(candidates, CHUNK)
    high_totals = _totals(high_counts, list_index, chunks, room, BLOCK)
    low_totals = _totals(low_counts, list_index, chunks, room, BLOCK)
    high, above_high = _largest_reaching(high_totals, wanted)
    low, above_low = _largest_reaching(low_totals, wanted - above_high)
    tl.store(thresholds + list_index * 2, high * 256 + low)
    tl.store(thresholds + list_index * 2 + 1, wanted - above_high - above_low)

    byte = tl.arange(0, 256)[None, :]
    larger_before = 0
    ties_before = 0
    for first in tl.range(0, chunks, BLOCK):
        high_by_chunk = _load_counts(high_counts, list_index, first, chunks, room, BLOCK)
        low_by_chunk = _load_counts(low_counts, list_index, first, chunks, room, BLOCK)
        larger = tl.sum(tl.where(byte > high, high_by_chunk, 0), 1)
        larger += tl.sum(tl.where(byte > low, low_by_chunk, 0), 1)
        ties = tl.sum(tl.where(byte == low, low_by_chunk, 0), 1)
        chunk = first + tl.arange(0, BLOCK)
        target = before + (list_index * room + chunk) * 2
        tl.store(target, larger_before + tl.cumsum(larger, 0) - larger, mask=chunk < chunks)
        tl.store(target + 1, ties_before + tl.cumsum(ties, 0) - ties, mask=chunk < chunks)
        larger_before += tl.sum(larger, 0)
        ties_before += tl.sum(ties, 0)


@triton.jit(do_not_specialize=VARY)
def emit_slots_kernel(
    codes,  # uint16 [rows, LISTS, stride]
    table,  # int32 [requests, max_context], or slots of pools
    requests,  # [rows]
    pool_offsets,  # int64 [rows, LISTS]: where pools begin in the table, or None
    pool_map,  # int32 [H], read with pools
    ends,  # [rows]
    counts,  # int32 [rows, LISTS]
    thresholds,  # int32 [rows, LISTS, 2]
    before,  # int32 [rows, LISTS, room, 2]
    slots,  # int32 [total]
    offsets,  # int64 [rows, LISTS]
    room,
    stride_codes_list,
    stride_table,
    LISTS: tl.constexpr,
    CHUNK: tl.constexpr,
    APPEND_OWN: tl.constexpr,
):
    # Grid: (programs of one list, LISTS, rows).
    program, list_, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    list_index = row.to(tl.int64) * LISTS + list_
    candidates, wanted = _wanted(ends, counts, row, list_index, APPEND_OWN)
    request_table = slots_of(
        table, requests, stride_table, pool_offsets, pool_map, row, list_, LISTS
    )
    out = slots + tl.load(offsets + list_index)
    if APPEND_OWN and program == 0:
        end = tl.load(ends + row).to(tl.int32)
        own = candidates + tl.arange(0, TILE)
        slot = load_slots(request_table, own, own < end)
        tl.store(out + wanted + tl.arange(0, TILE), slot.to(tl.int32), mask=own < end)

    list_codes = codes + list_index * stride_codes_list
    chunks = tl.cdiv(candidates, CHUNK)
    if wanted == candidates:
        for chunk in tl.range(program, chunks, tl.num_programs(0)):
            position = chunk * CHUNK + tl.arange(0, CHUNK)
            slot = load_slots(request_table, position, position < candidates)
            tl.store(out + position, slot.to(tl.int32), mask=position < candidates)
    else:
        threshold = tl.load(thresholds + list_index * 2)
        ties = tl.load(thresholds + list_index * 2 + 1)
        for chunk in tl.range(program, chunks, tl.num_programs(0)):
            larger_before = tl.load(before + (list_index * room + chunk) * 2)
            ties_before = tl.load(before + (list_index * room + chunk) * 2 + 1)
            position = chunk * CHUNK + tl.arange(0, CHUNK)
            visible = position < candidates
            code = tl.load(list_codes + position, mask=visible, other=0).to(tl.int32)
            larger = (visible & (code > threshold)).to(tl.int32)
            tie = (visible & (code == threshold)).to(tl.int32)
            # One running sum counts both: larger codes below bit 16, ties from there on.
            both = larger + (tie << 16)
            earlier = tl.cumsum(both, 0) - both
            rank_tie = ties_before + (earlier >> 16)
            taken = (larger == 1) | ((tie == 1) & (rank_tie < ties))
            rank = larger_before + (earlier & 0xFFFF) + tl.minimum(rank_tie, ties)
            slot = load_slots(request_table, position, taken)
            tl.store(out + rank, slot.to(tl.int32), mask=taken)
