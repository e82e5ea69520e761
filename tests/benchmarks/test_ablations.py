"""Which plans the ablation of anchors compares."""

import numpy as np

from benchmarks import ablations
from kascade_kernels.budget import Budget
from kascade_sglang.calibration.anchors import AnchorChoice
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
        prompts=1,
        tokens=100,
        tiles=3,
    )
    choices = [AnchorChoice((0, *range(LAYERS - left, LAYERS)), 0.1) for left in range(LAYERS)]
    shape = ModelShape(LAYERS, 8, HEADS, 64, 256)
    return Measured(stats, choices, [], "test", shape, Budget(), {})


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
    expected = ["kl", "mass", "even", "random", "random"]
    assert kinds == [(choice, count) for count in (4, 6) for choice in expected]
    assert found[3].plan.anchors == (0, 3, 6, 9)
    assert len({one.plan.anchors for one in found}) == len(found)
    best = {}
    for one in sorted(found[1:], key=lambda one: one.choice != "mass"):
        if one.choice != "kl":
            objective = one.plan.provenance["objective"]
            best.setdefault(len(one.plan.anchors), objective)
            assert objective <= best[len(one.plan.anchors)], "a programme's objective is greatest"
