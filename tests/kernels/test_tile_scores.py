"""Score codes of query tiles against the float64 reference."""

import math

import pytest
import torch

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.codes import encode
from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from kascade_kernels.reference import pool_heads
from kascade_kernels.structs import KeyCopy, Rows
from kascade_kernels.tile_lse import tile_lse
from kascade_kernels.tile_scores import tile_scores
from tests.support.interpreter import tune
from tests.support.shapes import DEVICE, needs_kernels, shapes
from tests.support.tile_case import TileCase

pytestmark = needs_kernels

BUDGET = Budget(0.1, 64)
EXTENDS = [(270, 301), (0, 70), (128, 129), (90, 127), (31, 32), (0, 1)]
"""Whole tiles, first and last tiles in part, one query in mid-tile, and tiles that are dense."""
UNTOUCHED = 12345


def codes_of(scores: torch.Tensor) -> torch.Tensor:
    """Codes of scores, as int64."""
    return encode(scores).long()


def score(
    case: TileCase,
    lse: torch.Tensor | None = None,
    keys: KeyCopy | None = None,
    pooled: bool = False,
) -> torch.Tensor:
    """Codes of a case, UNTOUCHED where nothing was written; int64 [rows, lists, keys]."""
    per_row = 1 if pooled else case.k.shape[1]
    room = case.req_to_token.shape[1]
    out = torch.full((len(case.places), per_row, room), UNTOUCHED, device=DEVICE)
    out = out.to(torch.uint16)
    tile_scores(
        case.q,
        case.k if keys is None else keys,
        case.req_to_token,
        case.rows,
        case.lists(BUDGET, per_row),
        case.lse(BUDGET) if lse is None else lse,
        case.scale,
        pooled=pooled,
        out=out,
    )
    return out.long()


def check_codes(case: TileCase, codes: torch.Tensor, steps: int, pooled: bool = False) -> None:
    """Codes are within some steps of the exact scores', and nothing else was written."""
    for row in range(len(case.places)):
        scores = pool_heads(case.scores(row)) if pooled else case.scores(row)
        candidates = 0 if case.is_dense(row, BUDGET) else scores.shape[1]
        off = codes[row, :, :candidates] - codes_of(scores[:, :candidates])
        assert candidates == 0 or off.abs().max() <= steps
        assert (codes[row, :, candidates:] == UNTOUCHED).all()


@shapes
@pytest.mark.memcheck
def test_scores(group: int, dim: int, dtype: torch.dtype) -> None:
    case = TileCase.make(EXTENDS, group=group, dim=dim, dtype=dtype)
    check_codes(case, score(case), steps=1)


@pytest.mark.parametrize("dim, page_size", [(16, 16), (64, 32), (128, 64)])
def test_scores_on_pages(page_size: int, dim: int) -> None:
    case = TileCase.make([(96, 129), (33, 130)], kv_heads=1, dim=dim, page_size=page_size)
    check_codes(case, score(case), steps=1)


