"""Every operation on keys and values in fp8, against float64 of what is stored."""

from dataclasses import replace

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.merge_parts import Parts
from kascade_kernels.structs import FP8
from kascade_kernels.tile_attention import tile_attention
from tests.kernels import test_decode_attention as attending
from tests.kernels import test_decode_scores as scoring
from tests.kernels import test_tile_attention as tiles
from tests.kernels.test_tile_lse import check_lse
from tests.kernels.test_tile_scores import BUDGET, EXTENDS, check_codes, score
from tests.support.decode_case import DecodeCase
from tests.support.shapes import DEVICE, needs_kernels
from tests.support.tile_case import TileCase, pack_lists

pytestmark = needs_kernels

K_SCALE, V_SCALE = 0.625, 1.75
SHAPES = [(4, 128, torch.bfloat16), (7, 64, torch.float16), (1, 32, torch.bfloat16)]
stored = pytest.mark.parametrize("stored", FP8, ids=["e4m3", "e5m2"])
shapes = pytest.mark.parametrize("group, dim, dtype", SHAPES, ids=lambda value: str(value))


def scaled(case: DecodeCase | TileCase) -> DecodeCase | TileCase:
    """The same case, of a layer with a k_scale."""
    return replace(case, scale=case.scale * K_SCALE)


def widened(case: DecodeCase | TileCase) -> DecodeCase | TileCase:
    """The same case with what is stored in the queries' type, which holds it exactly."""
    return replace(case, k=case.k.to(case.q.dtype), v=case.v.to(case.q.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@stored
def test_both_types_of_queries_hold_fp8_exactly(stored: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(stored)
    assert torch.equal(every.to(dtype).double().nan_to_num(1), every.double().nan_to_num(1))


def test_the_reference_takes_what_is_stored_times_its_scales() -> None:
    q, k, v = torch.randn(3, 40, 2, 16, dtype=torch.float64).unbind()
    k, v = k.to(FP8[0]), v.to(FP8[0])
    listed = torch.arange(32).expand(2, -1)
    found = reference.tile_attention(
        q[32:], k, v, listed, torch.arange(32, 40), 0.25 * K_SCALE, V_SCALE
    )
    weights = torch.einsum("nhd,lhd->hnl", q, k.double() * K_SCALE) * 0.25
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1)
    wanted = torch.einsum("hnl,lhd->nhd", weights, v.double() * V_SCALE)
    torch.testing.assert_close(found, wanted[32:])


@stored
@shapes
@pytest.mark.memcheck
def test_decode_attention(group: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    counts = [1, 31, 64, 200]
    case = scaled(DecodeCase.make(counts, group=group, dim=dim, dtype=dtype, stored=stored))
    lists, drawn = attending.make_lists(counts, 2, case.k.shape[0])
    head_map = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    spans = attending.spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], dim)
    where = (lists, spans, head_map, case.scale, parts)
    out = decode_attention(case.q, case.k, case.v, *where, v_scale=V_SCALE)
    wide = widened(case)
    for row, slots in enumerate(drawn):
        mapped = torch.stack(slots).flip(0).to(DEVICE)
        q, k, v = case.q[row], case.k.double(), case.v.double()
        exact = reference.decode_attention(q.double(), k, v, mapped, case.scale, V_SCALE)
        eager = attending.eager_attention(q, wide.k, wide.v, mapped, case.scale) * V_SCALE
        eager_error = (eager.double() - exact).abs().max()
        assert (out[row].double() - exact).abs().max() <= eager_error + 1e-4


@stored
@shapes
@pytest.mark.memcheck
def test_decode_scores(group: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    lengths = [1, 33, 65, 301, 700]
    case = scaled(DecodeCase.make(lengths, group=group, dim=dim, dtype=dtype, stored=stored))
    pooled = group == 7
    selection, _, _ = scoring.run(case, pooled=pooled)
    scoring.check_selection(widened(case), selection, scoring.BUDGET, pooled)


@stored
@pytest.mark.memcheck
def test_decode_scores_and_attention_to_everything(stored: torch.dtype) -> None:
    case = scaled(DecodeCase.make([1, 65, 301], dtype=torch.bfloat16, stored=stored))
    alone, _, _ = scoring.run(case)
    selection, out, _ = scoring.run(case, attend=True, v_scale=V_SCALE)
    assert torch.equal(selection.slots, alone.slots)
    for row in range(3):
        every = case.slots_of(row).expand(2, -1)
        q, k, v = case.q[row].double(), case.k.double(), case.v.double()
        exact = reference.decode_attention(q, k, v, every, case.scale, V_SCALE)
        torch.testing.assert_close(out[row].double(), exact, rtol=1e-2, atol=1e-2)


@stored
@shapes
@pytest.mark.memcheck
def test_tile_lse_and_scores(group: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    case = scaled(TileCase.make(EXTENDS, group=group, dim=dim, dtype=dtype, stored=stored))
    lse = case.lse(BUDGET)
    for row in range(len(case.places)):
        if not case.is_dense(row, BUDGET):
            check_lse(case, lse, row, atol=2e-5)
    check_codes(case, score(case), steps=1)


@stored
@shapes
@pytest.mark.memcheck
def test_tile_attention(group: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    made = TileCase.make(tiles.EXTENDS, group=group, dim=dim, dtype=dtype, stored=stored)
    case, head_map = scaled(made), torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    lists = case.draw_lists(tiles.COUNTS, heads=2)
    where = (case.req_to_token, case.rows, pack_lists(lists), head_map, case.scale)
    found = tile_attention(case.q, case.k, case.v, *where, v_scale=V_SCALE)
    wide, errors, allowed = widened(case), [], []
    for row, (_, _, first, count) in enumerate(case.places):
        wanted = tiles.exact(wide, row, lists, [1, 0]) * V_SCALE
        eager = tiles.eager(wide, row, lists, [1, 0]) * V_SCALE
        errors.append((found[first : first + count].double() - wanted).abs().max())
        allowed.append((eager.double() - wanted).abs().max())
    assert max(errors) <= max(*allowed, 1e-5)


def test_a_row_does_not_depend_on_the_batch() -> None:
    case = TileCase.make([(270, 301), (0, 33)], dtype=torch.bfloat16, stored=FP8[0])
    lists = case.draw_lists([201, 40, 0, 32], heads=2)
    found = tiles.attend(case, lists, [0, 1])
    alone = tiles.attend(case.only([1]), lists[1:2], [0, 1])
    _, _, first, count = case.places[1]
    assert torch.equal(found[first : first + count], alone[first : first + count])


def test_types_that_no_kernel_reads() -> None:
    case = TileCase.make([(0, 33)], dtype=torch.bfloat16, stored=torch.float32)
    with pytest.raises(ValueError, match="keys: expected bfloat16 or float8_e4m3fn or float8_e5m2"):
        case.lse(BUDGET)
