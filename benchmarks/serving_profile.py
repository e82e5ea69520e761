"""Where a step's time goes on the GPU, from the traces that SGLang's profiler writes.

``bench_serving --profile`` takes one of prefill and one of decoding for every run, of up to a few
steps each. A row is a kind of kernel in one of them; ``idle`` is what no kernel covers. Where a
model lies on several GPUs every rank has its own; its all-reduces take as long as it waits for the
others, too.
"""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from kascade_sglang.files import append_csv

STEPS = 5
"""Most steps in a trace: prefill may be over before."""
COLUMNS = """workload backend model stage kernel ms share gpu versions commit date""".split()
KINDS = {
    "matrix products": r"gemm|nvjet|xmma|cutlass::Kernel|cublas|splitK",
    "FlashAttention-3": r"flash::|FlashAttn|prepare_varlen",
    "FlashInfer attention": r"BatchDecode|BatchPrefill|flashinfer.*ttention|MergeState",
    "all-reduce": r"all_?reduce|AllReduce|cross_device_reduce|nccl",
}
OURS = re.compile(
    r"^((copy|decode|merge|count|find|tile)_\w+|pool_scores|emit_slots|group_rows|compare_slots)_kernel"
)


def kind_of(name: str) -> str:
    """Return what a kernel is shown as: Kascade's by name, others by kind."""
    ours = OURS.match(name)
    if ours:
        return f"kascade {ours[1]}"
    return next((kind for kind, found in KINDS.items() if re.search(found, name)), "other")


def summarise(trace: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of every kind of kernel, greatest first, and idle time; from a trace."""
    times: dict[str, float] = defaultdict(float)
    busy_until, covered, begin = 0.0, 0.0, None
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    for event in sorted(kernels, key=lambda one: one["ts"]):
        start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        begin = start if begin is None else begin
        times[kind_of(event["name"])] += end - start
        covered += max(0.0, end - max(start, busy_until))
        busy_until = max(busy_until, end)
    if begin is not None:
        times["idle"] = busy_until - begin - covered
    ranked = sorted(times.items(), key=lambda one: -one[1])
    return {kind: microseconds / 1000 for kind, microseconds in ranked}


def read_traces(folder: Path) -> dict[str, dict[str, float]]:
    """Summaries of a folder's traces: {stage: {kind: ms}}.

    Stage and rank are in the file's name; a stage of several ranks is named after both.
    """
    paths, found = sorted(folder.rglob("*.trace.json.gz")), {}
    ranks = {path: re.search(r"TP-(\d+)", path.name) for path in paths}
    several = len({rank[1] for rank in ranks.values() if rank}) > 1
    for path, rank in ranks.items():
        stage = next((s for s in ("EXTEND", "DECODE") if s in path.name.upper()), "all").lower()
        with gzip.open(path, "rt") as file:
            found[f"{stage}, rank {rank[1]}" if several else stage] = summarise(json.load(file))
    return found


def write_profile(out: Path, folder: Path, named: dict[str, str], stamp: dict[str, str]) -> None:
    """Append a run's summaries to a CSV. named: workload, backend and model."""
    for stage, times in read_traces(folder).items():
        whole = sum(times.values())
        rows = [
            {"kernel": kind, "ms": f"{ms:.4f}", "share": f"{ms / whole:.4f}"}
            for kind, ms in times.items()
        ]
        append_csv(out, COLUMNS, [{**named, "stage": stage, **row, **stamp} for row in rows])
