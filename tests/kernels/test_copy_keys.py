"""The 8-bit copy of keys beside the reference."""

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from tests.support.shapes import DEVICE, needs_kernels

pytestmark = needs_kernels


@pytest.mark.memcheck
@pytest.mark.parametrize("heads, dim", [(1, 64), (3, 32), (8, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_copies_the_keys_that_were_written(heads: int, dim: int, dtype: torch.dtype) -> None:
    """A GPU divides less exactly, so that a tie may be rounded to the other side."""
    keys = (3 * torch.randn(40, heads, dim)).to(dtype).to(DEVICE)
    keys[7] = 0
    copy, written = allocate_key_copy(40, heads, dim, DEVICE), torch.tensor([3, 39, 7, 12])
    copy_keys(keys, written.to(DEVICE), copy)
    values, scales = reference.copy_keys(keys)
    chosen = written.to(DEVICE)
    torch.testing.assert_close(copy.scales[chosen], scales[chosen], rtol=1e-6, atol=0)
    off = (copy.values[chosen].int() - values[chosen].int()).abs()
    assert off.max() <= (DEVICE == "cuda") and off.float().mean() < 1e-3
    restored = copy.values.float() * copy.scales.unsqueeze(-1)
    assert ((restored - keys.float()).abs() <= 0.51 * scales.unsqueeze(-1))[chosen].all()
    others = torch.ones(40, dtype=torch.bool, device=DEVICE).index_fill(0, chosen, False)
    assert not copy.values[others].any() and not copy.scales[others].any()
