"""The oracle against formulas written as loops over queries, heads and keys in float64."""

import math

import pytest
import torch
from torch.nn import functional

from kascade_kernels.budget import TILE, Budget
from kascade_kernels.reference import pool_heads, select_topk, tile_attention, tile_scores

SCALE = 0.17
LENGTHS = pytest.mark.parametrize("start", [0, 32, 128])
QUERIES = pytest.mark.parametrize("n", [1, 5, 31, 32])
GROUPS = pytest.mark.parametrize("group", [1, 4, 8])


def draw(
    n: int, length: int, group: int, kv_heads: int = 2, dim: int = 24, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 q [n, Hq, D], k and v [length, H, D]; ``spread`` makes attention uneven."""
    generator = torch.Generator().manual_seed(1000 * n + 10 * length + group)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(
        torch.randn(rows, count, dim, generator=generator, dtype=torch.float64) * spread
        for rows, count in zip((n, length, length), heads, strict=True)
    )


def attention_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: list[int]
) -> tuple[list[float], torch.Tensor]:
    """One query [D] over some keys of one head: its probabilities and output, by the formula."""
    exponents = [math.exp(float(q @ k[key]) * SCALE) for key in keys]
    total = sum(exponents)
    weights = [exponent / total for exponent in exponents]
    return weights, sum(weight * v[key] for weight, key in zip(weights, keys, strict=True))


@LENGTHS
@QUERIES
@GROUPS
def test_tile_scores(start: int, n: int, group: int) -> None:
    length = start + n
    q, k, v = draw(n, length, group)
    expected = torch.zeros(2, start, dtype=torch.float64)
    for head in range(2):
        for query in range(n):
            for member in range(group):
                row = q[query, head * group + member]
                seen = list(range(start + query + 1))
                weights, _ = attention_row(row, k[:, head], v[:, head], seen)
                expected[head] += torch.tensor(weights[:start], dtype=torch.float64)
    torch.testing.assert_close(tile_scores(q, k, SCALE), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("position", [32, 36, 63, 64])
def test_one_query_within_a_tile_scores_the_keys_before_the_tile(position: int) -> None:
    """Decoding: the own tile's earlier keys take mass and are not candidates."""
    q, k, v = draw(1, position + 1, 4)
    scores = tile_scores(q, k, SCALE)
    assert scores.shape == (2, position // TILE * TILE)
    weights, _ = attention_row(q[0, 5], k[:, 1], v[:, 1], list(range(position + 1)))
    one_head = tile_scores(q[:, 5:6], k[:, 1:], SCALE)
    assert one_head[0].tolist() == pytest.approx(weights[: scores.shape[1]], abs=1e-12)


@LENGTHS
@QUERIES
@GROUPS
def test_sparse_attention(start: int, n: int, group: int) -> None:
    q, k, v = draw(n, start + n, group)
    generator = torch.Generator().manual_seed(start)
    count = start // 3
    selected = torch.stack([torch.randperm(start, generator=generator)[:count] for _ in range(2)])
    found = tile_attention(q, k, v, selected, torch.arange(start, start + n), SCALE)
    for query in range(n):
        for q_head in range(2 * group):
            head = q_head // group
            keys = selected[head].tolist() + list(range(start, start + query + 1))
            _, expected = attention_row(q[query, q_head], k[:, head], v[:, head], keys)
            torch.testing.assert_close(found[query, q_head], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n, own", [(1, 1), (1, 20), (3, 20), (12, 32)])
def test_queries_at_the_end_of_their_tile(n: int, own: int) -> None:
    """Queries after the tile's first (decoding) see the own keys before them."""
    start = 64
    q, k, v = draw(n, start + own, 4)
    selected = torch.tensor([[1, 5, 63], [0, 2, 3]])
    found = tile_attention(q, k, v, selected, torch.arange(start, start + own), SCALE)
    for query in range(n):
        seen = list(range(start, start + own - n + query + 1))
        _, expected = attention_row(q[query, 0], k[:, 0], v[:, 0], [1, 5, 63, *seen])
        torch.testing.assert_close(found[query, 0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 5, 32])
def test_slots_may_lie_anywhere(n: int) -> None:
    """A shuffled pool with other requests' keys in it gives the same bits."""
    length = 96 + n
    q, k, v = (tensor.float() for tensor in draw(n, length, 4))
    selected, own = torch.tensor([[3, 8, 95], [0, 1, 90]]), torch.arange(96, length)
    slots = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:length]
    pool_k, pool_v = torch.full((2, 500, 2, 24), float("nan"))
    pool_k[slots], pool_v[slots] = k, v
    direct = tile_attention(q, k, v, selected, own, SCALE)
    paged = tile_attention(q, pool_k, pool_v, slots[selected], slots[own], SCALE)
    assert torch.equal(direct, paged)


@QUERIES
@GROUPS
def test_budget_of_everything_equals_sdpa(n: int, group: int) -> None:
    start = 96
    q, k, v = draw(n, start + n, group)
    everything = select_topk(tile_scores(q, k, SCALE), Budget(1.0).selected(start // TILE))
    assert torch.equal(everything, torch.arange(start).expand(2, -1))
    found = tile_attention(q, k, v, everything, torch.arange(start, start + n), SCALE)
    mask = torch.ones(n, start + n, dtype=torch.bool).tril(start)
    expected = functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1) for tensor in (q, k, v)),
        attn_mask=mask,
        scale=SCALE,
        enable_gqa=True,
    ).transpose(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "scores, count, expected",
    [
        ([[1.0, 3.0, 2.0, 3.0]], 2, [[1, 3]]),
        ([[2.0, 2.0, 2.0, 2.0]], 3, [[0, 1, 2]]),
        ([[0.0, 5.0, 1.0, 1.0, 1.0]], 3, [[1, 2, 3]]),
        ([[0.0, -0.0, 0.0]], 2, [[0, 1]]),
        ([[1.0, 2.0], [2.0, 1.0]], 1, [[1], [0]]),
        ([[1.0, 2.0]], 0, [[]]),
        ([[]], 0, [[]]),
        ([[3.0, 1.0]], 2, [[0, 1]]),
    ],
    ids=["ascending", "all-tied", "tied-edge", "signed-zero", "per-row", "none", "empty", "all"],
)
def test_select_topk(scores: list, count: int, expected: list) -> None:
    found = select_topk(torch.tensor(scores), count)
    assert found.dtype == torch.int64 and found.tolist() == expected


@pytest.mark.parametrize("count", [1, 63, 500, 999])
def test_select_topk_many_ties(count: int) -> None:
    """Ten distinct scores over 1000 keys: compare with sorting by (-score, position)."""
    scores = torch.randint(0, 10, (3, 1000), generator=torch.Generator().manual_seed(2)).float()
    for row, found in zip(scores.tolist(), select_topk(scores, count).tolist(), strict=True):
        order = sorted(range(1000), key=lambda position: (-row[position], position))
        assert found == sorted(order[:count])


def test_select_topk_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="count: expected at most 3 candidates, got 4"):
        select_topk(torch.zeros(1, 3), 4)


