"""Which rows of a decode step begin with the same slots of the KV pool."""

import triton
import triton.language as tl

from kascade_kernels._triton._primitives import VARY, power_of_2

NO_KEY = tl.constexpr(2**31 - 1)
"""Behind every position."""


@triton.jit(do_not_specialize=VARY)
def group_rows_kernel(
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    ends,  # [rows]
    spans,  # int32 [rows]
    shared_rows,  # int32 [rows, MEMBERS]
    shared_keys,  # int32 [rows]
    stride_table,
    rows,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    # Grid: (rows,).
    row = tl.program_id(0)
    other = tl.arange(0, ROWS)
    real = other < rows
    request = tl.load(requests + other, mask=real, other=0).to(tl.int64)
    slot = tl.load(table + request * stride_table, mask=real, other=-1)
    span = tl.load(spans + other, mask=real, other=-1)
    end = tl.load(ends + other, mask=real, other=0).to(tl.int32)
    alike = slot == tl.sum(tl.where(other == row, slot, 0), 0)
    alike = alike & (span == tl.sum(tl.where(other == row, span, 0), 0)) & real
    place = tl.cumsum(alike.to(tl.int32), 0) - 1
    own = tl.sum(tl.where(other == row, place, 0), 0)
    first = own // MEMBERS * MEMBERS
    grouped = alike & (place >= first) & (place < first + MEMBERS)
    count = tl.sum(grouped.to(tl.int32), 0)
    # The shortest row's keys: what follows can only shorten that.
    common = tl.min(tl.where(grouped, end, NO_KEY), 0)
    tl.store(shared_keys + row, tl.where(count > 1, common, 0))
    leads = own == first
    where = shared_rows + row * MEMBERS
    tl.store(where + place - first, other, mask=grouped & leads)
    index = tl.arange(0, power_of_2(MEMBERS))
    unused = (index >= tl.where(leads, count, 0)) & (index < MEMBERS)
    tl.store(where + index, -1, mask=unused)


@triton.jit
def compare_slots_kernel(
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    shared_rows,  # int32 [rows, MEMBERS]
    shared_keys,  # int32 [rows], from the group's shortest row down to what it shares
    stride_table,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Grid: (rows, programs of one row).
    row, program = tl.program_id(0), tl.program_id(1)
    group = shared_rows + row * MEMBERS
    if tl.load(group + 1) < 0:
        return
    # Others may have shortened it already.
    common = tl.load(shared_keys + row)
    own = table + tl.load(requests + row).to(tl.int64) * stride_table
    for start in tl.range(program * BLOCK, common, tl.num_programs(1) * BLOCK):
        position = start + tl.arange(0, BLOCK)
        visible = position < common
        slot = tl.load(own + position, mask=visible, other=0)
        differs = tl.full([BLOCK], False, tl.int1)
        for index in tl.range(1, MEMBERS):
            member = tl.load(group + index)
            if member >= 0:
                theirs = table + tl.load(requests + member).to(tl.int64) * stride_table
                differs |= tl.load(theirs + position, mask=visible, other=0) != slot
        shared = tl.min(tl.where(differs & visible, position, NO_KEY), 0)
        if shared < common:
            for index in tl.range(0, MEMBERS):
                member = tl.load(group + index)
                if member >= 0:
                    tl.atomic_min(shared_keys + member, shared)
