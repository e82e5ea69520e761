"""Presets: the paper's anchors, identity head maps, said loudly."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from kascade_sglang.cli import main
from kascade_sglang.plan import library
from kascade_sglang.plan.library import PLAN_NAME, find_plan
from kascade_sglang.plan.presets import preset, preset_for, warning_of
from kascade_sglang.plan.schema import Plan, PlanError, load_plan

NAMES = ["Llama-3.1-8B-Instruct", "DeepSeek-R1-Distill-Llama-8B", "Qwen3-8B"]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_warned", set())


@pytest.mark.parametrize(
    "name, layers, anchors",
    [
        (NAMES[0], 32, (0, 2, 8, 13, 14)),
        (NAMES[1], 32, (0, 2, 8, 13, 14)),
        (NAMES[2], 36, (0, 2, 7, 14, 23)),
    ],
)
def test_anchors_of_the_paper(name: str, layers: int, anchors: tuple[int, ...]) -> None:
    plan = preset(name)
    assert (plan.shape.layers, plan.anchors, plan.shape.kv_heads) == (layers, anchors, 8)
    assert set(plan.head_map.values()) == {tuple(range(8))}
    assert plan == preset(name.upper())


@pytest.mark.parametrize(
    "model",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "/models/llama-3.1-8b-instruct/",
    ],
)
def test_found_by_the_models_name_and_shape(
    model: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    shape = preset(NAMES[0]).shape
    with caplog.at_level(logging.WARNING):
        plan = find_plan(model, shape, None)
        find_plan(model, shape, None)
    assert plan.anchors == (0, 2, 8, 13, 14)
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert "identity head map that nobody has measured" in caplog.text
    assert "kascade calibrate --model M --anchors 0,2,8,13,14" in caplog.text


def test_another_shape_or_name_has_none() -> None:
    shape = preset(NAMES[2]).shape
    assert preset_for("Qwen/Qwen3-8B", replace(shape, layers=12)) is None
    assert preset_for("Qwen/Qwen3-4B", shape) is None
    with pytest.raises(PlanError, match="no Kascade plan for Qwen/Qwen3-4B"):
        find_plan("Qwen/Qwen3-4B", shape, None)


def test_named_by_the_user(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    shape = preset(NAMES[2]).shape
    assert find_plan("my/finetune", shape, "preset:qwen3-8b") == preset(NAMES[2])
    assert "nobody has measured" in caplog.text
    with pytest.raises(PlanError, match="preset: expected one of Llama-3.1-8B-Instruct, .*'x'"):
        find_plan("my/finetune", shape, "preset:x")
    with pytest.raises(PlanError, match="made for another model .Qwen3-8B.: layers is 6"):
        find_plan("my/finetune", plan.shape, "preset:qwen3-8b")


def test_a_plan_beside_the_weights_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / NAMES[2]
    folder.mkdir()
    mine = replace(preset(NAMES[2]), provenance={"source": "measured"})
    mine.save(folder / PLAN_NAME)
    assert find_plan(str(folder), mine.shape, None) == mine
    assert warning_of(mine) is None


@pytest.mark.parametrize("form", ["preset", "file"])
def test_shown_loudly(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset saved as a file says so too."""
    path = f"preset:{NAMES[2]}"
    if form == "file":
        path = str(tmp_path / "plan.json")
        preset(NAMES[2]).save(Path(path))
        assert warning_of(load_plan(Path(path)))
    assert main(["plan", "show", path]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("WARNING") and "nobody has measured" in first
    assert [row.split()[-2:] for row in rest if row.startswith("  8 ")] == [["-", "-"]]


def test_check_names_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "check", f"preset:{NAMES[0]}"]) == 0
    assert "anchors 0,2,8,13,14" in capsys.readouterr().out
    assert main(["plan", "check", "preset:other"]) == 1
