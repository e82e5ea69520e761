"""Where a plan is looked for, and in what order."""

from dataclasses import replace
from pathlib import Path

import pytest

from kascade_sglang.plan import library
from kascade_sglang.plan.library import PLAN_NAME, find_plan
from kascade_sglang.plan.presets import preset
from kascade_sglang.plan.schema import ModelShape, Plan, PlanError


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(library, "SHIPPED", folder)
    return folder


def test_order_explicit_then_beside_then_shipped(plan: Plan, tmp_path: Path, shipped: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    replace(plan, model=str(model), heads="per_head").save(shipped / "a.json")
    assert find_plan(str(model), plan.shape, None).heads == "per_head"
    replace(plan, provenance={"from": "beside"}).save(model / PLAN_NAME)
    assert find_plan(str(model), plan.shape, None).provenance == {"from": "beside"}
    explicit = tmp_path / "mine.json"
    replace(plan, provenance={"from": "flag"}).save(explicit)
    assert find_plan(str(model), plan.shape, str(explicit)).provenance == {"from": "flag"}


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "/models/qwen3-8b/"])
def test_a_shipped_plan_comes_before_a_preset(model: str, shipped: Path) -> None:
    """Found as the preset is: by the last part of the name, and by the shape."""
    known = preset("Qwen3-8B")
    measured = replace(known, model="Qwen/Qwen3-8B", provenance={"from": "shipped"})
    measured.save(shipped / "b.json")
    smaller = replace(known.shape, hidden=2048)
    replace(measured, shape=smaller, provenance={"from": "a smaller one"}).save(shipped / "a.json")
    assert find_plan(model, known.shape, None).provenance == {"from": "shipped"}
    assert find_plan(model, smaller, None).provenance == {"from": "a smaller one"}
    with pytest.raises(PlanError, match="no Kascade plan"):
        find_plan(model, replace(known.shape, hidden=1024), None)


def test_none_says_how_to_calibrate(plan: Plan, shipped: Path) -> None:
    plan.save(shipped / "a.json")
    with pytest.raises(PlanError, match="no Kascade plan for org/other: .*kascade calibrate"):
        find_plan("org/other", plan.shape, None)


@pytest.mark.parametrize("place", ["explicit", "beside"])
def test_a_plan_of_another_shape_is_refused(plan: Plan, tmp_path: Path, place: str) -> None:
    path = {"explicit": tmp_path / "p.json", "beside": tmp_path / PLAN_NAME}[place]
    replace(plan, model=str(tmp_path)).save(path)
    explicit = str(path) if place == "explicit" else None
    with pytest.raises(PlanError, match="hidden is 95, the plan has 96"):
        find_plan(str(tmp_path), replace(plan.shape, hidden=95), explicit)


def test_shipped_plans_load() -> None:
    package = Path(library.__file__).parents[1]
    plans = [*library.SHIPPED.glob("*.json"), package / "demo" / "model" / PLAN_NAME]
    for path in plans:
        assert library.load_plan(path).anchors[0] == 0


def test_shipped_plans_are_found_by_the_models_name() -> None:
    shape = ModelShape(layers=24, q_heads=14, kv_heads=2, head_dim=64, hidden=896)
    plan = find_plan("Qwen/Qwen2.5-Coder-0.5B-Instruct", shape, None)
    assert plan.anchors == (0, 3, 9, 13, 21) and plan.provenance["source"] == "kascade calibrate"
