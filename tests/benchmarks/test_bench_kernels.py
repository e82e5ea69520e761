"""The kernel benchmarks on a small scale: what they run, what they write, what they refuse."""

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from benchmarks import kernel_common, plot_kernels
from benchmarks.tables import KERNELS, newest

INTERPRETED = triton.knobs.runtime.interpret and not torch.cuda.is_available()
FLASHINFER = ("flashinfer_select", "flashinfer_attend", "flashinfer_cascade", "flashinfer_decode")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def run_once(step, repeats: int = 1) -> float:
    step()
    return 1.0


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A benchmark's module, with steps run once instead of timed, and FA3 left out."""
    module = importlib.import_module(f"benchmarks.{request.param}")
    small = {"KV_HEADS": 2, "GROUP": 2, "Q_HEADS": 4, "DIM": 32}
    for name, size in small.items():
        monkeypatch.setattr(kernel_common, name, size)
        monkeypatch.setattr(module, name, size, raising=False)
    monkeypatch.setattr(module, "measure", run_once)
    for name in ("fa3_decode", "fa3_extend", *FLASHINFER):
        monkeypatch.setattr(module, name, lambda *args, **more: lambda: None, raising=False)
    monkeypatch.setattr(module, "scratch_bytes", lambda step: 0, raising=False)
    return module


@needs_interpreter
@pytest.mark.parametrize("bench", ["bench_decode"], indirect=True)
def test_decode_measures_every_kind_of_layer(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CONTEXT", 1024)
    rows = list(bench.measure_case("tiny", [150, 40], "heavy_tailed", rivals=True))
    found = {(row.kind, row.plan, row.mode, row.method) for row in rows}
    for mode in kernel_common.MODES:
        assert {("layer0", "", mode, "kascade"), ("anchor", "", mode, "kascade")} <= found
        assert ("composite", "qwen3-8b", mode, "kascade") in found
        assert {("maker", "", mode, "kascade"), ("pooled", "", mode, "kascade")} <= found
        assert ("pool_composite", "10-anchors-4-makers", mode, "kascade") in found
    assert {("select", "", "exact", name) for name in ("torch", "flashinfer")} <= found
    step, layers = 1.0, 32
    composite = next(row for row in rows if row.plan == "llama-3.1-8b")
    assert (composite.ms, composite.fa3_ms) == (step + layers, layers)


@needs_interpreter
@pytest.mark.parametrize("bench", ["bench_decode", "bench_prefill"], indirect=True)
def test_fp8_is_measured_beside_dense_fp8(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = bench.__name__.endswith("decode")
    if decoding:
        monkeypatch.setattr(bench, "CONTEXT", 512)
        rows = bench.measure_case("tiny", [150], "random", False, "fp8_e4m3")
    else:
        monkeypatch.setattr(bench, "CASES", {"tiny": bench.Case([[(96, 160)]])})
        monkeypatch.setattr(bench, "PIECES", ("tiny",))
        rows = bench.measure_case("tiny", "random", "fp8_e4m3")
    found = {(row.kind, row.method) for row in rows}
    dense = {"fa3_fp8", "flashinfer_fp8"} if decoding else {"fa3_fp8"}
    assert {method for kind, method in found if kind == "dense"} == dense
    assert {"layer0", "anchor", "reuse"} <= {kind for kind, _ in found}


@needs_interpreter
@pytest.mark.parametrize("bench", ["bench_decode"], indirect=True)
def test_a_shared_prefix_is_measured_beside_a_cascade(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CONTEXT", 512)
    monkeypatch.setattr(bench, "SHARED", {"tiny": 200})
    rows = list(bench.measure_case("tiny", [230, 210], "random", rivals=True))
    assert rows[0].method == "flashinfer_cascade"
    assert sum(row.kind == "composite" for row in rows) == 2 * len(kernel_common.MODES)


@needs_interpreter
@pytest.mark.parametrize("bench", ["bench_prefill"], indirect=True)
def test_prefill_sums_chunks(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = bench.Case([[(96, 160)], [(160, 170)]])
    shared = bench.Case([[(130, 140)] * 2], shared=130)
    monkeypatch.setattr(bench, "CASES", {"chunks": chunks, "shared": shared})
    monkeypatch.setattr(bench, "PIECES", ("shared",))
    rows = list(bench.measure_case("chunks", "random"))
    assert {row.ms for row in rows if row.kind == "anchor"} == {2.0}
    assert {row.fa3_ms for row in rows if row.plan == "qwen3-8b"} == {72.0}
    pieces = {row.kind for row in bench.measure_case("shared", "heavy_tailed")}
    assert {"lse", "score", "select", "attend", "composite"} <= pieces


@pytest.mark.parametrize("bench", ["bench_decode"], indirect=True)
def test_rows_are_appended_and_the_newest_is_drawn(bench: ModuleType, tmp_path: Path) -> None:
    stamp = {"gpu": "G", "versions": "v", "commit": "c", "date": "d"}
    path = tmp_path / "rows.csv"
    for ms in (2.0, 1.0):
        row = bench.Row("16x128K", "composite", "exact", ms, 4.0, plan="qwen3-8b")
        kernel_common.append_rows(path, [row], stamp)
    assert len(list(csv.DictReader(path.open()))) == 2
    assert newest(path, KERNELS)["speedup"].tolist() == [4.0]
    plot_kernels.plot(path, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("bench", ["bench_decode", "bench_prefill"], indirect=True)
def test_needs_a_gpu(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="expected a CUDA GPU, got none"):
        bench.main()
