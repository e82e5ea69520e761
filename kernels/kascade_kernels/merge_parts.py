"""Partial results of programs that share a row, and their merge."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kascade_kernels import tuning
from kascade_kernels._triton._merge_parts import merge_parts_kernel
from kascade_kernels.checks import require_contiguous, require_sinks
from kascade_kernels.decode_lists import Spans, most_splits


class Parts(NamedTuple):
    """Attention over some of a row's keys. A launch lays them out as [rows, Hq, splits].

    lse: float32 [parts], base-2 log-sum-exp of the part's logits, -inf where it has no keys.
    out: float32 [parts, D], the part's output; not read where lse is -inf.
    """

    lse: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def allocate(spans: Spans, q_heads: int, dim: int) -> Parts:
        """Allocate for launches that are cut like ``spans``."""
        parts = len(spans.score) * q_heads * max(spans.score_splits, spans.attend_splits)
        return Parts.empty(parts, dim, spans.score.device)

    @staticmethod
    def empty(parts: int, dim: int, device: torch.device | str) -> Parts:
        """Allocate ``parts`` of them."""
        return Parts(
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(parts, dim, dtype=torch.float32, device=device),
        )


def most_parts(
    rows: int, heads: int, q_heads: int, device: torch.device, *, batch_invariant: bool
) -> int:
    """Return how many parts a step of up to ``rows`` requests has; a smaller one may have more."""
    splits = (
        max(most_splits(n, heads, device, batch_invariant=batch_invariant)) * n
        for n in range(1, rows + 1)
    )
    return q_heads * max(splits, default=0)


def merge_parts(
    parts: Parts,
    splits: int,
    lengths: torch.Tensor,
    spans: torch.Tensor,
    out: torch.Tensor,
    head_map: torch.Tensor | None = None,
    v_scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge the parts of every row and head into ``out``, [rows, Hq, D].

    splits: room for parts of one row and head. lengths: [rows, 1 or lists], the keys they were
    cut from, and spans: int32 [rows], steps of one part, say how many were written.
    head_map: int32 [H], which of a row's lengths each KV head has, where there are several.
    v_scale: what the result is multiplied with.
    sinks: [Hq], where heads have them: logits of one more key without a value.
    """
    rows, q_heads, dim = out.shape
    require_contiguous("out", out)
    require_sinks(sinks, q_heads)
    heads = 1 if head_map is None else len(head_map)
    launch = tuning.launch("merge_parts", out.device)
    merge_parts_kernel[(q_heads, rows)](
        part_out=parts.out,
        part_lse=parts.lse,
        lengths=lengths,
        spans=spans,
        head_map=spans if head_map is None else head_map,
        sinks=sinks,
        out=out,
        v_scale=v_scale,
        STEP=tuning.STEP,
        Q_HEADS=q_heads,
        GROUP=q_heads // heads,
        LISTS=lengths.shape[1],
        D=dim,
        SPLITS=splits,
        BLOCK=min(splits, launch.block),
        **launch.options(),
    )
    return out
