"""Which plans the ablation of anchors compares."""

import numpy as np

from benchmarks import ablations
from kascade_kernels.budget import Budget
from kascade_sglang.calibration.collect import MASS_RATIOS, LayerStats
from kascade_sglang.calibration.run import Measured
from kascade_sglang.plan.schema import ModelShape

LAYERS, HEADS = 12, 2


def measured() -> Measured:
    draw = np.random.default_rng(0)
    similarity = draw.random((LAYERS, LAYERS, HEADS, HEADS))
    stats = LayerStats(
        layers=tuple(range(LAYERS)),
        similarity=similarity,
        pooled=similarity.mean((2, 3)),
        mass=draw.random((len(MASS_RATIOS), LAYERS, HEADS)),
        importance=draw.random(LAYERS),
        error=draw.random((LAYERS, LAYERS)),
        prompts=1,
        tokens=100,
        tiles=3,
        rows=5,
    )
    return Measured(stats, "test", ModelShape(LAYERS, 8, HEADS, 64, 256), Budget(), {}, 3)


def test_every_choice_is_made_at_every_count() -> None:
    found = list(ablations.candidates(measured(), (4, 6), 2, tiles=(8, 64)))
    assert [(one.choice, one.tile) for one in found[:3]] == [
        ("shipped", 32),
        ("shipped", 8),
        ("shipped", 64),
    ]
    assert len({one.name for one in found}) == len(found)
    found = found[2:]
    kinds = [(one.choice, len(one.plan.anchors)) for one in found[1:]]
    expected = ["error", "mass", "even", "random", "random"]
    assert kinds == [(choice, count) for count in (4, 6) for choice in expected]
    assert found[3].plan.anchors == (0, 3, 6, 9)
    assert len({one.plan.anchors for one in found}) == len(found)
    for criterion in ablations.CRITERIA:
        best = {}
        for one in sorted(found[1:], key=lambda one: one.choice != criterion):
            objective = ablations.objectives(measured(), one.plan.anchors)[criterion]
            best.setdefault(len(one.plan.anchors), objective)
            assert objective <= best[len(one.plan.anchors)], "a programme's objective is greatest"
