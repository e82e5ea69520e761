"""The benchmark of pools on a tiny model."""

import csv
from pathlib import Path

import pytest

from benchmarks import bench_anchors
from benchmarks import bench_pools as bench
from kascade_kernels.budget import Budget
from kascade_sglang.servers.demo_model import MODEL


def test_a_pool_of_all_keys_is_none_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_anchors, "BUDGET", Budget(0.1, 64))
    out = tmp_path / "pools.csv"
    options = ["--anchors", "0,2,4,6,8", "0,4", "--makers", "2", "2,6", "--shares", "0.13", "0.999"]
    options += ["--prompts", "1", "--tokens", "512", "--device", "cpu", "--out", str(out)]
    assert bench.main(["--model-path", str(MODEL), *options]) == 0
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == bench.COLUMNS and len(rows) == 2 + 2 * 2
    losses = [float(row["decode_kl"]) for row in rows]
    for row, loss in zip(rows[2:], losses[2:], strict=True):
        assert (loss == losses[0]) == (row["share"] == "0.999")
