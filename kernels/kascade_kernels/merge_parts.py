"""Partial results of programs that share a row, and their merge."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kascade_kernels._triton._merge_parts import merge_parts_kernel
from kascade_kernels.decode_spans import Spans


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
        device = spans.score.device
        return Parts(
            torch.empty(parts, dtype=torch.float32, device=device),
            torch.empty(parts, dim, dtype=torch.float32, device=device),
        )


def merge_parts(parts: Parts, splits: int, out: torch.Tensor) -> torch.Tensor:
    """Merge the ``splits`` parts of every row and head into ``out``, [rows, Hq, D]."""
    rows, q_heads, dim = out.shape
    merge_parts_kernel[(rows * q_heads,)](
        parts.out, parts.lse, out, D=dim, SPLITS=splits, num_warps=1
    )
    return out
