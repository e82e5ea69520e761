"""Allocate the mask of allowed tokens in plain memory where there is no GPU.

Why: xgrammar's backend asks for pinned memory, which needs a GPU's driver, and the server dies.
How: around the allocation, xgrammar's own. Registered only on machines without a GPU.
Remove when: SGLang asks the platform (its 0.5.23 does).
"""

from collections.abc import Callable

import torch

TARGET = "sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask"
KIND = "AROUND"


def hook(
    original: Callable[[int, int], torch.Tensor], vocab_size: int, batch_size: int
) -> torch.Tensor:
    """Return a mask that allows everything, int32 [batch_size, ceil(vocab_size / 32)]."""
    from xgrammar import allocate_token_bitmask

    return allocate_token_bitmask(batch_size, vocab_size)
