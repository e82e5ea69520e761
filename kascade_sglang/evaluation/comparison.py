"""From the CSV of ``make eval`` to a table and a plot; no measuring here."""

import csv
from collections import defaultdict
from pathlib import Path

from rich.table import Table

NEAR_DENSE = 95
"""Percent of right replies from which the plot's second half starts."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the CSV's rows; where a cell was measured twice, the newest."""
    with open(path, newline="") as file:
        rows = {
            tuple(row[name] for name in ("method", "heads", "ratio", "task", "length")): row
            for row in csv.DictReader(file)
        }
    return list(rows.values())


def mean_accuracy(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], float]:
    """Return {(method, heads, ratio): share of right replies over all tasks and lengths}."""
    right: dict[tuple[str, str, str], float] = defaultdict(float)
    asked: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in rows:
        key = row["method"], row["heads"], row["ratio"]
        right[key] += float(row["accuracy"]) * int(row["n"])
        asked[key] += int(row["n"])
    return {key: right[key] / asked[key] for key in right}


def summary(path: Path) -> Table:
    """One line a method and budget: accuracy by task, over all lengths, and what it attended."""
    rows = read_rows(path)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(title="Share of right replies")
    for name in ("method", "heads", "ratio", "attended", *tasks, "all"):
        table.add_column(name, justify="left" if name in ("method", "heads") else "right")
    for key, overall in mean_accuracy(rows).items():
        mine = [row for row in rows if (row["method"], row["heads"], row["ratio"]) == key]
        by_task = []
        for task in tasks:
            task_rows = [row for row in mine if row["task"] == task]
            asked = sum(int(row["n"]) for row in task_rows)
            right = sum(float(row["accuracy"]) * int(row["n"]) for row in task_rows)
            by_task.append(f"{right / asked:.1%}")
        shares = [float(row["attended"]) for row in mine]
        span = f"{min(shares):.0%}-{max(shares):.0%}"
        table.add_row(*key, span, *by_task, f"{overall:.1%}")
    return table


def plot(path: Path, picture: Path) -> None:
    """Draw accuracy against budget, one line a method, and once more what is near dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means = mean_accuracy(read_rows(path))
    figure, (every, best) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    dense = means.get(("dense", "", ""))
    for method, heads in dict.fromkeys((key[0], key[1]) for key in means if key[2]):
        points = sorted((float(k[2]), v) for k, v in means.items() if k[:2] == (method, heads))
        label = f"{method} ({heads})" if method == "kascade" else method
        for axes in (every, best):
            axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], "o-", label=label)
    for axes, lowest in ((every, 0), (best, NEAR_DENSE)):
        if dense is not None:
            axes.axhline(100 * dense, color="black", linestyle="--", label="dense")
        margin = (100 - lowest) / 50
        axes.set(xlabel="budget, % of the context", ylim=(lowest, 100 + margin))
    every.set(ylabel="right replies, %")
    every.legend()
    figure.savefig(picture, dpi=120)
