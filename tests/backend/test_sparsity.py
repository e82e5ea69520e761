"""Counters of key reads against a loop over layers, queries and keys."""

import numpy as np
import pytest
import torch

from kascade_kernels.budget import Budget, PoolRule
from kascade_sglang.asks import EVERYTHING
from kascade_sglang.backend.key_counter import (
    BUCKETS,
    KEY_READS,
    KINDS,
    LIST_LENGTHS,
    STEPS,
    KeyCounter,
)
from kascade_sglang.backend.selectors import SELECTORS
from kascade_sglang.config import KascadeConfig, every_layer_an_anchor
from kascade_sglang.host.steps import Batch
from kascade_sglang.sparsity import key_reads, reads_by_query
from tests.support.harness import make_plan

POSITIONS = np.array([*range(40, 300), 5, 95, 95, 700])
"""Of several requests: two of them decode at the same position."""


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize("layers", [None, range(2, 4)], ids=["all-layers", "a-stage"])
def test_key_reads(method: str, layers: range | None) -> None:
    plan = make_plan(layers=4, kv_heads=2, group=4, anchors=(0, 2))
    plan = every_layer_an_anchor(plan) if method == "quest" else plan
    budget = Budget(0.1, 64)
    reads = key_reads(KascadeConfig(plan, budget, "per_head", selection=method), POSITIONS, layers)
    attended = scored = dense = 0
    for layer in layers or range(4):
        for position in map(int, POSITIONS):
            before = position // 32 * 32
            dense += position + 1
            attended += position + 1 if layer == 0 else budget.attended(position)
            if budget.is_dense(position // 32) or layer not in plan.anchors:
                continue
            if method == "quest":
                scored += 2 * (before // 16)
            elif method not in ("window", "random"):
                scored += position + 1
    assert (reads.attended, reads.scored, reads.dense) == (attended, scored, dense)


def batch_of(ends: list[int], prefixes: list[int] | None, chain: int = 1) -> Batch:
    """Lengths of a batch; decoding has no prefixes, and 2 of its requests pad it."""
    unread, padding = torch.empty(0), 2 if prefixes is None else 0
    ends_cpu = np.array(ends, dtype=np.int64)
    of_host = (ends_cpu, prefixes, padding)
    return Batch(prefixes is None, unread, unread, unread, *of_host, chain=chain)


def counted(
    counter: KeyCounter, ends: list[int], prefixes: list[int] | None, chain: int = 1
) -> list[float]:
    """What one batch adds to the published counters."""
    phase = "decode" if prefixes is None else "prefill"
    children = [KEY_READS.labels(phase, kind) for kind in KINDS]
    before = [child._value.get() for child in children]
    counter.add(batch_of(ends, prefixes, chain))
    return [child._value.get() - old for child, old in zip(children, before, strict=True)]


def test_counters_grow_by_the_reads_of_a_step() -> None:
    config = KascadeConfig(
        make_plan(layers=4, kv_heads=2, group=4, anchors=(0, 2)), Budget(0.1, 64), "per_head"
    )
    counter = KeyCounter(config, range(4), context=1024)

    def expected(positions: list[int]) -> list[int]:
        reads = key_reads(config, np.array(positions, dtype=np.int64))
        return [getattr(reads, kind) for kind in KINDS]

    assert counted(counter, [1024, 33, 1, 1], None) == expected([1023, 32])
    assert counted(counter, [70, 503], [0, 500]) == expected([*range(70), 500, 501, 502])
    assert counted(counter, [], []) == [0, 0, 0]


def test_every_draft_of_a_chain_is_counted() -> None:
    config = KascadeConfig(make_plan(4, 2, 4, (0, 2)), Budget(0.1, 64), "per_head")
    counter = KeyCounter(config, range(4), context=1024)
    drafts = [98, 99, 100, 255, 256, 257]
    single = counted(counter, [*drafts, 1, 1], None)
    assert counted(counter, [100, 257, 3, 3], None, chain=3) == single


def test_a_dense_prefill_counts_what_it_reads() -> None:
    plan = make_plan(layers=4, kv_heads=2, group=4, anchors=(0, 2))
    config = KascadeConfig(plan, Budget(0.1, 64), "per_head", phases="decode")
    counter = KeyCounter(config, range(4), context=1024)
    attended, scored, dense = counted(counter, [503], [500])
    assert (attended, scored) == (dense, 0) == (4 * (501 + 502 + 503), 0)
    attended, scored, dense = counted(counter, [1024, 1, 1], None)
    assert 0 < attended < dense and scored > 0


def figures(phase: str) -> dict[str, float]:
    """Queries by bucket, and steps by whether they were dense."""
    bounds = (*map(str, BUCKETS), "+Inf")
    lengths = {bound: LIST_LENGTHS.labels(phase, bound)._value.get() for bound in bounds}
    return lengths | {name: STEPS.labels(phase, name)._value.get() for name in ("yes", "no")}


@pytest.mark.parametrize("phases", ["both", "decode"])
@pytest.mark.parametrize(
    ("ends", "prefixes"),
    [
        ([5000, 70, 1, 1], None),
        ([96, 1, 1, 1], None),
        ([128, 64], [0, 40]),
        ([5000, 129, 2560], [4000, 0, 2559]),
        ([4096], [4095]),
        ([], []),
    ],
)
def test_list_lengths_and_dense_steps(
    phases: str, ends: list[int], prefixes: list[int] | None
) -> None:
    plan = make_plan(layers=4, kv_heads=2, group=4, anchors=(0, 2))
    budgets = {"decode": Budget(0.1, 96), "prefill": Budget(0.2, 128)}
    config = KascadeConfig(
        plan, budgets["decode"], "per_head", phases=phases, prefill=budgets["prefill"]
    )
    phase = "decode" if prefixes is None else "prefill"
    before, batch = figures(phase), batch_of(ends, prefixes)
    KeyCounter(config, range(4), context=5000).add(batch)
    grown = {name: value - before[name] for name, value in figures(phase).items()}
    begins, real = batch.spans[0], len(ends) - batch.padding
    tiles = [position // 32 for n in range(real) for position in range(begins[n], ends[n])]
    sparse = phase == "decode" or phases == "both"
    budget = budgets[phase] if sparse else Budget(1.0)
    lengths = np.array([budget.selected(tile) + 32 for tile in tiles])
    expected = {str(bound): (lengths <= bound).sum() for bound in BUCKETS} | {"+Inf": len(tiles)}
    dense = all(map(budget.is_dense, tiles))
    expected |= {"yes": float(bool(tiles) and dense), "no": float(bool(tiles) and not dense)}
    assert grown == expected


def test_requests_that_asked_are_counted_by_their_budgets() -> None:
    plan, own, asked = make_plan(4, 2, 4, (0, 2)), Budget(0.1, 64), Budget(0.5, 64)
    configs = [KascadeConfig(plan, budget, "per_head") for budget in (own, asked, EVERYTHING)]
    counter, unread = KeyCounter(configs[0], range(4), context=1024), torch.empty(0)
    expected = sum(
        np.array([getattr(key_reads(config, np.arange(end)), kind) for kind in KINDS])
        for config, end in zip(configs, (700, 500, 900), strict=True)
    )
    children = [KEY_READS.labels("prefill", kind) for kind in KINDS]
    before = [child._value.get() for child in children]
    ends = np.array([700, 500, 900])
    budgets = (None, asked, EVERYTHING)
    counter.add(Batch(False, unread, unread, unread, ends, [0, 0, 0], budgets=budgets))
    grown = [child._value.get() - old for child, old in zip(children, before, strict=True)]
    assert grown == expected.tolist()


def test_pooled_anchors_score_their_pool_in_decoding() -> None:
    """Of four anchors one scores a pool alone, where the budget leaves a choice."""
    whole, pools = (make_plan(6, 2, 4, (0, 1, 2, 4), makers=makers) for makers in ((), (1, 4)))
    configs = [KascadeConfig(plan, Budget(0.1, 64), "per_head") for plan in (whole, pools)]
    positions = np.array([20, 63, 64, 700, 1000])
    counts = [reads_by_query(config, positions, phase="decode") for config in configs]
    tiles = positions // 32
    pooled = [PoolRule(0.25).pooled(tile, Budget(0.1, 64)) for tile in tiles.tolist()]
    saved = np.where(positions >= 64, 32 * tiles - pooled, 0)
    assert saved.tolist() == [0, 0, 0, 480, 736]
    assert (counts[0] - counts[1]).tolist() == [[0] * 5, saved.tolist(), [0] * 5]
    prefill = [reads_by_query(config, positions, phase="prefill") for config in configs]
    assert (prefill[0] == prefill[1]).all()
