"""How long each kernel of a decode step takes: ``python -m benchmarks.kernel_times``.

Layers are those of ``bench_decode``, at the default budgets; times are torch's profiler's, the mean
of several steps with a cold L2 cache. ``benchmarks/ROOFLINE.md`` sets them beside what they move.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_decode import CASES, CONTEXT
from benchmarks.kernel_common import (
    ANCHOR,
    DEVICE,
    FLUSH_BYTES,
    LAYER0,
    LayerRuns,
    Pool,
    Step,
    make_paths,
    new_tokens,
)
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import gpu_provenance

RESULTS = Path(__file__).parent / "results/kernel_times_h200.csv"
COLUMNS = "case kind kernel us gpu versions commit date".split()
STEPS = 5


def times_of(step: Step) -> dict[str, float]:
    """Microseconds of every kernel of ours that a step launches, once or several times."""
    cold = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            cold.sum()
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in found.events():
        name, kernel, _ = event.name.partition("_kernel")
        if kernel and name.isidentifier():
            times[name] += event.device_time / STEPS
    return dict(times)


def measure_case(case: str) -> list[dict[str, str]]:
    """Rows of one case: layer 0, an anchor's selection, and attention to what was selected."""
    lengths = CASES[case]
    pool = Pool(lengths, "random", context=CONTEXT)
    batch = new_tokens(pool, [(length - 1, length) for length in lengths], decode=True)
    q, paths = pool.queries(len(lengths)), make_paths(pool, "default")
    paths.decode.reserve(len(lengths))
    layers, out = LayerRuns(pool, paths, paths.decode, batch, q), torch.empty_like(q)
    steps = {
        "layer0": lambda: layers.select(LAYER0, out=out),
        "select": lambda: layers.select(ANCHOR),
        "attend": lambda: layers.attend(ANCHOR),
    }
    return [
        {"case": case, "kind": kind, "kernel": kernel, "us": f"{us:.1f}"}
        for kind, step in steps.items()
        for kernel, us in times_of(step).items()
    ]


def main() -> int:
    """Measure, print and append to the CSV."""
    parser = argparse.ArgumentParser(prog="kernel_times", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["64x32K", "8x32K"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernel_times: expected a CUDA GPU, got none; run it on a machine that has one")
    stamp = gpu_provenance(options.commit)
    for case in options.cases:
        rows = measure_case(case)
        append_csv(options.out, COLUMNS, [row | stamp for row in rows])
        for row in rows:
            print(*row.values())
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
