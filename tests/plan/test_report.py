"""The page about a calibrated plan."""

import errno
import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kascade_sglang.cli import main
from kascade_sglang.plan.measurements import measurements_of
from kascade_sglang.plan.report import check_target, write_report
from kascade_sglang.plan.schema import Plan, PlanError, load_plan

pytest.importorskip("matplotlib")


@pytest.fixture
def measured(plan: Plan) -> Plan:
    table = [[0.1 * layer + 0.05 * head for head in range(3)] for layer in range(6)]
    return replace(
        plan,
        model="org/<tiny>",
        provenance={
            **plan.provenance,
            "layer_score": [[0.9] * (5 - layer) for layer in range(6)],
            "mass": {"0.05": table, "0.1": table, "0.2": table},
            "choices": [{"anchors": [0, 2, 4], "objective": 1.25}],
        },
    )


def test_measurements_as_arrays(measured: Plan) -> None:
    found = measurements_of(measured)
    assert found.similarity.shape == (6, 6) and found.similarity[2, 2] == 1
    assert found.similarity[1, 3] == 0.9
    assert sorted(found.mass) == [0.05, 0.1, 0.2] and found.mass[0.1].shape == (6, 3)
    assert found.choices == [((0, 2, 4), 1.25)]


@pytest.mark.parametrize("criterion", ["mass", "kl"])
@pytest.mark.parametrize(
    "name, start", [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.html", b"<!DOCTYPE html>")]
)
def test_one_page_the_same_every_time(
    measured: Plan, tmp_path: Path, name: str, start: bytes, criterion: str
) -> None:
    measured = replace(measured, provenance={**measured.provenance, "criterion": criterion})
    write_report(measured, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    write_report(measured, tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
    if name.endswith("html"):
        assert b"org/&lt;tiny&gt;" in content and b"<svg" in content and b"1.2500" in content


def test_names_with_dollars(measured: Plan, tmp_path: Path) -> None:
    named = {**measured.provenance, "prompts_file": "a$^b$.jsonl"}
    write_report(replace(measured, model="$\\x$", provenance=named), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"layer_score": 5},
        {"mass": {}},
        {"mass": {"0.1": [[1.0]]}},
        {"importance": [None] * 6},
        {"layer_score": [["x"]]},
    ],
    ids=["imported", "score", "no-mass", "mass-shape", "importance", "text"],
)
def test_refuses_plans_without_measurements(
    measured: Plan, tmp_path: Path, provenance: dict[str, Any]
) -> None:
    changed = {**measured.provenance, **provenance} if provenance else {}
    plan = replace(measured, provenance=changed)
    with pytest.raises(PlanError, match="expected the measurements that `kascade calibrate`"):
        write_report(plan, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_page(
    measured: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "p.svg"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PlanError, match="cannot write the report .No space left on device"):
        write_report(measured, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_command(measured: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured.save(tmp_path / "plan.json")
    command = ["plan", "report", str(tmp_path / "plan.json"), "--out"]
    assert main([*command, str(tmp_path / "p.png")]) == 0
    assert main([*command, str(tmp_path / "p.gif")]) == 1
    assert "p.gif: expected a name that ends in .png, .svg, .html" in capsys.readouterr().err
    assert main([*command, "/nowhere/p.png"]) == 1
    sentence = "--out /nowhere/p.png: expected a folder that exists, got /nowhere; make it first"
    assert sentence in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert main([*command, str(tmp_path / "folder.png")]) == 1
    assert "expected a file's name, got a folder" in capsys.readouterr().err
    # A plan whose name could be a page's.
    same = tmp_path / "p.svg"
    measured.save(same)
    assert main(["plan", "report", str(same), "--out", f"{tmp_path}/../{tmp_path.name}/p.svg"]) == 1
    assert "expected a file of its own, got that of the plan" in capsys.readouterr().err
    assert load_plan(same) == measured


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="--report .*p.png: needs the matplotlib package; pip"):
        check_target("--report", tmp_path / "p.png", {})