def test_pool_heads_sums_over_kv_heads() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 5.0]])
    assert pool_heads(scores).tolist() == [[5.0, 2.0, 5.0]]


@pytest.mark.parametrize("group", [1, 4])
def test_scores_and_own_mass_sum_to_one_per_query(group: int) -> None:
    q, k, _ = draw(32, 160, group)
    total = tile_scores(q, k, SCALE).sum(-1)
    assert (total > 0).all() and (total < 32 * group).all()
    # Own keys far away leave all of the mass to the candidates.
    k[128:] = -1000 * q.mean(1, keepdim=True).mean(0)
    q = q.mean((0, 1), keepdim=True).expand(32, 2 * group, -1)
    torch.testing.assert_close(
        tile_scores(q, k, SCALE).sum(-1), torch.full((2,), 32.0 * group).double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in draw(5, 101, 4))
    scores = tile_scores(q, k, SCALE)
    assert scores.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    out = tile_attention(q, k, v, select_topk(scores, 10), torch.arange(96, 101), SCALE)
    assert out.dtype == dtype and out.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_err_no_more_than_eager_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (tensor.to(dtype) for tensor in draw(32, 160, 4, dim=64, spread=1.5))
    selected, own = torch.arange(128).expand(2, -1), torch.arange(128, 160)
    exact = tile_attention(q.double(), k.double(), v.double(), selected, own, SCALE)
    found = tile_attention(q, k, v, selected, own, SCALE)

    keys, values = (tensor.repeat_interleave(4, 1) for tensor in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, keys) * SCALE
    hidden = torch.ones(32, 160, dtype=torch.bool).tril(128).logical_not()
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    eager = torch.einsum("hqk,khd->qhd", weights, values)
    assert (found.double() - exact).abs().max() <= (eager.double() - exact).abs().max()

    exact_scores = tile_scores(q.double(), k.double(), SCALE)
    eager_scores = weights[:, :, :128].unflatten(0, (2, 4)).sum((1, 2)).double()
    found_error = (tile_scores(q, k, SCALE).double() - exact_scores).abs().max()
    assert found_error < (eager_scores - exact_scores).abs().max() / 10


def test_tiles_of_one_request_do_not_depend_on_what_follows() -> None:
    """The same tile from a longer request (a cold prefill) and cut off at its end: same bits."""
    q, k, v = (tensor.float() for tensor in draw(160, 160, 4))
    whole = [tile_scores(q[s : s + 32], k[: s + 32], SCALE) for s in range(0, 160, 32)]
    # Other keys after the tile, as another chunking or batch would hold them.
    k2, v2 = k.clone(), v.clone()
    k2[96:], v2[96:] = float("nan"), float("nan")
    for tile in range(3):
        end = TILE * (tile + 1)
        queries, own = q[end - TILE : end], torch.arange(end - TILE, end)
        assert torch.equal(tile_scores(queries, k2[:end], SCALE), whole[tile])
        selected = select_topk(whole[tile], TILE * tile // 2)
        cold = tile_attention(queries, k, v, selected, own, SCALE)
        assert torch.equal(tile_attention(queries, k2, v2, selected, own, SCALE), cold)


@pytest.mark.parametrize("magnitude", [30.0, 1e3])
def test_large_logits_stay_finite(magnitude: float) -> None:
    q, k, v = (tensor.float() for tensor in draw(5, 69, 4, spread=magnitude))
    scores = tile_scores(q, k, 1.0)
    out = tile_attention(q, k, v, select_topk(scores, 7), torch.arange(64, 69), 1.0)
    assert scores.isfinite().all() and out.isfinite().all()
