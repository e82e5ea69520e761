"""``make eval``: ``kascade eval``'s questions about facts, to one server after another.

A comparator is a server with a setting (``methods.py``). Rows are those of ``kascade eval``; the
label names method and budget, the note what the server ran on. A task's row is added when it is
done, so an interrupted run keeps it, and the same command goes on from there.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.command import SHORTEST
from kascade_sglang.evaluation.endpoint import Endpoint
from kascade_sglang.evaluation.harness import EvalSettings, Harness
from kascade_sglang.evaluation.methods import Method, all_methods, server_arguments
from kascade_sglang.evaluation.planted_facts import facts_tasks
from kascade_sglang.evaluation.results import Results
from kascade_sglang.evaluation.show import KINDS, plot, summary
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.files import why_undrawable, why_unwritable
from kascade_sglang.host.dense import default_dense_backend
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server, run_command

RESULTS = Path("benchmarks/results")
LENGTHS = (1024, 2048, 4096, 8192)


def settings_of(lengths: list[int], samples: int, label: str, note: str = "") -> EvalSettings:
    """What every server of a comparison is asked; see EvalSettings."""
    return EvalSettings(
        lengths=tuple(lengths),
        samples=samples,
        seed=0,
        prompt="chat",
        concurrency=4,
        temperature=0.0,
        timeout=3600,
        max_tokens=None,
        label=label,
        note=note,
    )


def ask_server(
    arguments: list[str],
    environment: dict[str, str],
    log: Path,
    settings: EvalSettings,
    results: Results,
    on_reply: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Start a server, ask it about facts and return the rows, which are in ``results`` too."""
    with Server(arguments, log, environment=environment) as server:
        endpoint = Endpoint.probe(server.url)
        # A tokenizer for each server: they do not bear several threads.
        tokens = Tokens.load(str(MODEL))
        harness = Harness(endpoint, tokens, settings, results, lambda *progress: on_reply())
        return harness.run(facts_tasks())


def note() -> str:
    """What the server runs on, in one line, as a row keeps it."""
    stamp = provenance()
    return ", ".join(stamp[name] for name in ("device", "dtype", "versions", "commit"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make eval", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--samples", type=int, default=20, help="of each task and length")
    names = list(dict.fromkeys(method.name for method in all_methods([1.0])))
    parser.add_argument("--only", nargs="+", choices=names, help="run these")
    parser.add_argument("--dense", default=default_dense_backend(), help="the dense backend")
    parser.add_argument("--parallel", type=int, default=1, help="servers to run side by side")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_demo.csv")
    parser.add_argument("--note", default=note(), help="what rows keep of where this runs")
    options = parser.parse_args()
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse wrong options before a server is started; raises EvaluationError."""
    for name in ("samples", "parallel"):
        if (value := getattr(options, name)) < 1:
            raise EvaluationError(f"--{name}: expected 1 or more, got {value}")
    for length in options.lengths:
        if length < SHORTEST:
            raise EvaluationError(f"--lengths: expected at least {SHORTEST} tokens, got {length}")
    for ratio in options.ratios:
        if not 0 < ratio <= 1:
            raise EvaluationError(f"--ratios: expected numbers above 0, at most 1, got {ratio}")
    picture = options.out.with_suffix(".png")
    why = why_unwritable(options.out) or why_undrawable(picture, KINDS, {"--out": options.out})
    if why:
        raise EvaluationError(f"--out {options.out}: {why}")


def main() -> int:
    """Run the grid; returns the exit status."""
    options = parse_arguments()
    only = options.only
    methods = [m for m in all_methods(options.ratios) if not only or m.name in only]
    folder = Path(tempfile.mkdtemp(prefix="kascade-eval-"))
    results = Results(options.out)
    questions = len(facts_tasks()) * len(options.lengths) * options.samples
    with (
        tqdm(total=len(methods) * questions, unit="question") as bar,
        ThreadPoolExecutor(options.parallel) as pool,
    ):

        def run(method: Method) -> None:
            log = folder / f"{method.label.replace(' ', '_')}.log"
            settings = settings_of(options.lengths, options.samples, method.label, options.note)
            server = server_arguments(method, options.dense, folder)
            ask_server(*server, log, settings, results, bar.update)

        list(pool.map(run, methods))
    rows = results.rows()
    Console(width=110).print(summary(rows))
    plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
