"""Forbid tokens by xgrammar's own CPU code where there is no GPU.

Why: xgrammar's backend knows devices by name and raises for a CPU, and the server dies.
How: around the function of a request's grammar. Registered only on machines without a GPU.
Remove when: SGLang does so (its 0.5.23 does).
"""

from collections.abc import Callable
from typing import Any

import torch

TARGET = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask"
KIND = "AROUND"


def hook(
    original: Callable[..., None], grammar: Any, logits: torch.Tensor, vocab_mask: torch.Tensor
) -> None:
    """Set logits [batch, vocab] to -inf where vocab_mask, int32 [batch, vocab / 32], has no bit."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")
