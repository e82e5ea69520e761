"""The serving benchmark on a small scale: without a server: what is asked, counted and drawn."""

import contextlib
import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import bench_serving as bench
from benchmarks import serving_profile
from kascade_sglang.errors import KascadeError

STAMP = ("gpu", "versions", "commit", "date")


@pytest.mark.parametrize(("rounds", "up"), [(1, 1), (2, 2)], ids=["one-by-one", "in-turn"])
def test_servers_of_several_rounds_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int, up: int
) -> None:
    running, asked = [], []

    @contextlib.contextmanager
    def server(arguments: list[str], log: Path) -> Iterator[str]:
        running.append(log.stem)
        yield log.stem
        running.remove(log.stem)

    def measure(server: str, *others: object) -> dict[str, float]:
        asked.append(server)
        assert server in running and len(running) == up
        return {"itl_p50_ms": float(len(asked))}

    out = tmp_path / "rows.csv"
    monkeypatch.setattr(bench, "Server", server)
    monkeypatch.setattr(bench, "ask", mock.Mock())
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "gpu_provenance", lambda commit: dict.fromkeys(STAMP, ""))
    monkeypatch.setattr(bench, "plot", mock.Mock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = ["--model", "four-layers", "--backends", "fa3", "kascade", "--workloads", "host"]
    arguments = [*arguments, "--rounds", str(rounds), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_serving", *arguments])
    assert bench.main() == 0
    assert asked == rounds * ["fa3", "kascade"] and not running
    with open(out, newline="") as file:
        assert [row["backend"] for row in csv.DictReader(file)] == asked


@pytest.mark.parametrize("result", [(2, [4, 3]), (1, [4])], ids=["short", "lost"])
def test_runs_count_only_with_every_token(result: tuple[int, list[int]]) -> None:
    completed, lengths = result
    workload = bench.Workload(2, 300, 4, "itl_p50_ms", 2.0)
    with pytest.raises(KascadeError, match="expected 2 replies of 4 tokens"):
        bench.require_all({"completed": completed, "output_lens": lengths}, workload)


def test_ratios_are_to_the_best_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = [("kascade", 290.0), ("fa3", 150.0), ("triton", 100.0), ("kascade", 310.0)]
    rows = [
        {"workload": "chat", "backend": name, "output_tokens_per_s": speed}
        for name, speed in speeds
    ]
    rows += [
        {"workload": "prefill-32K", "backend": name, "ttft_p50_ms": ms}
        for name, ms in (("kascade", 400.0), ("fa3", 500.0), ("triton", 900.0))
    ]
    bench.print_ratios(rows)
    lines = capsys.readouterr().out.splitlines()
    assert ["fa3" in line for line in lines] == [True, True]
    assert "1.25x" in lines[0] and "2.00x" in lines[1]


def test_arrivals_follow_what_fa3_reached() -> None:
    rows = [{"workload": "rag-8-prefixes-limit", "requests_per_s": 10.0}]
    assert bench.arrival_rate("rag-8-prefixes", rows) == 8.0
    assert bench.arrival_rate("rag-8-prefixes", [*rows, {**rows[0], "requests_per_s": 1.0}]) == 8.0
    assert bench.arrival_rate("chat", rows) == float("inf")


def test_refuses_arrivals_without_their_limit(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["rag-8-prefixes-limit", "rag-8-prefixes"]
    assert bench.parse_arguments(["--workloads", *names]).workloads == names
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--workloads", *reversed(names)])
    assert "expected rag-8-prefixes-limit before it, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--rounds", "0"])
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err


def test_curves_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    bench.plot(bench.RESULTS, picture, "llama-3.1-8b")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_shape_has_a_plan_that_fits(tmp_path: Path) -> None:
    from kascade_sglang.plan.library import PLAN_NAME
    from kascade_sglang.plan.schema import load_plan

    for name, anchors in bench.ANCHORS.items():
        folder = bench.make_shape(name, tmp_path)
        assert load_plan(folder / PLAN_NAME).anchors == anchors


def test_a_profile_says_what_ran_and_what_did_not(tmp_path: Path) -> None:
    kernels = [
        ("nvjet_tst_128x8", 0, 4000),
        ("decode_scores_kernel", 4000, 1000),
        ("void flash::prepare_varlen", 6000, 500),
        ("vectorized_add", 6000, 1000),
    ]
    names = ("name", "ts", "dur")
    events = [{"cat": "kernel", **dict(zip(names, one, strict=True))} for one in kernels]
    events.append({"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 9e6})
    with gzip.open(tmp_path / "1-TP-0-DECODE.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    stamp = dict.fromkeys(STAMP, "")
    named = {"workload": "chat", "backend": "kascade", "model": "tiny"}
    serving_profile.write_profile(tmp_path / "out.csv", tmp_path, named, stamp)
    with open(tmp_path / "out.csv", newline="") as file:
        rows = {row["kernel"]: float(row["ms"]) for row in csv.DictReader(file)}
    expected = {"matrix products": 4, "kascade decode_scores": 1, "FlashAttention-3": 0.5}
    expected |= {"other": 1, "idle": 1}
    assert rows == expected


def test_every_rank_has_a_profile_of_its_own(tmp_path: Path) -> None:
    for rank, waited in enumerate((1000, 3000)):
        event = {"cat": "kernel", "name": "cross_device_reduce_1stage", "ts": 0, "dur": waited}
        with gzip.open(tmp_path / f"1-TP-{rank}-DECODE.trace.json.gz", "wt") as file:
            json.dump({"traceEvents": [event]}, file)
    assert serving_profile.read_traces(tmp_path) == {
        "decode, rank 0": {"all-reduce": 1, "idle": 0},
        "decode, rank 1": {"all-reduce": 3, "idle": 0},
    }
