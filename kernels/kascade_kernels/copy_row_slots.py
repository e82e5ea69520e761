"""A decode step's own copy of its rows of the slot table, which the scheduler rewrites freely."""

import torch

from kascade_kernels import tuning
from kascade_kernels._triton._copy_row_slots import copy_row_slots_kernel
from kascade_kernels.checks import require_dtype
from kascade_kernels.structs import Rows

ALIGNMENT = 64


def row_width(context: int) -> int:
    """Return the entries of a row of up to ``context`` keys, padded so that rows begin aligned."""
    return -(-context // ALIGNMENT) * ALIGNMENT


def allocate_row_slots(rows: int, context: int, device: torch.device | str) -> torch.Tensor:
    """Allocate for ``rows`` requests of up to ``context`` keys; rows begin aligned."""
    return torch.zeros(rows, row_width(context), dtype=torch.int32, device=device)


def copy_row_slots(req_to_token: torch.Tensor, rows: Rows, copy: torch.Tensor) -> None:
    """Copy the slots of every row's keys, so that row i's are ``copy[i, : rows.ends[i]]``.

    req_to_token: int32 [requests, max_context]. copy: int32 [at least the rows, max_context].
    """
    count = len(rows.ends)
    require_dtype("req_to_token", req_to_token, torch.int32)
    if count > copy.shape[0]:
        raise ValueError(f"copy: expected at least {count} rows, got {copy.shape[0]}")
    launch = tuning.launch("copy_row_slots", copy.device)
    copy_row_slots_kernel[(count, launch.per_row)](
        table=req_to_token,
        requests=rows.requests,
        ends=rows.ends,
        copy=copy,
        stride_table=req_to_token.stride(0),
        stride_copy=copy.stride(0),
        BLOCK=launch.block,
        **launch.options(),
    )
