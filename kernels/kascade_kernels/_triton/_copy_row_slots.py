"""A decode step's own copy of its rows of the slot table."""

import triton
import triton.language as tl


@triton.jit
def copy_row_slots_kernel(
    table,  # int32 [requests, max_context]
    requests,  # [rows]
    ends,  # [rows]
    copy,  # int32 [rows, stride]
    stride_table,
    stride_copy,
    BLOCK: tl.constexpr,
):
    # Grid: (rows, programs of one row).
    row, program = tl.program_id(0), tl.program_id(1)
    source = table + tl.load(requests + row).to(tl.int64) * stride_table
    target = copy + row.to(tl.int64) * stride_copy
    end = tl.load(ends + row).to(tl.int32)
    for start in tl.range(program * BLOCK, end, tl.num_programs(1) * BLOCK):
        position = start + tl.arange(0, BLOCK)
        slot = tl.load(source + position, mask=position < end)
        tl.store(target + position, slot, mask=position < end)
