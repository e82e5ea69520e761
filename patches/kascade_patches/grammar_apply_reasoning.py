"""Forbid tokens by xgrammar's own CPU code under ``--reasoning-parser``, too.

Why: grammars that wait for the end of a thought apply their masks by a function of the backend,
    which raises for a CPU, and the server dies.
How: around that function. Registered only on machines without a GPU.
Remove when: SGLang does so (its 0.5.23 does not).
"""

from collections.abc import Callable

import torch

TARGET = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask"
KIND = "AROUND"


def hook(original: Callable[..., None], logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set logits [batch, vocab] to -inf where vocab_mask, int32 [batch, vocab / 32], has no bit."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")
