"""Counters of key reads against a loop over layers, queries and keys."""

import numpy as np
import pytest

from harness import make_plan
from kascade_kernels.budget import Budget
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
