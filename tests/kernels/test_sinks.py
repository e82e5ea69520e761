"""Sinks in every operation that knows a softmax, against the float64 reference."""

import math
from dataclasses import replace

import pytest
import torch

from kascade_kernels import reference
from kascade_kernels.codes import decode
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.merge_parts import Parts, merge_parts
from kascade_kernels.structs import SINKS
from kascade_kernels.tile_attention import tile_attention
from kascade_kernels.tuning import STEP
from tests.kernels import test_decode_attention as attending
from tests.kernels import test_decode_scores as scoring
from tests.kernels import test_tile_attention as tiles
from tests.kernels.test_tile_lse import check_lse
from tests.kernels.test_tile_scores import BUDGET, EXTENDS, check_codes, score
from tests.support.decode_case import DecodeCase, lists_of
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels
from tests.support.tile_case import TileCase, pack_lists

pytestmark = needs_kernels

SHAPES = [(4, 64, torch.bfloat16), (7, 64, torch.float16), (8, 32, torch.bfloat16)]
shapes = pytest.mark.parametrize("group, dim, dtype", SHAPES, ids=lambda value: str(value))
types = pytest.mark.parametrize("sinks_dtype", SINKS, ids=str)


def with_sinks(
    case: DecodeCase | TileCase, dtype: torch.dtype = torch.float32
) -> DecodeCase | TileCase:
    """The same case with sinks of which some take most of their rows' weight, and some little."""
    generator = torch.Generator().manual_seed(3)
    drawn = 4 + 4 * torch.randn(case.q.shape[1], generator=generator)
    return replace(case, sinks=drawn.to(dtype).to(DEVICE))


def eager(logits: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Weights of keys in the logits' precision; logits [..., N], sinks [..., 1]."""
    column = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]


def eager_tile(case: TileCase, row: int, lists: list[torch.Tensor]) -> torch.Tensor:
    """A row's output in the inputs' own precision."""
    slots, q = case.slots_of(row), case.queries_of(row)
    own = slots[len(slots) - 1 - (len(slots) - 1) % 32 :].expand(2, -1)
    chosen = torch.cat([lists[row], own], dim=1)
    head = torch.arange(2, device=DEVICE).unsqueeze(1)
    keys, values = case.k[chosen, head], case.v[chosen, head]
    logits = torch.einsum("nhgd,hld->hgnl", q.unflatten(1, (2, -1)), keys) * case.scale
    seen = torch.ones(len(q), chosen.shape[1], dtype=torch.bool, device=DEVICE)
    logits = logits.masked_fill(~seen.tril(chosen.shape[1] - len(q)), float("-inf"))
    weights = eager(logits, case.sinks.view(2, -1, 1, 1))
    return torch.einsum("hgnl,hld->nhgd", weights, values).flatten(1, 2)


