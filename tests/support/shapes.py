"""Where kernels can run, and the heads that each is tested with."""

import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = triton.knobs.runtime.interpret

needs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="kernels run on a GPU, or on a CPU with TRITON_INTERPRET=1",
)

SHAPES = [
    (1, 64, torch.bfloat16),
    (4, 128, torch.float16),
    (5, 32, torch.bfloat16),
    (7, 64, torch.float16),
    (8, 256, torch.bfloat16),
    (16, 64, torch.float16),
]
"""Query heads of a KV head, head dimension, type: every value at least once."""
shapes = pytest.mark.parametrize("group, dim, dtype", SHAPES, ids=lambda value: str(value))
