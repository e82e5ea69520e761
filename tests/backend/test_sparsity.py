"""Counters of key reads against a loop over layers, queries and keys."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import make_plan
from kascade_kernels.budget import Budget
from kascade_sglang.backend.metrics import KEY_READS, KINDS, KeyCounter
from kascade_sglang.backend.selectors import SELECTORS
from kascade_sglang.config import KascadeConfig, every_layer_an_anchor
from kascade_sglang.sparsity import key_reads

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


def counted(counter: KeyCounter, phase: str, batch: SimpleNamespace) -> list[float]:
    """What one batch adds to the published counters."""
    children = [KEY_READS.labels(phase, kind) for kind in KINDS]
    before = [child._value.get() for child in children]
    batch.forward_mode = SimpleNamespace(is_decode=lambda: phase == "decode")
    counter.add(batch)
    return [child._value.get() - old for child, old in zip(children, before, strict=True)]


def test_counters_grow_by_the_reads_of_a_step() -> None:
    config = KascadeConfig(
        make_plan(layers=4, kv_heads=2, group=4, anchors=(0, 2)), Budget(0.1, 64), "per_head"
    )
    counter = KeyCounter(config, range(4), context=1024)

    def expected(positions: list[int]) -> list[int]:
        reads = key_reads(config, np.array(positions, dtype=np.int64))
        return [getattr(reads, kind) for kind in KINDS]

    decode = SimpleNamespace(seq_lens_cpu=torch.tensor([1024, 33, 1, 1]), num_padding=2)
    assert counted(counter, "decode", decode) == expected([1023, 32])
    extend = SimpleNamespace(extend_prefix_lens_cpu=[0, 500], extend_seq_lens_cpu=[70, 3])
    assert counted(counter, "prefill", extend) == expected([*range(70), 500, 501, 502])
    extend = SimpleNamespace(extend_prefix_lens_cpu=[], extend_seq_lens_cpu=[])
    assert counted(counter, "prefill", extend) == [0, 0, 0]
