"""Draw ``results/serving_h100.csv``: speed against length and batch, one line a backend."""

import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.tables import RESULTS, SERVING, newest


class Curve(NamedTuple):
    """One panel: which workloads, as a regular expression, and which columns of them."""

    title: str
    workloads: str
    x: str
    y: str


PROMPT, BATCH = "prompt, K tokens", "requests at a time"
SPEED, FIRST, BETWEEN = "tokens a second", "time to the first token, s", "time between tokens, ms"
CURVES = (
    Curve("Decoding 8 requests", "decode-8x.*", PROMPT, SPEED),
    Curve("One prompt", "prefill-.*", PROMPT, FIRST),
    Curve("Decoding at 32K", "decode-.*x32K", BATCH, BETWEEN),
)


def plot(path: Path, picture: Path, model: str) -> None:
    """Draw the newest rows of one model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = newest(path, SERVING)
    rows = rows[rows["model"] == model]
    rows = rows.assign(
        **{
            PROMPT: rows["input_tokens"] / rows["requests"] / 1024,
            BATCH: rows["requests"],
            SPEED: rows["requests"] * 1000 / rows["itl_p50_ms"],
            FIRST: rows["ttft_p50_ms"] / 1000,
            BETWEEN: rows["itl_p50_ms"],
        }
    )
    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(14, 4.5), layout="constrained")
    for axes, curve in zip(panels, CURVES, strict=True):
        chosen = rows[rows["workload"].str.fullmatch(curve.workloads)]
        for backend, points in chosen.sort_values(curve.x).groupby("backend"):
            axes.plot(points[curve.x], points[curve.y], marker="o", label=backend)
        axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y, ylim=(0, None))
    figure.suptitle(f"{model} served on {', '.join(rows['gpu'].unique())}")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    source = RESULTS / "serving_h100.csv"
    plot(source, source.with_suffix(".png"), sys.argv[1] if sys.argv[1:] else "llama-3.1-8b")