@pytest.mark.memcheck
@pytest.mark.parametrize("kv_heads, group", [(3, 4), (2, 5), (1, 4)])
def test_pooled(kv_heads: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(monkeypatch, "tile_scores", span=128)
    case = TileCase.make(EXTENDS, kv_heads=kv_heads, group=group)
    check_codes(case, score(case, pooled=True), steps=1, pooled=True)


def test_pooled_with_scratch() -> None:
    case = TileCase.make([(96, 160)])
    lse, room = case.lse(BUDGET), case.req_to_token.shape[1]
    out = torch.zeros(len(case.places), 1, room, dtype=torch.uint16, device=DEVICE)
    sums = torch.full((len(case.places), room + 5), float("nan"), device=DEVICE)[:, :room]
    found = tile_scores(
        case.q, case.k, case.req_to_token, case.rows, case.lists(BUDGET, 1), lse, case.scale,
        pooled=True, out=out, sums=sums,
    )  # fmt: skip
    assert found is out
    exact = codes_of(pool_heads(case.scores(1)))
    assert (out[1, :, :128].long() - exact).abs().max() <= 1


def rounded(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Round to whole multiples of the largest magnitude over some dimensions / 127."""
    step = x.float().abs().amax(dims, keepdim=True) / 127
    return (x.float() / step + 0.5).floor().double() * step


def copy_of(case: TileCase) -> KeyCopy:
    slots = case.req_to_token[case.req_to_token > 0].long()
    copy = allocate_key_copy(case.k.shape[0], case.k.shape[1], case.k.shape[2], DEVICE)
    copy_keys(case.k, slots, copy)
    return copy


@pytest.mark.memcheck
@pytest.mark.parametrize(
    "group, dim, pooled", [(1, 64, False), (4, 128, True), (7, 32, True), (8, 64, False)]
)
def test_eight_bit(group: int, dim: int, pooled: bool) -> None:
    """Equals the exact scores of rounded q and K: q has one scale a block of 128 query rows.

    A GPU divides less exactly, so that a tie may be rounded to the other side.
    """
    case = TileCase.make([(270, 301), (90, 130), (0, 1)], group=group, dim=dim)
    copy, lse = copy_of(case), case.lse(BUDGET)
    codes = score(case, lse, copy, pooled)
    keys = copy.values.double() * copy.scales.double().unsqueeze(-1)
    for row, (_, end, _, count) in enumerate(case.places):
        if case.is_dense(row, BUDGET):
            continue
        own = TILE * tile_of(end - 1)
        q = case.queries_of(row).unflatten(1, (2, group)).transpose(0, 1).flatten(1, 2)
        q = torch.cat([rounded(block, (1, 2)) for block in q.split(128, dim=1)], 1)
        k = keys[case.slots_of(row)[:own]]
        logits = torch.einsum("hrd,lhd->hrl", q, k) * case.scale / math.log(2)
        mass = (logits - lse[row, :, : count * group, None].double()).exp2().sum(1)
        mass = pool_heads(mass) if pooled else mass
        steps = 16 if DEVICE == "cuda" else 1
        assert (codes[row, :, :own] - codes_of(mass)).abs().max() <= steps
        # Against unrounded q and K: 1.5 nats of spread a logit, of which 8 bits lose about 1 %.
        exact = pool_heads(case.scores(row)) if pooled else case.scores(row)
        assert (mass / exact - 1).abs().max() < 0.1


def test_eight_bit_takes_any_layout_of_the_scales() -> None:
    case = TileCase.make([(96, 160)])
    copy, lse = copy_of(case), case.lse(BUDGET)
    turned = KeyCopy(copy.values, copy.scales.t().contiguous().t())
    assert torch.equal(score(case, lse, copy), score(case, lse, turned))


def test_zero_queries() -> None:
    """All keys weigh the same, and nothing divides by a scale of zero."""
    case = TileCase.make([(96, 128)])
    case.q.zero_()
    check_codes(case, score(case), steps=1)
    check_codes(case, score(case, keys=copy_of(case)), steps=1)


@pytest.mark.parametrize(
    "kind, group", [("exact", 1), ("exact", 4), ("pooled", 4), ("eight_bit", 2)]
)
def test_rows_do_not_depend_on_the_batch(kind: str, group: int) -> None:
    """Same bits alone, reversed, and between rows of other requests."""
    case = TileCase.make([(110, 193), (0, 161)], group=group)
    copy = copy_of(case) if kind == "eight_bit" else None
    lse = case.lse(BUDGET, stride=4)
    codes = score(case, lse, copy, pooled=kind == "pooled")
    count = len(case.places)
    mixed = [row // 2 + row % 2 * (count // 2) for row in range(count)]
    for chosen in [list(range(count))[::-1], mixed, [2], [count - 1]]:
        part = case.only(chosen)
        part_lse = part.lse(BUDGET, stride=4)
        part_codes = score(part, part_lse, copy, pooled=kind == "pooled")
        for place, row in enumerate(chosen):
            if not case.is_dense(row, BUDGET):
                assert torch.equal(part_lse[place], lse[row])
            assert torch.equal(part_codes[place], codes[row])


def test_heads_of_one_row_may_ask_for_lists_of_different_lengths() -> None:
    """A head whose list holds all candidates gets no scores; the other's do not change."""
    case = TileCase.make([(96, 160)])
    lists, whole = case.lists(BUDGET), case.lse(BUDGET)
    lists.counts[:, 0] = torch.tensor([96, 128])
    lse = torch.full_like(whole, UNTOUCHED)
    where = (case.req_to_token, case.rows, lists)
    tile_lse(case.q, case.k, *where, case.scale, out=lse)
    assert (lse[:, 0] == UNTOUCHED).all() and torch.equal(lse[:, 1], whole[:, 1])
    out = torch.full((2, 2, case.req_to_token.shape[1]), UNTOUCHED, device=DEVICE)
    out = out.to(torch.uint16)
    tile_scores(case.q, case.k, *where, whole, case.scale, out=out)
    assert (out[:, 0].long() == UNTOUCHED).all()
    assert torch.equal(out[:, 1].long(), score(case, whole)[:, 1])


def test_large_logits_stay_finite() -> None:
    case = TileCase.make([(96, 140)], spread=300.0)
    lse = case.lse(BUDGET)
    assert not lse[0].isnan().any()
    check_codes(case, score(case, lse), steps=40)


def test_refusals() -> None:
    case = TileCase.make([(96, 128)])
    out = torch.zeros(1, 2, 128, dtype=torch.uint16, device=DEVICE)
    lse = torch.zeros(1, 2, 128, device=DEVICE)

    def run(lse: torch.Tensor = lse, **changes: object) -> None:
        arguments = {"q": case.q, "keys": case.k, "rows": case.rows, "out": out} | changes
        arguments = {"lists": case.lists(BUDGET)} | arguments
        tile_scores(req_to_token=case.req_to_token, lse=lse, scale=1.0, **arguments)

    with pytest.raises(ValueError, match=r"lse: expected shape \[1, 2, 128\], got \[1, 2, 64\]"):
        run(lse=lse[:, :, :64])
    with pytest.raises(ValueError, match="out: expected uint16, got int32"):
        run(out=out.to(torch.int32))
    with pytest.raises(ValueError, match=r"out: expected shape \[1, 1, any\]"):
        run(pooled=True)
    with pytest.raises(
        ValueError, match="keys: expected float16 or float8_e4m3fn or float8_e5m2, got float32"
    ):
        run(keys=case.k.float())
    with pytest.raises(ValueError, match="rows: expected starts and tokens"):
        run(rows=Rows(case.rows.requests, case.rows.ends))
    with pytest.raises(ValueError, match="lists: expected 2 a row, got 1"):
        run(lists=case.lists(BUDGET, 1))
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, got 7"):
        run(q=case.q[:, :7])
    with pytest.raises(
        ValueError, match="q: expected a power of two from 16 on as head dimension, got 24"
    ):
        run(q=case.q[..., :24], keys=case.k[..., :24])
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        case.lse(BUDGET, stride=0)
