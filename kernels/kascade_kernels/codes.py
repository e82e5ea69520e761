"""Score codes: 16 bits that order like a score in [0, 2^16), what selection works on.

A code is the upper part of a float32: ten bits of mantissa, and exponents from -48.
"""

import torch

SHIFT = 13
OFFSET = (127 - 48) << 10


def encode(scores: torch.Tensor) -> torch.Tensor:
    """Round scores to codes, as int32 in [0, 65535]; scores below 2^-48 share code 0."""
    bits = scores.to(torch.float32).view(torch.int32)
    return ((bits + (1 << SHIFT - 1)) >> SHIFT).sub(OFFSET).clamp(0, 65535)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 scores that codes stand for."""
    return ((codes.to(torch.int32) + OFFSET) << SHIFT).view(torch.float32)
