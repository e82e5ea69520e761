"""``kascade plan show | check | import``: output, exit status, one line for every mistake."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kascade_sglang.cli import main
from kascade_sglang.config import without_pools
from kascade_sglang.plan.schema import Plan, load_plan

TABLE = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2], [1, 0, 1], [2, 1, 0], [0, 0, 1]], np.int32)


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    np.save(tmp_path / "Tiny_layers_0_2.npy", TABLE)
    return tmp_path / "Tiny_layers_0_2.npy"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with the plan's shape; no weights are needed."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 6, "num_attention_heads": 12,
              "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 96}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("kascade: ") and "Traceback" not in captured.err
    return lines[-1]


def test_show(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(plan_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["anchors", "0,2"] in rows
    assert ["0", "dense", "0", "-", "0.5000", "-"] in rows
    assert ["2", "anchor", "2", "-", "0.3000", "-"] in rows
    assert ["4", "reuse", "2", "0.900", "0.1000", "1", "2", "2"] in rows
    assert ["source", "by", "hand"] in rows
    assert any("0.2 of the context, at least 256 keys" in line for line in lines)


def test_show_head_map(npy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(npy)]) == 0
    out = capsys.readouterr().out
    assert ["1", "reuse", "0", "-", "-", "2", "2", "0"] in [
        line.split() for line in out.splitlines()
    ]
    assert "? query heads, 3 KV heads" in out


def test_anchors_are_for_head_maps(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(plan_file), "--anchors", "0,3"]) == 1
    assert "a plan file names its own" in error_of(capsys)


@pytest.mark.parametrize("file", ["plan_file", "npy"])
@pytest.mark.parametrize("with_model", [False, True])
def test_check_ok(
    file: str,
    with_model: bool,
    model: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = request.getfixturevalue(file)
    assert main(["plan", "check", str(path), *(["--model", str(model)] * with_model)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok: ") and "6 layers, anchors 0,2" in out
    assert (f"fits {model}" in out) == with_model


@pytest.mark.parametrize("file", ["plan_file", "npy"])
def test_check_another_model(
    file: str, model: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8}))
    path = request.getfixturevalue(file)
    assert main(["plan", "check", str(path), "--model", str(model)]) == 1
    assert "8" in error_of(capsys)


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    "name, content",
    [("p.json", b"{"), ("p.json", b"{}"), ("p_layers_0.npy", b"junk"), ("none.json", None),
     ("p.npy", b"")],
    ids=["cut", "foreign", "npy-junk", "missing", "npy-empty"],
)  # fmt: skip
def test_bad_files_exit_1(
    tmp_path: Path,
    command: str,
    name: str,
    content: bytes | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["plan", command, str(tmp_path / name)]) == 1
    assert name in error_of(capsys)


def test_import(
    npy: Path, model: Path, tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported.json"
    command = ["plan", "import", str(npy), "--model", str(model), "--out", str(out)]
    assert main([*command, "--topk-ratio", "0.2", "--heads", "pooled"]) == 0
    imported = load_plan(out)
    assert imported.shape == plan.shape and imported.anchors == (0, 2)
    assert imported.head_map[3] == (1, 0, 1) and imported.heads == "pooled"
    assert imported.budget.ratio == 0.2
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--topk-ratio", "3"], "topk_ratio: expected"),
        (["--anchors", "0,3"], "layer 3 borrows from other heads"),
        (["--out", "/nowhere/p.json"], "--out /nowhere/p.json: expected a folder that exists"),
        # Before the model is read.
        (["--out", ".", "--model", "/nowhere"], "--out .: expected a file's name, got a folder"),
        (["--out", ""], "expected a file's name, got a folder"),
        (["--out", "/"], "--out /: expected a file's name, got a folder"),
        (["--model", "/nowhere"], "model /nowhere: cannot read its configuration"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_import_refusals(
    npy: Path,
    model: Path,
    tmp_path: Path,
    more: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "imported.json"
    command = ["plan", "import", str(npy), "--model", str(model), "--out", str(out)]
    assert main([*command, *more]) == 1
    assert sentence in error_of(capsys)
    assert not out.exists()


def test_import_keeps_the_head_map(
    npy: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "import", str(npy), "--model", str(model), "--out", str(npy)]) == 1
    assert "expected a file of its own, got that of the head map; name" in error_of(capsys)
    np.testing.assert_array_equal(np.load(npy), TABLE)


def test_import_takes_head_maps_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "import", "--help"])
    said = capsys.readouterr().out
    assert "head map (.npy)" in said and "preset:" not in said


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 0},
        {"head_dim": 0},
        {"hidden_size": -96},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_without_a_shape(
    plan_file: Path, model: Path, changes: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    assert main(["plan", "check", str(plan_file), "--model", str(model)]) == 1
    assert "configuration" in error_of(capsys)


@pytest.mark.parametrize(
    "arguments",
    [[], ["plan"], ["nonsense"], ["plan", "show", "x.npy", "--anchors", "0,a"]],
    ids=str,
)
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: kascade" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("kascade ")


def test_show_and_diff_name_pools(
    pool_plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "pools.json", tmp_path / "whole.json"]
    for path, plan in zip(paths, (pool_plan, without_pools(pool_plan)), strict=True):
        plan.save(path)
    assert main(["plan", "show", str(paths[0])]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["4", "pooled", "anchor", "2", "0.900", "0.1000", "1", "2", "0"] in rows
    assert "pools layers 2 leave 0.25 of the keys, used in decoding".split() in rows
    assert main(["plan", "diff", *map(str, paths)]) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["makers", "2", "|", "none"] in rows and ["pool_share", "0.25", "|", "None"] in rows
    assert "layer 4 selects of 2's pool | anchor".split() in rows


HUGE = 10**400


@pytest.mark.parametrize(
    "provenance",
    [{"importance": [HUGE] * 6}, {"choices": [{"anchors": [0], "objective": HUGE}]}],
    ids=["importance", "objective"],
)
def test_numbers_that_no_float_holds(
    plan_file: Path, provenance: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(plan_file)
    replace(plan, provenance=provenance).save(plan_file)
    assert main(["plan", "show", str(plan_file)]) == 0
    assert main(["plan", "report", str(plan_file), "--out", str(plan_file.with_suffix(".svg"))])
    assert "kascade: plan: expected the measurements" in capsys.readouterr().err


def test_what_a_plan_says_is_shown_as_text(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(plan_file)
    replace(plan, provenance={"source": "a\x1b[2Jb", "by": "c\nd"}).save(plan_file)
    assert main(["plan", "show", str(plan_file)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a\\x1b[2Jb" in out and "c d" in out


def test_sizes_below_one_are_refused(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(plan_file.read_text())
    values["model"]["q_heads"] = -7
    plan_file.write_text(json.dumps(values))
    assert main(["plan", "check", str(plan_file)]) == 1
    assert "q_heads" in error_of(capsys)


@pytest.mark.parametrize("flags", ["x", "[]", "3", "null"])
def test_flags_that_no_start_has_left(
    plan_file: Path, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KASCADE_FLAGS", flags)
    assert main(["plan", "show", str(plan_file)]) == 1
    assert "KASCADE_FLAGS: expected what a server's start leaves there" in error_of(capsys)