def test_the_reference_is_the_formula() -> None:
    """A sink joins the denominator of each query of its head, in scores and in attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 40, 4, 16, dtype=torch.float64, generator=generator).unbind()
    k, v, q, sinks = k[:, :2], v[:, :2], q[32:], torch.tensor([0.5, -1.0, 2.0, -math.inf])
    scores = torch.zeros(2, 32, dtype=torch.float64)
    listed = torch.arange(32).expand(2, -1)
    found = reference.tile_attention(
        q, k, v, listed, torch.arange(32, 40), 0.25, 2.0, sinks.double()
    )
    lse = reference.tile_lse(q, k, 0.25, sinks=sinks).view(2, 8, 2)
    for query in range(8):
        for head in range(4):
            exponents = (k[: 33 + query, head // 2] @ q[query, head] * 0.25).exp()
            total = exponents.sum() + math.exp(sinks[head])
            scores[head // 2] += exponents[:32] / total
            out = 2 * exponents @ v[: 33 + query, head // 2] / total
            torch.testing.assert_close(found[query, head], out)
            assert float(lse[head // 2, query, head % 2]) == pytest.approx(math.log2(total))
    torch.testing.assert_close(reference.tile_scores(q, k, 0.25, sinks), scores)
    last = reference.decode_scores(q[-1], k, 0.25, sinks)
    torch.testing.assert_close(last, reference.tile_scores(q[-1:], k, 0.25, sinks))


@types
@pytest.mark.memcheck
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_merge_parts(splits: int, sinks_dtype: torch.dtype) -> None:
    """Once, however many parts there are; alone where no part has a key."""
    spans = torch.ones(2, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((2, 1), splits * STEP, dtype=torch.int32, device=DEVICE)
    parts = Parts.empty(2 * 4 * splits, 32, DEVICE)
    parts.out.copy_(torch.randn(8 * splits, 32))
    parts.lse.copy_(5 * torch.randn(8 * splits))
    lse, out = parts.lse.view(2, 4, splits), parts.out.view(2, 4, splits, 32)
    lse[1, 3], out[1, 3] = float("-inf"), 0
    sinks = torch.tensor([3.0, -2.0, float("-inf"), 1.0], dtype=sinks_dtype, device=DEVICE)
    merged = torch.empty(2, 4, 32, device=DEVICE)
    merge_parts(parts, splits, lengths, spans, merged, sinks=sinks)
    for row in range(2):
        for head in range(4):
            some = out[row, head].double(), lse[row, head].double()
            exact = reference.merge_parts(*some, sinks[head])
            torch.testing.assert_close(merged[row, head].double(), exact, rtol=1e-5, atol=1e-5)
    assert (merged[1, 3] == 0).all()


@shapes
@pytest.mark.memcheck
def test_decode_attention(group: int, dim: int, dtype: torch.dtype) -> None:
    counts = [1, 31, 64, 200]
    case = with_sinks(DecodeCase.make(counts, group=group, dim=dim, dtype=dtype), dtype)
    lists, drawn = attending.make_lists(counts, 2, case.k.shape[0])
    head_map = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    spans = attending.spans_of(lists)
    parts = Parts.allocate(spans, case.q.shape[1], dim)
    where = (lists, spans, head_map, case.scale, parts)
    out = decode_attention(case.q, case.k, case.v, *where, sinks=case.sinks)
    without = decode_attention(case.q, case.k, case.v, *where)
    heads = torch.arange(2, device=DEVICE)[:, None]
    for row, slots in enumerate(drawn):
        mapped = torch.stack(slots).flip(0).to(DEVICE)
        q, k, v = case.q[row].double(), case.k.double(), case.v.double()
        exact = reference.decode_attention(q, k, v, mapped, case.scale, 1.0, case.sinks)
        grouped = case.q[row].view(2, group, dim)
        logits = grouped @ case.k[mapped, heads].transpose(1, 2) * case.scale
        rounded = eager(logits, case.sinks.view(2, -1, 1)) @ case.v[mapped, heads]
        eager_error = (rounded.flatten(0, 1).double() - exact).abs().max()
        assert (out[row].double() - exact).abs().max() <= eager_error + 1e-4
        assert (without[row].double() - exact).abs().max() > 0.05


@pytest.mark.memcheck
@pytest.mark.parametrize("pooled", [False, True], ids=["per_head", "pooled"])
def test_decode_scores(pooled: bool) -> None:
    """Heads whose sink takes much count for less, and keys are selected accordingly."""
    plain = DecodeCase.make([65, 301, 700], dtype=torch.bfloat16)
    plain.share([1, 2], 200)
    case = with_sinks(plain)
    selection, _, scratch = scoring.run(case, pooled=pooled)
    for row, length in enumerate(case.lengths):
        own = (length - 1) // 32 * 32
        found = decode(scratch.codes.codes[row, :, :own]).double()
        exact = case.scores(row, pooled)
        assert (found - exact).abs().max() <= 0.02 * exact.max()
        chosen = scoring.positions(case, row, lists_of(selection, row))
        wanted = scoring.BUDGET.selected(length // 32)
        best = exact.topk(wanted, dim=1).values.sum(1)
        assert (exact.gather(1, chosen[:, :wanted]).sum(1) >= (1 - 1e-3) * best).all()
    others, _, _ = scoring.run(plain, pooled=pooled)
    assert not torch.equal(selection.slots, others.slots)


@types
@pytest.mark.memcheck
def test_decode_attention_to_everything(sinks_dtype: torch.dtype) -> None:
    case = with_sinks(DecodeCase.make([1, 65, 301], dtype=torch.float16), sinks_dtype)
    alone, _, _ = scoring.run(case)
    selection, out, _ = scoring.run(case, attend=True)
    assert torch.equal(selection.slots, alone.slots)
    for row in range(3):
        every = case.slots_of(row).expand(2, -1)
        q, k, v = case.q[row].double(), case.k.double(), case.v.double()
        exact = reference.decode_attention(q, k, v, every, case.scale, 1.0, case.sinks)
        torch.testing.assert_close(out[row].double(), exact, rtol=2e-3, atol=2e-3)


@shapes
@pytest.mark.memcheck
def test_tile_lse_and_scores(
    group: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows of one span, and of several."""
    tune(monkeypatch, "tile_lse", span=128)
    case = with_sinks(TileCase.make(EXTENDS, group=group, dim=dim, dtype=dtype), dtype)
    lse = case.lse(BUDGET)
    for row in range(len(case.places)):
        if not case.is_dense(row, BUDGET):
            check_lse(case, lse, row, atol=2e-5)
    check_codes(case, score(case), steps=1)


