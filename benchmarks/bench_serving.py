"""Kascade beside SGLang's own backends in real servers: ``make bench-serving``.

One server after the other, the same flags but the backend; SGLang's own client asks. A run counts
only if every request got the tokens that it asked for. Servers of a small model can stand side by
side and be asked in turn, round after round: what else the machine does then meets all alike.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.plot_serving import plot
from benchmarks.serving_model import ANCHORS, make_shape
from benchmarks.serving_profile import STEPS, write_profile
from benchmarks.serving_workloads import (
    TARGETS,
    WARM_UP,
    WARM_UP_RATE,
    WORKLOADS,
    Workload,
    compare,
    medians,
)
from kascade_sglang.errors import KascadeError
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import gpu_provenance
from kascade_sglang.servers.counters import read_samples
from kascade_sglang.servers.process import Server, run_command

RESULTS = Path(__file__).parent / "results/serving_h100.csv"
PROFILE = "serving_profile_h100.csv"
BACKENDS = ("fa3", "kascade", "flashinfer", "triton")
COLUMNS = """workload backend model requests input_tokens output_tokens
    ttft_p50_ms ttft_p90_ms ttft_p99_ms itl_p50_ms itl_p90_ms itl_p99_ms
    tpot_p50_ms tpot_p90_ms tpot_p99_ms requests_per_s output_tokens_per_s
    cache_hit_rate peak_memory_mb prompt_tokens_served flags gpu versions commit date""".split()
POLL_SECONDS = 0.5


class PeakMemory:
    """``with PeakMemory() as peak``: the most memory in use on the GPU, in MiB, by any process."""

    def __enter__(self) -> "PeakMemory":
        self.mib, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.mib = max(self.mib, torch.cuda.device_memory_used() >> 20)
            time.sleep(POLL_SECONDS)


def counters(server: Server) -> dict[str, float]:
    """Prompt tokens that the server has counted, and how many of them it had cached."""
    totals = {"sglang:prompt_tokens_total": 0.0, "sglang:cached_tokens_total": 0.0}
    for sample in read_samples(server.url):
        if sample.name in totals:
            totals[sample.name] += sample.value
    prompt, cached = totals.values()
    return {"prompt": prompt, "cached": cached}


def ask(
    server: Server,
    model: Path,
    workload: Workload,
    rate: float,
    folder: Path,
    traces: Path | None = None,
) -> dict:
    """Run SGLang's client once; returns its results. Raises KascadeError where a reply is short.

    traces: where the server's profiler writes; None leaves it off.
    """
    out = folder / "run.jsonl"
    out.unlink(missing_ok=True)
    run_client(
        [
            # Turns are messages of a chat.
            *("--backend", "sglang" if workload.turns == 1 else "sglang-oai-chat"),
            *("--base-url", server.url),
            *("--model", str(model), "--tokenizer", str(model)),
            *("--request-rate", str(rate), "--flush-cache"),
            *("--warmup-requests", str(workload.warmups)),
            *("--disable-tqdm", "--output-file", str(out), "--output-details"),
            *workload.arguments(),
            *(profile_arguments(traces) if traces else ()),
        ],
        model,
        workload,
        folder,
    )
    if not out.exists():
        raise KascadeError(f"SGLang's client wrote no results; the server's log: {server.tail()}")
    result = json.loads(out.read_text().splitlines()[-1])
    require_all(result, workload)
    return result


def profile_arguments(traces: Path) -> list[str]:
    """Options of SGLang's client that take one trace of prefill and one of decoding."""
    arguments = ["--profile", "--profile-by-stage", "--profile-num-steps", str(STEPS)]
    return [*arguments, "--profile-activities", "GPU", "--profile-output-dir", str(traces)]


