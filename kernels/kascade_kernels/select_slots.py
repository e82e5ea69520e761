"""Exact Top-k of score codes, as KV slots in ascending order of position."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kascade_kernels._triton._select_slots import (
    count_high_kernel,
    count_low_kernel,
    emit_slots_kernel,
    find_high_kernel,
    find_low_kernel,
)
from kascade_kernels.arena import Empty
from kascade_kernels.budget import Budget
from kascade_kernels.checks import require_dtype, require_shape
from kascade_kernels.structs import Rows, Selection

CHUNK = 2048
"""Codes that are counted together; their counts fit 16 bits."""
CHUNK_PROGRAMS = 2048
"""Programs of all lists together that share the chunks: a few waves on any GPU."""
PART = 16
"""Chunks whose counts one program holds at a time."""
FEW = 256
"""Codes of a chunk that are cheaper to count one at a time."""
LAUNCH = {"num_warps": 4}


class CodeBuffer(NamedTuple):
    """Score codes and what selection counts of them.

    codes: uint16 [rows, lists, keys]. high, low: int16 and int32 [rows, lists, chunks, 256].
    thresholds: int32 [rows, lists, 2]. before: int32 [rows, lists, chunks, 2].
    """

    codes: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    thresholds: torch.Tensor
    before: torch.Tensor

    @staticmethod
    def bytes_per_row(lists: int, keys: int) -> int:
        """Bytes for one row."""
        return lists * (2 * keys + triton.cdiv(keys, CHUNK) * (256 * (2 + 4) + 8) + 8)

    @staticmethod
    def allocate(rows: int, lists: int, keys: int, empty: Empty) -> CodeBuffer:
        """Allocate for rows of up to ``keys`` candidates; lists: the KV heads, or 1."""
        chunks = triton.cdiv(keys, CHUNK)
        counts = (rows, lists, chunks, 256)
        return CodeBuffer(
            empty((rows, lists, keys), torch.uint16),
            empty(counts, torch.int16),
            empty(counts, torch.int32),
            empty((rows, lists, 2), torch.int32),
            empty((rows, lists, chunks, 2), torch.int32),
        )


def programs_per_list(lists: int, chunks: int) -> int:
    """Programs that share the chunks of one list. lists: of all rows together."""
    return min(chunks, triton.cdiv(CHUNK_PROGRAMS, lists))


def count_high(buffer: CodeBuffer, rows: Rows, budget: Budget) -> None:
    """Count the codes' high bytes into ``buffer.high``, where scoring has not done so."""
    _, lists, chunks, _ = buffer.high.shape
    count = rows.ends.shape[0]
    count_high_kernel[(programs_per_list(lists * count, chunks), lists, count)](
        buffer.codes,
        rows.ends,
        buffer.high,
        budget.ratio_ppm,
        budget.min_k,
        chunks,
        buffer.codes.stride(1),
        LISTS=lists,
        CHUNK=CHUNK,
        **LAUNCH,
    )


def select_slots(
    buffer: CodeBuffer,
    req_to_token: torch.Tensor,
    rows: Rows,
    budget: Budget,
    selection: Selection,
    *,
    append_own: bool,
) -> None:
    """Write every row's lists and their length into ``selection``.

    Each list holds the ``budget.selected`` candidates with the largest codes, ascending by
    position; ties go to the lower position. Rows whose budget covers all candidates list them
    all, and read no codes.
    append_own: whether the list also holds the row's own tile, up to its last query.
    Not checked: that ``selection.slots`` has room at ``selection.offsets``.
    """
    _, lists, chunks, _ = buffer.high.shape
    count = rows.ends.shape[0]
    require_dtype("buffer.codes", buffer.codes, torch.uint16)
    require_shape("buffer.codes", buffer.codes, (None, selection.heads, None))
    require_dtype("selection.slots", selection.slots, torch.int32)
    require_dtype("selection.offsets", selection.offsets, torch.int64)
    numbers = (budget.ratio_ppm, budget.min_k, chunks)
    sizes = {"LISTS": lists, "CHUNK": CHUNK, **LAUNCH}
    grid = (programs_per_list(lists * count, chunks), lists, count)
    codes, high, low, thresholds, before = buffer
    find_high_kernel[(lists, count)](rows.ends, high, low, thresholds, *numbers, PART=PART, **sizes)
    count_low_kernel[grid](
        codes, rows.ends, thresholds, low, *numbers, codes.stride(1), FEW=FEW, **sizes
    )
    find_low_kernel[(lists, count)](
        rows.ends, high, low, thresholds, before, *numbers, PART=PART, **sizes
    )
    emit_slots_kernel[grid](
        codes,
        req_to_token,
        rows.requests,
        rows.ends,
        thresholds,
        before,
        selection.slots,
        selection.offsets,
        selection.counts,
        *numbers,
        codes.stride(1),
        req_to_token.stride(0),
        APPEND_OWN=append_own,
        **sizes,
    )
