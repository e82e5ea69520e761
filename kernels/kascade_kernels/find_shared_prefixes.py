"""Rows of a decode step whose requests begin with the same slots, as a radix cache shares them.

Tensor cores score 16 query heads at the price of one. A row fills them with the heads of its
group; where several rows read the same keys, one program can score them for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._find_shared_prefixes import compare_slots_kernel, group_rows_kernel
from kascade_kernels.decode_lists import Spans
from kascade_kernels.launch import padded_group
from kascade_kernels.structs import Rows


class SharedPrefix(NamedTuple):
    """Groups of rows that share their first slots.

    keys: int32 [rows], positions from 0 on at which all rows of the row's group have the same
        slots; 0 for a row alone.
    members: int32 [rows, M], a group's rows in its first row's place, that row first; else -1.
    """

    keys: torch.Tensor
    members: torch.Tensor

    @staticmethod
    def allocate(rows: int, group: int, device: torch.device | str) -> SharedPrefix:
        """Allocate for ``rows`` requests; group: query heads of a KV head."""
        members = padded_group(group) // group
        return SharedPrefix(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((rows, members), -1, dtype=torch.int32, device=device),
        )

    def rows(self, first: int, last: int) -> SharedPrefix:
        """Return the part of some rows."""
        return SharedPrefix(*(tensor[first:last] for tensor in self))


def find_shared_prefixes(
    req_to_token: torch.Tensor, rows: Rows, spans: Spans, shared: SharedPrefix
) -> None:
    """Fill ``shared`` for one launch's rows; row numbers in it are the launch's.

    Rows with the same first slot make a group, as many as fit a tensor core's product, if they
    are cut into the same spans. Grids depend on the number of rows only.
    """
    count, members = len(rows.ends), shared.members.shape[1]
    if members == 1:
        return
    group_rows_kernel[(count,)](
        table=req_to_token,
        requests=rows.requests,
        ends=rows.ends,
        spans=spans.score,
        shared_rows=shared.members,
        shared_keys=shared.keys,
        stride_table=req_to_token.stride(0),
        rows=count,
        ROWS=triton.next_power_of_2(count),
        MEMBERS=members,
        **tuning.launch("group_rows", req_to_token.device).options(),
    )
    launch = tuning.launch("compare_slots", req_to_token.device)
    compare_slots_kernel[(count, launch.per_row)](
        table=req_to_token,
        requests=rows.requests,
        shared_rows=shared.members,
        shared_keys=shared.keys,
        stride_table=req_to_token.stride(0),
        MEMBERS=members,
        BLOCK=launch.block,
        **launch.options(),
    )
