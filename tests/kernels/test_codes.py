"""Score codes: the order of scores in 16 bits, in torch and in kernels alike."""

import torch
import triton
import triton.language as tl

from kascade_kernels._triton._primitives import encode_score
from kascade_kernels.codes import decode, encode
from tests.support.shapes import DEVICE, needs_kernels


@triton.jit
def encode_kernel(scores, codes, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(codes + lane, encode_score(tl.load(scores + lane)))


@needs_kernels
def test_kernels_encode_like_torch() -> None:
    scores = torch.cat([torch.rand(1000), 2.0 ** torch.linspace(-70, 20, 23), torch.zeros(1)])
    scores = scores.to(DEVICE)
    codes = torch.zeros(1024, dtype=torch.uint16, device=DEVICE)
    encode_kernel[(1,)](scores, codes, 1024)
    assert torch.equal(codes.to(torch.int32), encode(scores))


def test_codes_order_like_scores_and_round_finely() -> None:
    scores = 2.0 ** torch.linspace(-47, 15, 10_000)
    codes = encode(scores)
    assert (codes.diff() >= 0).all() and codes.min() >= 0 and codes.max() <= 65535
    assert ((decode(codes) - scores).abs() <= scores * 2.0**-11).all()


def test_what_is_too_small_or_too_large() -> None:
    assert encode(torch.tensor([0.0, 2.0**-60, 2.0**20])).tolist() == [0, 0, 65535]
