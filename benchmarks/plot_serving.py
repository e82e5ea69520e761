"""Draw ``results/serving_h100.csv``: speed against length and batch, one line a backend."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results/serving_h100.csv"
Row = dict[str, str]


def newest_runs(path: Path) -> dict[tuple[str, str, str], list[Row]]:
    """{(model, workload, backend): rows}, in order, of the commit that was measured last."""
    runs: dict[tuple[str, str, str], list[Row]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["workload"], row["backend"])
            same = [old for old in runs.get(key, []) if old["commit"] == row["commit"]]
            runs[key] = [*same, row]
    return runs


def inputs(row: Row) -> float:
    """Prompt tokens of one request, in thousands."""
    return int(row["input_tokens"]) / int(row["requests"]) / 1024


def requests(row: Row) -> float:
    """Requests at a time."""
    return int(row["requests"])


class Curve(NamedTuple):
    """One panel: which rows, and what is drawn of them."""

    title: str
    chosen: Callable[[Row], bool]
    x: Callable[[Row], float]
    x_label: str
    y: Callable[[Row], float]
    y_label: str


CURVES = (
    Curve(
        "Decoding 8 requests",
        lambda row: row["workload"].startswith("decode-8x"),
        inputs,
        "prompt, K tokens",
        lambda row: requests(row) * 1000 / float(row["itl_p50_ms"]),
        "tokens a second",
    ),
    Curve(
        "One prompt",
        lambda row: row["workload"].startswith("prefill-"),
        inputs,
        "prompt, K tokens",
        lambda row: float(row["ttft_p50_ms"]) / 1000,
        "time to the first token, s",
    ),
    Curve(
        "Decoding at 32K",
        lambda row: row["workload"].startswith("decode-") and row["workload"].endswith("x32K"),
        requests,
        "requests at a time",
        lambda row: float(row["itl_p50_ms"]),
        "time between tokens, ms",
    ),
)


def plot(path: Path, picture: Path, model: str) -> None:
    """Draw the newest rows of one model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    newest = [rows[-1] for (of, *_), rows in newest_runs(path).items() if of == model]
    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(14, 4.5), layout="constrained")
    for axes, curve in zip(panels, CURVES, strict=True):
        for backend in sorted({row["backend"] for row in newest}):
            mine = [row for row in newest if row["backend"] == backend and curve.chosen(row)]
            points = sorted((curve.x(row), curve.y(row)) for row in mine)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=backend)
        axes.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label, ylim=(0, None))
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in newest))
    figure.suptitle(f"{model} served on {gpus}")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    plot(RESULTS, RESULTS.with_suffix(".png"), sys.argv[1] if sys.argv[1:] else "llama-3.1-8b")
