"""Candidate pools: what anchors after a maker select, and what it does not depend on."""

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_kernels.reference import tile_scores
from kascade_kernels.structs import Lists
from kascade_sglang.asks import EVERYTHING, Ask
from kascade_sglang.errors import KascadeError
from tests.support.harness import DEVICE, HEAD_DIM, Harness, expected_output
from tests.support.shapes import INTERPRETED

KERNELS = DEVICE == "cuda" or INTERPRETED
LONG = 173
PLAN = {"layers": 5, "anchors": (0, 1, 2, 4), "makers": (1,), "pool_share": 0.3}
"""Layer 1 makes pools, for layers 2 and 4; layer 3 reuses what 2 selects."""


def decoded(lengths: list[int], count: int = 2, **options: object) -> Harness:
    """Requests whose last tokens were decoded together, the others prefilled."""
    harness = Harness(lengths, **{**PLAN, **options})
    for request, length in enumerate(lengths):
        harness.step([(request, 0, length - count)])
    for back in range(count, 0, -1):
        harness.step([(n, length - back, length - back + 1) for n, length in enumerate(lengths)])
    return harness


def scores_of(harness: Harness, layer: int, position: int) -> torch.Tensor:
    q, k, _ = harness.kept(layer, 0)
    return tile_scores(q[position : position + 1], k[: position + 1], HEAD_DIM**-0.5)


def pools_of(harness: Harness, layer: int, position: int) -> torch.Tensor:
    """Positions of the pool that each head of a layer scored for request 0 in the last step."""
    pool, head_map = harness.backend.paths.store.pool_of(layer)
    count = harness.config.pool_rule.pooled(position // 32, harness.config.budget)
    if isinstance(pool, Lists):
        slots = torch.stack([pool.slots[at : at + count] for at in pool.offsets[0].tolist()])
    else:
        slots = pool[0]
    assert slots.shape[1] == count
    table = harness.req_to_token[1, : position + 1]
    where = (slots[head_map.long()].unsqueeze(2) == table).nonzero()
    return where[:, 2].view(-1, count).cpu()


def pool_scores(harness: Harness, layer: int, position: int) -> torch.Tensor:
    """Float64 scores [H, candidates] of the keys in a layer's pool; others have -1."""
    q, k, _ = harness.kept(layer, 0)
    candidates, group = position // 32 * 32, harness.group
    found = torch.full((2, candidates), -1.0, dtype=torch.float64)
    for head, pool in enumerate(pools_of(harness, layer, position)):
        kept = torch.cat([pool, torch.arange(candidates, position + 1)])
        queries = q[position : position + 1, head * group : (head + 1) * group]
        found[head, pool] = tile_scores(queries, k[kept][:, head : head + 1], HEAD_DIM**-0.5)[0]
    return found.sum(0, keepdim=True).expand(2, -1) if harness.config.pooled else found


@pytest.mark.parametrize("heads", ["per_head", "pooled"])
@pytest.mark.parametrize("group", [1, 4])
def test_pooled_anchors_take_the_best_of_the_pool(heads: str, group: int) -> None:
    harness, last = decoded([LONG, 70, 33], heads=heads, group=group), LONG - 1
    rtol, pooled = 2e-3 if KERNELS else 1e-6, heads == "pooled"
    made = scores_of(harness, 1, last)
    for layer in (2, 4):
        head_map = [0, 1] if pooled else list(harness.config.plan.head_map[layer])
        pools = pools_of(harness, layer, last)
        ranked = made.sum(0, keepdim=True).expand(2, -1) if pooled else made[head_map]
        chosen = harness.selections[layer][0][last // 32, last]
        for scores, taken in ((ranked, pools), (pool_scores(harness, layer, last), chosen)):
            best = scores.topk(taken.shape[1], dim=1).values.sum(1)
            kept = scores.gather(1, taken).sum(1)
            assert (taken.diff(dim=1) > 0).all()
            torch.testing.assert_close(kept, best, rtol=rtol, atol=1e-9)
        whole = scores_of(harness, layer, last)
        # The pool lacks some of the best of all keys.
        assert whole.gather(1, chosen).sum() < whole.topk(chosen.shape[1]).values.sum()


def test_outputs_equal_float64_attention() -> None:
    harness = decoded([LONG, 70])
    for layer in range(harness.layers):
        expected = expected_output(harness, layer, 0)[-2:]
        out = harness.outputs[layer][0][-2:].double().cpu()
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


def same(left: Harness, right: Harness, request: int = 0, other: int = 0) -> bool:
    """Whether sparse layers of two harnesses give a request's last two tokens the same bits."""
    return all(
        torch.equal(left.outputs[layer][request][-2:], right.outputs[layer][other][-2:])
        for layer in range(1, left.layers)
    )


def test_pools_of_all_keys_change_nothing() -> None:
    whole = decoded([LONG], makers=())
    assert same(decoded([LONG], pool_share=0.999), whole)
    assert same(decoded([LONG], makers=(0, 1, 2, 4)), whole)
    assert not same(decoded([LONG]), whole)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "default"])
def test_pools_depend_on_the_row_alone(exact: bool) -> None:
    """Not on company, slots, page size, or on how many rows are scored together."""
    options = {"batch_invariant": True, "exact": exact}
    elsewhere = {"page_size": 32, "slot_seed": 3, "score_memory": 2**13}
    assert same(decoded([LONG], **options), decoded([LONG, 190], **elsewhere, **options))


@pytest.mark.skipif(not KERNELS, reason="chains are decoded by kernels alone")
def test_chains_have_a_pool_for_each_draft() -> None:
    single = decoded([LONG], batch_invariant=True)
    chain = Harness([LONG], chain=2, batch_invariant=True, **PLAN)
    chain.step([(0, 0, LONG - 2)])
    chain.verify([(0, LONG - 2)])
    assert same(single, chain)


def test_requests_may_ask_for_more_and_for_everything() -> None:
    """A request that asked for every key gets them, and the others get what they got before."""
    asking = Harness([LONG, LONG, LONG], max_ratio=0.5, batch_invariant=True, data_seed=1, **PLAN)
    asking.asks = {
        0: Ask(EVERYTHING, EVERYTHING),
        1: Ask(Budget(0.1, 64), Budget(0.5, 64)),
    }
    for request in range(3):
        asking.step([(request, 0, LONG - 2)])
    for at in (LONG - 2, LONG - 1):
        asking.step([(request, at, at + 1) for request in range(3)])
    for layer in range(1, asking.layers):
        counts = [found[(LONG - 1) // 32, LONG - 1].shape[1] for found in asking.selections[layer]]
        assert counts == [160, 64, 32]
        everything = expected_output(asking, layer, 0)[-2:]
        out = asking.outputs[layer][0][-2:].double().cpu()
        torch.testing.assert_close(out, everything, rtol=2e-3, atol=2e-3)
    usual = Harness([LONG, LONG, LONG], batch_invariant=True, data_seed=1, **PLAN)
    for begin, end in ((0, LONG - 2), (LONG - 2, LONG - 1), (LONG - 1, LONG)):
        usual.step([(2, begin, end)])
    assert same(asking, usual, 2, 2)


def test_a_pool_never_comes_from_another_step() -> None:
    harness = decoded([LONG])
    store = harness.backend.paths.store
    store.put_pool(1, object())
    store.clear()
    with pytest.raises(KascadeError, match="layer 2 ran before its maker, layer 1"):
        store.pool_of(2)
    assert store.pool_of(1) is None and store.pool_of(0) is None
