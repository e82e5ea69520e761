"""What sparse attention costs in answers: a table and a picture of ``quality_models.csv``."""

import sys
from pathlib import Path

import pandas as pd

from benchmarks.tables import QUALITY, RESULTS, newest

HARD = ("niah_multikey_2", "niah_multikey_3")
"""RULER's tasks that real models lose answers in first: one key among many alike."""


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over RULER's tasks, a row a (model, config): differences by length, and of HARD tasks.

    mean, worst: of all tasks and lengths, and of the task that loses most, a mean over lengths. A
    length's cell, and these, are empty where a configuration was not asked all tasks.
    """
    ruler = rows[(rows["task"] != "perplexity") & (rows["config"] != "dense")]
    cells = ruler.groupby(["model", "config", "length"])
    tasks = cells["task"].nunique()
    table = cells["diff"].mean().where(tasks == tasks.max()).unstack("length")
    whole = table.notna().all(axis=1)
    table["mean"] = table.mean(axis=1).where(whole)
    by_task = ruler.groupby(["model", "config", "task"])["diff"].mean()
    table["worst"] = by_task.groupby(["model", "config"]).min().where(whole)
    hard = ruler[ruler["task"].isin(HARD) & (ruler["length"] >= 16384)]
    groups = hard.groupby(["model", "config"])
    table["hard"] = groups["diff"].mean().where(groups["task"].nunique() == len(HARD))
    table["n"] = groups["n"].sum()
    longest = hard[hard["length"] > 30000].groupby(["model", "config"])
    shares = ["prefill_read", "decode_read"]
    return table.join(longest[shares].mean()).reset_index()


def plot(path: Path, picture: Path) -> None:
    """Draw scores against keys read in prefill, one panel a length, one point a configuration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = newest(path, QUALITY)
    rows = rows[rows["task"].isin(HARD)].fillna({"prefill_read": 1.0})
    lengths = sorted(rows["length"].unique())
    figure, grid = pyplot.subplots(
        1, len(lengths), figsize=(4 * len(lengths), 4), layout="constrained", squeeze=False
    )
    for axes, length in zip(grid[0], lengths, strict=True):
        mine = rows[rows["length"] == length].groupby(["model", "config"])
        for (model, config), cell in mine[["prefill_read", "score"]].mean().iterrows():
            axes.plot(cell["prefill_read"], cell["score"], "o")
            axes.annotate(f"{config}\n{model}", tuple(cell), fontsize=6)
        axes.set(title=f"{length} tokens", xlabel="keys read in prefill", xlim=(0, 1.25))
    grid[0][0].set_ylabel("score where one key among many alike is looked up")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "quality_models.csv"
    plot(source, source.with_suffix(".png"))