def test_a_sampled_lse_has_the_whole_sink() -> None:
    """Keys that are read stand for others; the sink stands for itself."""
    case = with_sinks(TileCase.make([(590, 617)]))
    case.k.zero_()
    sampled, exact = case.lse(BUDGET, stride=8), case.exact_lse(0)
    found = sampled[0, :, : exact.shape[1]].double()
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)


@shapes
@pytest.mark.memcheck
def test_tile_attention(group: int, dim: int, dtype: torch.dtype) -> None:
    case = with_sinks(TileCase.make(tiles.EXTENDS, group=group, dim=dim, dtype=dtype), dtype)
    lists, head_map = case.draw_lists(tiles.COUNTS, heads=2), torch.arange(2, device=DEVICE).int()
    where = (case.req_to_token, case.rows, pack_lists(lists), head_map, case.scale)
    found = tile_attention(case.q, case.k, case.v, *where, sinks=case.sinks)
    errors, allowed = [], []
    for row, (_, end, first, count) in enumerate(case.places):
        own = case.slots_of(row)[(end - 1) // 32 * 32 :]
        exact = (case.queries_of(row).double(), case.k.double(), case.v.double(), lists[row], own)
        wanted = reference.tile_attention(*exact, case.scale, 1.0, case.sinks)
        errors.append((found[first : first + count].double() - wanted).abs().max())
        allowed.append((eager_tile(case, row, lists).double() - wanted).abs().max())
    assert max(errors) <= max(*allowed, 1e-5)


def test_sinks_of_minus_infinity_are_none() -> None:
    """To the last bit."""
    tile, row = TileCase.make([(270, 301)]), DecodeCase.make([301])
    nothing = torch.full((8,), float("-inf"), device=DEVICE)
    lists, head_map = tile.draw_lists([201, 100], heads=2), torch.arange(2, device=DEVICE).int()
    where = (tile.req_to_token, tile.rows, pack_lists(lists), head_map, tile.scale)
    outs = (tile_attention(tile.q, tile.k, tile.v, *where, sinks=s) for s in (None, nothing))
    assert torch.equal(*outs)
    assert torch.equal(tile.lse(BUDGET), replace(tile, sinks=nothing).lse(BUDGET))
    plain, same = (scoring.run(replace(row, sinks=s), attend=True) for s in (None, nothing))
    assert torch.equal(plain[0].slots, same[0].slots) and torch.equal(plain[1], same[1])


@pytest.mark.parametrize("key", [math.inf, -math.inf])
def test_keys_of_infinite_logits(key: float) -> None:
    """Of +inf they make NaN; of -inf they leave a sink everything, and values nothing."""
    tile = with_sinks(TileCase.make([(64, 96)], dtype=torch.float32))
    tile.q.abs_()
    tile.k.fill_(key)
    lists, head_map = tile.draw_lists([64], heads=2), torch.arange(2, device=DEVICE).int()
    where = (tile.req_to_token, tile.rows, pack_lists(lists), head_map, tile.scale)
    found = tile_attention(tile.q, tile.k, tile.v, *where, sinks=tile.sinks)
    own = tile.slots_of(0)[64:]
    exact = (tile.q.double(), tile.k.double(), tile.v.double(), lists[0], own)
    wanted = reference.tile_attention(*exact, tile.scale, 1.0, tile.sinks)
    for each in (found, wanted):
        assert (each.isnan() if key > 0 else each == 0).all()
    row = with_sinks(DecodeCase.make([65], dtype=torch.float32))
    row.q.abs_()
    row.k.fill_(key)
    _, out, _ = scoring.run(row, attend=True)
    every = row.slots_of(0).expand(2, -1)
    exact = (row.q[0].double(), row.k.double(), row.v.double(), every, row.scale, 1.0, row.sinks)
    wanted = reference.decode_attention(*exact)
    for each in (out, wanted):
        assert (each.isnan() if key > 0 else each == 0).all()


def test_refusals() -> None:
    case = TileCase.make([(96, 128)])
    for sinks, said in (
        (torch.zeros(2), r"sinks: expected shape \[8\], got \[2\]"),
        (torch.zeros(8, dtype=torch.float64), "sinks: expected float32 or bfloat16 or float16"),
        (torch.zeros(16, device=DEVICE)[::2], "sinks: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(case, sinks=sinks.to(DEVICE)).lse(BUDGET)
