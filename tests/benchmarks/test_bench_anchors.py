"""The benchmark of anchors on a tiny model: every way of choosing has its row."""

import csv
from pathlib import Path

import pytest

from benchmarks import bench_anchors as bench
from kascade_kernels.budget import Budget
from kascade_sglang.servers.demo_model import MODEL


def test_every_choice_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", Budget(0.1, 64))
    out = tmp_path / "anchors.csv"
    options = ["--prompts", "1", "--tokens", "512", "--counts", "4", "--draws", "1"]
    options += ["--also", "mine=0,4,8,9", "--device", "cpu", "--out", str(out)]
    assert bench.main(["--model-path", str(MODEL), *options]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["chosen_by"] for row in rows] == ["all", "mine", "kl", "mass", "even", "random"]
    assert list(rows[0]) == bench.COLUMNS
    assert {row["count"] for row in rows[1:]} == {"4"} and rows[4]["anchors"] == "0 3 6 9"
    losses = {row["chosen_by"]: float(row["decode_kl"]) for row in rows}
    assert losses["all"] < losses["random"] and losses["kl"] < losses["random"]
    assert all(float(row["whole_kl"]) > 0 for row in rows)
