"""Which anchors, how many, and tiles of which size: the demo model's answers, all else equal.

The model is measured once. Anchors are then chosen as ``kascade calibrate`` does by either
criterion (``kl``, ``mass``), evenly spaced, or drawn at random, at several counts; ``shipped`` are
those of the demo model's plan, which also runs with other tiles. Every row is one server, and is
added to the results.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from kascade_kernels.budget import TILE
from kascade_sglang.calibration.build import CRITERIA
from kascade_sglang.calibration.run import CalibrationConfig, Measured, measure
from kascade_sglang.calibration.sources import PromptSource
from kascade_sglang.demo.recipe.prompts import write_prompts
from kascade_sglang.evaluation.__main__ import LENGTHS, ask_server, settings_of
from kascade_sglang.evaluation.intervals import wilson
from kascade_sglang.evaluation.planted_facts import facts_tasks
from kascade_sglang.evaluation.results import Results
from kascade_sglang.files import append_csv
from kascade_sglang.host.dense import default_dense_backend
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan, load_plan
from kascade_sglang.provenance import provenance
from kascade_sglang.servers.demo_model import MODEL, demo_arguments
from kascade_sglang.servers.process import run_command

RESULTS = Path(__file__).parent / "results/ablations_demo.csv"
CHOICES = ("shipped", *CRITERIA, "even", "random")
COLUMNS = """choice anchors count tile accuracy low high n attended
    device dtype versions commit date""".split()
COUNTS = (4, 6, 8)
DRAWS = 2
TILES = (8, 16, 64)
RATIO = 0.1


class Candidate(NamedTuple):
    """A plan, how its anchors were chosen, and the positions that share a selection."""

    choice: str
    plan: Plan
    tile: int = TILE

    @property
    def name(self) -> str:
        """Of its files."""
        return "_".join([self.choice, *map(str, self.plan.anchors), f"tile{self.tile}"])


def candidates(
    measured: Measured, counts: tuple[int, ...], draws: int, tiles: tuple[int, ...] = TILES
) -> Iterator[Candidate]:
    """Yield all that is compared, the shipped plan's anchors first."""
    layers = measured.shape.layers
    shipped = measured.plan(load_plan(MODEL / PLAN_NAME).anchors, "per_head", "mass")
    for tile in (TILE, *tiles):
        yield Candidate("shipped", shipped, tile)
    for count in counts:
        for criterion in CRITERIA:
            yield Candidate(criterion, measured.plan(count, "per_head", criterion))
        even = tuple(layers * index // count for index in range(count))
        yield Candidate("even", measured.plan(even, "per_head", "mass"))
        for seed in range(draws):
            others = random.Random(seed).sample(range(1, layers), count - 1)
            yield Candidate("random", measured.plan((0, *sorted(others)), "per_head", "mass"))


def evaluate(
    candidate: Candidate, options: argparse.Namespace, results: Results, folder: Path, bar: Any
) -> dict[str, Any]:
    """Serve one plan, ask everything and return its row."""
    plan, path = candidate.plan, folder / f"{candidate.name}.json"
    # A plan names its tile, and a server refuses another one.
    path.write_text(json.dumps({**plan.to_json(), "tile": candidate.tile}))
    arguments = demo_arguments("kascade", options.dense)
    arguments += ["--kascade-plan", str(path), "--kascade-topk-ratio", str(RATIO)]
    environment = {"KASCADE_TILE": str(candidate.tile)}
    settings = settings_of(options.lengths, options.samples, candidate.name)
    log = path.with_suffix(".log")
    rows = ask_server(arguments, environment, log, settings, results, bar.update)
    asked = sum(row["n"] for row in rows)
    right = sum(round(float(row["score"]) * row["n"] / 100) for row in rows)
    low, high = wilson(right, asked)
    return {
        "choice": candidate.choice,
        "anchors": " ".join(map(str, plan.anchors)),
        "count": len(plan.anchors),
        "tile": candidate.tile,
        "accuracy": round(right / asked, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": asked,
        "attended": round(sum(float(row["prefill_attended"]) for row in rows) / len(rows), 4),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="ablations.py", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=CHOICES, help="run these")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="of anchors")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--samples", type=int, default=20, help="of each task and length")
    parser.add_argument("--measured-tiles", type=int, default=48, help="of each prompt")
    parser.add_argument("--tiles", type=int, nargs="*", default=list(TILES), help="sizes")
    parser.add_argument("--parallel", type=int, default=1, help="servers to run side by side")
    parser.add_argument("--dense", default=default_dense_backend(), help="the dense backend")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    return parser.parse_args()


def main() -> int:
    """Measure once, serve every plan, write rows as they come."""
    options = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="kascade-ablations-"))
    write_prompts(folder / "prompts.jsonl")
    source = PromptSource(prompts=folder / "prompts.jsonl")
    config = CalibrationConfig(
        model=str(MODEL), out=folder / "plan.json", source=source, tiles=options.measured_tiles
    )
    measured, _ = measure(config)
    results = Results(folder / "answers.csv")
    every = candidates(measured, tuple(options.counts), DRAWS, tuple(options.tiles))
    plans = [one for one in every if one.choice in options.only]
    stamp = provenance(options.commit)
    questions = len(facts_tasks()) * len(options.lengths) * options.samples
    with (
        tqdm(total=len(plans) * questions, unit="question") as bar,
        ThreadPoolExecutor(options.parallel) as pool,
    ):

        def run(candidate: Candidate) -> dict[str, Any]:
            return evaluate(candidate, options, results, folder, bar)

        for row in pool.map(run, plans):
            append_csv(options.out, COLUMNS, [row | stamp])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
