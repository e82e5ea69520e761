"""Where a plan is looked for, and in what order."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

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
    assert plan.shape.layers == 24 and plan.provenance["source"] == "kascade calibrate"


NAMES = {
    "Qwen/Qwen3-8B-FP8": True,
    "RedHatAI/Qwen3-8B-FP8-dynamic": True,
    "Qwen/Qwen3-8B-AWQ": True,
    "JunHowie/Qwen3-8B-GPTQ-Int4": True,
    "RedHatAI/Qwen3-8B-quantized.w4a16": True,
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": True,
    "Qwen3-8B-Q4_K_M.gguf": True,
    "/cache/models--Qwen--Qwen3-8B/snapshots/0123abcd": True,
    "/cache/models--Qwen--Qwen3-8B/snapshots/0123abcd/": True,
    "/cache/models--Qwen--Qwen3-8B-FP8/snapshots/0123abcd": True,
    "Qwen/Qwen3-8B-Base": False,
    "Qwen/Qwen3-8B-abliterated": False,
    "Qwen/Qwen3-14B-FP8": False,
    "/cache/models--Qwen--Qwen3-14B/snapshots/0123abcd": False,
    "/snapshots/qwen3-8b-fp9": False,
    "": False,
    "/": False,
}


@pytest.mark.parametrize(("model", "found"), NAMES.items(), ids=[name or "-" for name in NAMES])
def test_names_under_which_a_preset_is_found(model: str, found: bool, shipped: Path) -> None:
    known = preset("Qwen3-8B")
    if found:
        assert find_plan(model, known.shape, None) == known
    else:
        with pytest.raises(PlanError, match="no Kascade plan for .* --kascade-plan preset:Qwen3"):
            find_plan(model, known.shape, None)


def test_links_and_the_current_folder(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = preset("Qwen3-8B")
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (tmp_path / "current").symlink_to(folder)
    assert find_plan(str(tmp_path / "current"), known.shape, None) == known
    monkeypatch.chdir(folder)
    assert find_plan(".", known.shape, None) == known


def test_all_that_fits_by_shape_is_offered(shipped: Path) -> None:
    known = preset("Llama-3.1-8B-Instruct")
    replace(known, model="org/other").save(shipped / "other.json")
    with pytest.raises(PlanError) as refused:
        find_plan("my/finetune", known.shape, None)
    offered = f"{shipped / 'other.json'} or preset:Llama-3.1-8B-Instruct or preset:DeepSeek-R1"
    assert f"if it is one of these, --kascade-plan {offered}" in str(refused.value)


def test_the_plan_of_a_hub_id_is_found_in_the_cache(
    plan: Plan, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match="no Kascade plan for org/model"):
        find_plan("org/model", plan.shape, None)
    plan.save(snapshot / PLAN_NAME)
    assert find_plan("org/model", plan.shape, None) == plan
    assert find_plan(str(snapshot), plan.shape, None) == plan


@pytest.mark.parametrize("model", ["a/b/c", "..", "../x", "--bad--", "a b", "x" * 500, "\0"])
def test_what_is_no_name_at_all_is_refused(model: str, plan: Plan, shipped: Path) -> None:
    with pytest.raises(PlanError, match="no Kascade plan"):
        find_plan(model, plan.shape, None)
