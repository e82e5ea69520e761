"""``kascade plan diff``, and what head maps within a rank cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kascade_kernels.budget import Budget
from kascade_sglang.cli import main
from kascade_sglang.plan.diff import differences
from kascade_sglang.plan.ranks import RankLoss, rank_losses
from kascade_sglang.plan.schema import ModelShape, Plan, PlanError, plan_from_json


def test_equal_plans_differ_in_nothing(
    plan: Plan, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(plan, plan) == []
    assert main(["plan", "diff", str(plan_file), str(plan_file)]) == 0
    assert capsys.readouterr().out == f"same: {plan_file} and {plan_file}\n"


def test_every_difference_has_a_line(plan: Plan) -> None:
    nudged = tuple(tuple(value / 2 for value in row) for row in plan.similarity[3])
    swapped = plan.similarity[1][::-1]
    other = replace(
        plan,
        model="org/other",
        anchors=(0, 2, 4),
        similarity={1: swapped, 3: nudged, 5: plan.similarity[5]},
        budget=Budget(0.1, 256),
        heads="per_head",
        provenance={"source": "by hand", "seed": 3, "importance": [1.0]},
    )
    rows = [line.split() for line in differences(plan, other)]
    assert rows == [
        ["model", "org/tiny", "|", "org/other"],
        ["anchors", "0,2", "|", "0,2,4"],
        ["topk_ratio", "0.2", "|", "0.1"],
        ["heads", "pooled", "|", "per_head"],
        *[line.split() for line in ("layer 1 head map 2 0 1 | 1 0 2",
                                    "layer 1 similarities differ by up to 0.650000",
                                    "layer 3 similarities differ by up to 0.450000",
                                    "layer 4 reuses 2 | anchor",
                                    "layer 5 reuses 2 | reuses 4",
                                    "importance differs",
                                    "seed - | 3")],
    ]  # fmt: skip


def test_plans_of_other_models(plan: Plan) -> None:
    lines = differences(plan, Plan("one", ModelShape(1, 1, 1, 8, 8), (0,), {}))
    assert any(line.split() == ["layers", "6", "|", "1"] for line in lines)


def test_diff_exits_1(plan: Plan, plan_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    replace(plan, heads="per_head").save(other)
    assert main(["plan", "diff", str(plan_file), str(other)]) == 1
    assert main(["plan", "diff", "preset:Qwen3-8B", str(tmp_path / "none.json")]) == 1


def test_rank_losses_by_hand() -> None:
    """Four heads at two ranks: heads 0 and 3 stay, 1 loses 0.3, 2 loses 0.5."""
    rows = (
        (0.9, 0.5, 0.1, 0.2),
        (0.4, 0.5, 0.8, 0.2),
        (0.9, 0.1, 0.4, 0.3),
        (0.1, 0.1, 0.1, 0.7),
    )
    shape = ModelShape(layers=2, q_heads=4, kv_heads=4, head_dim=8, hidden=32)
    two, four = rank_losses(Plan("x", shape, (0,), {1: rows}))
    assert two == RankLoss(2, 0.5, pytest.approx(0.2), pytest.approx(0.5))
    # At four ranks every head has its own anchor head only.
    own = np.diag(rows)
    lost = np.max(rows, axis=1) - own
    assert four == RankLoss(4, 0.5, pytest.approx(lost.mean()), pytest.approx(lost.max()))


def test_no_ranks_divide_three_heads_and_no_layer_reuses(plan: Plan) -> None:
    assert rank_losses(plan) == []
    assert rank_losses(Plan("one", ModelShape(1, 8, 8, 8, 8), (0,), {})) == []


WINDOWED = ModelShape(layers=4, q_heads=2, kv_heads=1, head_dim=8, hidden=16)


def test_windowed_plan_round_trip() -> None:
    plan = Plan("g", WINDOWED, (1,), {3: ((0.5,),)}, windowed=(0, 2))
    assert plan_from_json(plan.to_json()) == plan
    assert plan.anchor_of == (0, 1, 2, 1)


@pytest.mark.parametrize(
    "anchors, windowed, sentence",
    [
        ((0,), (0, 2), r"plan.anchors: expected ascending layers from 1, got \[0\]"),
        ((1, 2), (0, 2), r"plan.anchors: layers \[2\] have a sliding window"),
        ((0,), (1, 4), "plan.windowed: expected some, not all, of the layers 0 to 3"),
        ((0,), (2, 1), "plan.windowed: expected some"),
        ((0,), (0, 1, 2, 3), "plan.windowed: expected some, not all"),
    ],
)
def test_refuses_wrong_windows(anchors: tuple, windowed: tuple, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        Plan("g", WINDOWED, anchors, {3: ((0.5,),)}, windowed=windowed)