def run_client(arguments: list[str], model: Path, workload: Workload, folder: Path) -> None:
    """Run SGLang's client as its command does, in this process: starting it takes a minute."""
    from sglang.benchmark import serving

    # The client keeps its prompts below HOME, by a name that forgets the tokenizer.
    log = folder / "client.log"
    with (
        mock.patch.dict(os.environ, HOME=str(folder)),
        mock.patch.object(sys, "argv", ["bench_serving", *arguments]),
        open(log, "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            if workload.groups and workload.turns == 1:
                workload.write_prompts(model)
            serving.cli_main()
        except SystemExit as end:
            raise KascadeError(f"SGLang's client ended: {log.read_text()[-500:]}") from end


def require_all(result: dict[str, Any], workload: Workload) -> None:
    """Raise KascadeError unless every request got the tokens that it asked for."""
    short = [n for n in result["output_lens"] if n != workload.outputs]
    if short or result["completed"] != workload.replies:
        raise KascadeError(
            f"expected {workload.replies} replies of {workload.outputs} tokens, got "
            f"{result['completed']}, of other lengths: {short}"
        )


def measure(
    server: Server, model: Path, workload: Workload, rate: float, folder: Path
) -> dict[str, Any]:
    """Run a workload; returns the row's figures."""
    before = counters(server)
    with PeakMemory() as peak:
        result = ask(server, model, workload, rate, folder)
    after = counters(server)
    served = after["prompt"] - before["prompt"]
    figures = {
        f"{short}_{quantile}_ms": round(result[f"{name}_{short}_ms"], 3)
        for short in ("ttft", "itl", "tpot")
        for quantile, name in (("p50", "median"), ("p90", "p90"), ("p99", "p99"))
    }
    return {
        "requests": workload.replies,
        "input_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        **figures,
        "requests_per_s": round(result["request_throughput"], 4),
        "output_tokens_per_s": round(result["output_throughput"], 2),
        "cache_hit_rate": round((after["cached"] - before["cached"]) / served, 4),
        "peak_memory_mb": peak.mib or "",
        "prompt_tokens_served": int(served),
    }


def server_arguments(model: Path, backend: str, options: argparse.Namespace) -> list[str]:
    """Return the flags of one server; the backend's name is the only difference."""
    arguments = ["--model-path", str(model), "--attention-backend", backend, "--enable-metrics"]
    arguments += ["--log-level", "warning"]
    if not options.model_path:
        arguments += ["--load-format", "dummy"]
    return arguments + options.server_flags


def arrival_rate(name: str, rows: list[dict[str, Any]]) -> float:
    """Requests a second: a share of what the first backend, fa3, reached; or no limit."""
    share = WORKLOADS[name].arrivals
    if share is None:
        return float("inf")
    limits = (row["requests_per_s"] for row in rows if row["workload"] == f"{name}-limit")
    return share * next(limits)


def run_group(
    backends: list[str],
    model: Path,
    options: argparse.Namespace,
    folder: Path,
    rows: list[dict[str, Any]],
    stamp: dict[str, str],
    bar: Any,
) -> None:
    """Start these servers and ask them in turn; rows grow, and the CSV with them."""
    arguments = {backend: server_arguments(model, backend, options) for backend in backends}
    with contextlib.ExitStack() as stack:
        servers = {}
        for backend in backends:
            log = folder / f"{backend}.log"
            servers[backend] = stack.enter_context(Server(arguments[backend], log))
            ask(servers[backend], model, WARM_UP, WARM_UP_RATE, folder)
        for _, backend, name in itertools.product(
            range(options.rounds), backends, options.workloads
        ):
            bar.set_description(f"{backend}, {name}")
            server, workload = servers[backend], WORKLOADS[name]
            named = {"workload": name, "backend": backend, "model": options.model}
            figures = measure(server, model, workload, arrival_rate(name, rows), folder)
            rows.append({**named, **figures, "flags": " ".join(arguments[backend][4:])})
            append_csv(options.out, COLUMNS, [rows[-1] | stamp])
            if name in options.profile:
                # Apart from the run that is timed, because the profiler slows what it watches.
                traces = folder / f"{backend}-{name}"
                ask(server, model, workload, float("inf"), folder, traces)
                write_profile(options.out.with_name(PROFILE), traces, named, stamp)
            bar.update()


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Print Kascade against the best of the others, where both were measured."""
    table = pd.DataFrame(rows)
    for name, workload in WORKLOADS.items():
        mine = table[table["workload"] == name]
        found = {} if mine.empty else medians(mine, workload)
        if "kascade" not in found or len(found) < 2:
            continue
        best, ratio = compare(found, workload)
        print(
            f"{name:16} {workload.figure:20} kascade {found['kascade']:10.2f}  {best} "
            f"{found[best]:10.2f}  {ratio:.2f}x (at least {workload.must}x)"
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or ``arguments``."""
    parser = argparse.ArgumentParser(prog="make bench-serving", description=__doc__)
    parser.add_argument("--model", choices=ANCHORS, default="llama-3.1-8b", help="shape to serve")
    parser.add_argument("--model-path", type=Path, help="a real checkpoint instead")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--workloads", nargs="+", default=TARGETS, choices=WORKLOADS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--profile",
        nargs="+",
        default=[],
        choices=WORKLOADS,
        help=f"trace kernels of these as well: {PROFILE} beside --out",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="start all servers at once, and ask each in turn N times; for models that fit so",
    )
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    parser.add_argument(
        "server_flags", nargs="*", help="after --: more flags for every server (memory, pages)"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    for place, name in enumerate(options.workloads):
        if WORKLOADS[name].arrivals and f"{name}-limit" not in options.workloads[:place]:
            parser.error(f"--workloads {name}: expected {name}-limit before it, got none")
    for name in options.profile:
        if name not in options.workloads:
            parser.error(f"--profile {name}: expected one of --workloads, got another")
    return options


def main() -> int:
    """Run every backend; rows are written as they come."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("bench-serving: expected a CUDA GPU, got none; run it on a machine that has one")
    folder = Path(tempfile.mkdtemp(prefix="kascade-serving-"))
    model = options.model_path or make_shape(options.model, folder)
    stamp = gpu_provenance(options.commit)
    rows: list[dict[str, Any]] = []
    total = options.rounds * len(options.backends) * len(options.workloads)
    together = options.rounds > 1
    with tqdm(total=total, unit="run") as bar:
        for group in [options.backends] if together else [[name] for name in options.backends]:
            run_group(group, model, options, folder, rows, stamp, bar)
    print_ratios(rows)
    plot(options.out, options.out.with_suffix(".png"), options.model)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
