"""Exact Top-k of score codes, as KV slots in ascending order of position."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from kascade_kernels import tuning
from kascade_kernels._triton._select_slots import (
    count_high_kernel,
    count_low_kernel,
    emit_slots_kernel,
    find_high_kernel,
    find_low_kernel,
)
from kascade_kernels.arena import Empty
from kascade_kernels.checks import require_dtype, require_lists, require_shape
from kascade_kernels.launch import pool_arguments
from kascade_kernels.structs import Lists, PoolKeys, Rows
from kascade_kernels.tuning import CHUNK, FEW, Launch


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


def programs_per_list(launch: Launch, lists: int, chunks: int) -> int:
    """Programs that share the chunks of one list. lists: of all rows together."""
    return min(chunks, triton.cdiv(launch.programs, lists))


def count_high(buffer: CodeBuffer, rows: Rows, lists: Lists) -> None:
    """Count the codes' high bytes into ``buffer.high``, where scoring has not done so.

    lists: without own tiles; those that hold all candidates are not counted.
    """
    _, per_row, chunks, _ = buffer.high.shape
    count = rows.ends.shape[0]
    require_lists(lists, count, (per_row,))
    launch = tuning.launch("count_high", buffer.codes.device)
    count_high_kernel[(programs_per_list(launch, per_row * count, chunks), per_row, count)](
        codes=buffer.codes,
        ends=rows.ends,
        counts=lists.counts,
        high_counts=buffer.high,
        room=chunks,
        stride_codes_list=buffer.codes.stride(1),
        LISTS=per_row,
        CHUNK=CHUNK,
        APPEND_OWN=False,
        **launch.options(),
    )


def select_slots(
    buffer: CodeBuffer,
    req_to_token: torch.Tensor,
    rows: Rows,
    lists: Lists,
    *,
    append_own: bool,
    pool: PoolKeys | None = None,
) -> None:
    """Fill every row's lists.

    Each list holds the candidates with the largest codes, as many as ``lists.counts`` says,
    ascending by position; ties go to the lower position. Lists that hold all candidates read no
    codes. append_own: whether a list also holds, and its count counts, the row's own tile up to
    its last query.
    pool: where given, candidates and own tiles are those of pools, of which ``rows.ends`` are the
        counts; the slot table is not read.
    Codes stay as they are: shorter and longer lists may be selected by the same.
    Not checked: that ``lists.slots`` has room, and that counts are no more than there are keys.
    """
    _, per_row, chunks, _ = buffer.high.shape
    count = rows.ends.shape[0]
    require_dtype("buffer.codes", buffer.codes, torch.uint16)
    require_shape("buffer.codes", buffer.codes, (None, per_row, None))
    require_lists(lists, count, (per_row,))
    codes, high, low, thresholds, before = buffer
    names = ("find_high", "count_low", "find_low", "emit_slots")
    find_high, count_low, find_low, emit = (tuning.launch(name, codes.device) for name in names)

    def grid(launch: Launch) -> tuple[int, int, int]:
        return programs_per_list(launch, per_row * count, chunks), per_row, count

    common = {
        "ends": rows.ends,
        "counts": lists.counts,
        "thresholds": thresholds,
        "room": chunks,
        "LISTS": per_row,
        "CHUNK": CHUNK,
        "APPEND_OWN": append_own,
    }
    find_high_kernel[(per_row, count)](
        high_counts=high,
        low_counts=low,
        BLOCK=find_high.block,
        **common,
        **find_high.options(),
    )
    count_low_kernel[grid(count_low)](
        codes=codes,
        low_counts=low,
        stride_codes_list=codes.stride(1),
        FEW=FEW,
        **common,
        **count_low.options(),
    )
    find_low_kernel[(per_row, count)](
        high_counts=high,
        low_counts=low,
        before=before,
        BLOCK=find_low.block,
        **common,
        **find_low.options(),
    )
    emit_slots_kernel[grid(emit)](
        codes=codes,
        table=req_to_token if pool is None else pool.lists.slots,
        requests=rows.requests,
        before=before,
        slots=lists.slots,
        offsets=lists.offsets,
        stride_codes_list=codes.stride(1),
        stride_table=req_to_token.stride(0),
        **pool_arguments(pool),
        **common,
        **emit.options(),
    )
