"""From rows of ``kascade eval`` to tables and a plot; no measuring here.

Labels such as ``quest 5%`` and ``quest 10%`` are one method at several budgets.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from kascade_sglang.errors import EvaluationError
from kascade_sglang.files import why_undrawable

Row = dict[str, Any]
KINDS = (".png", ".svg", ".pdf")
BUDGET = re.compile(r"(.+) (\d+(?:\.\d+)?)%")
NEAR_DENSE = 95
"""Percent from which the second half of a plot against budgets starts."""


def _percent(share: str) -> str:
    return f"{float(share):.1%}" if share else "-"


def table(rows: list[Row]) -> Table:
    """One line a task and length; notes stand below as numbers."""
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    shown = Table(title="Scores, 0 to 100; perplexity: lower is better")
    left = ("label", "task", "metric", "note")
    names = ("label", "task", "length", "n", "metric", "score", "95 %", "prompt tokens")
    for name in (*names, "keys read, prefill", "keys read, decode", "s a reply", "note"):
        justify = "left" if name in left else "right"
        shown.add_column(name, justify=justify, no_wrap=name in ("task", "score", "95 %"))
    for row in rows:
        shown.add_row(
            escape(row["label"]),
            row["task"],
            row["length"] or "-",
            str(row["n"]),
            row["metric"],
            row["score"],
            f"{row['low']}-{row['high']}",
            str(row["prompt_tokens"]),
            _percent(row["prefill_attended"]),
            _percent(row["decode_attended"]),
            row["seconds"],
            f"{notes.index(row['note']) + 1}" if row["note"] else "",
        )
    if notes:
        shown.caption = escape("\n".join(f"{place}: {note}" for place, note in enumerate(notes, 1)))
        shown.caption_justify = "left"
    return shown


def scored(rows: Iterable[Row]) -> list[Row]:
    """Rows whose score is a percentage; of a label's task and length the newest."""
    cells = {(r["label"], r["model"], r["task"], r["length"]): r for r in rows}
    return [row for row in cells.values() if row["metric"] != "perplexity"]


def means(rows: Iterable[Row]) -> dict[str, tuple[float, int]]:
    """{label: (mean of all its replies' scores in percent, how many they are)}."""
    labels: dict[str, list[Row]] = defaultdict(list)
    for row in scored(rows):
        labels[row["label"]].append(row)
    return {label: _mean(group) for label, group in labels.items()}


def _mean(rows: list[Row]) -> tuple[float, int]:
    count = sum(int(row["n"]) for row in rows)
    return math.fsum(float(row["score"]) * int(row["n"]) for row in rows) / count, count


def summary(rows: list[Row]) -> Table:
    """One line a label: what it read in prefill, mean scores by length and over all replies."""
    cells = scored(rows)
    lengths = sorted({row["length"] for row in cells}, key=lambda length: int(length or 0))
    shown = Table(title="Mean scores over tasks, 0 to 100")
    shown.add_column("label")
    for name in ("keys read, prefill", *(length or "no length" for length in lengths), "all", "n"):
        shown.add_column(name, justify="right")
    for label, (mean, count) in means(cells).items():
        mine = [row for row in cells if row["label"] == label]
        groups = ([row for row in mine if row["length"] == length] for length in lengths)
        by_length = [f"{_mean(group)[0]:.1f}" if group else "" for group in groups]
        shares = [float(row["prefill_attended"]) for row in mine if row["prefill_attended"]]
        span = f"{min(shares):.0%}-{max(shares):.0%}" if shares else "-"
        shown.add_row(escape(label), span, *by_length, f"{mean:.1f}", str(count))
    return shown


def check_target(picture: Path, results: Path) -> None:
    """Refuse a plot before anything is asked where it could not be written, or not beside them."""
    if why := why_undrawable(picture, KINDS, {"--out": results}):
        raise EvaluationError(f"--plot {picture}: {why}")


def check_drawable(picture: Path, rows: Iterable[Row]) -> list[Row]:
    """Rows that a plot shows, by ``length`` and ``metric``; raises EvaluationError for none."""
    drawn = [row for row in rows if row["length"] and row["metric"] != "perplexity"]
    if not drawn:
        raise EvaluationError(
            f"--plot {picture}: expected a task with a score at a length, got none; drop --plot or "
            "add a task such as niah_single_1"
        )
    return drawn


def plot(rows: list[Row], picture: Path) -> None:
    """Draw scores against budgets where labels name them, otherwise against lengths.

    Raises EvaluationError where no row has a length or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = check_drawable(picture, rows)
    draw = _by_budget if any(BUDGET.fullmatch(row["label"]) for row in drawn) else _by_length
    figure = pyplot.figure(figsize=(10, 4.5), layout="constrained")
    draw(figure, drawn)
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--plot {picture}: cannot write ({error})") from error
    finally:
        pyplot.close(figure)


def _by_budget(figure: Any, rows: list[Row]) -> None:
    """Mean score against budget, one line a method, and once more what is near dense."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    level = {}
    for label, (mean, _) in means(rows).items():
        if found := BUDGET.fullmatch(label):
            lines[found[1]].append((float(found[2]), mean))
        else:
            level[label] = mean
    for axes, lowest in zip(figure.subplots(1, 2), (0, NEAR_DENSE), strict=True):
        for method, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=method)
        for label, mean in level.items():
            axes.axhline(mean, color="black", linestyle="--", label=label)
        axes.set(xlabel="budget, % of the context", ylim=(lowest, 100 + (100 - lowest) / 50))
    figure.axes[0].set(ylabel="mean score")
    figure.axes[0].legend()


def _by_length(figure: Any, rows: list[Row]) -> None:
    """Score against length with its interval, one line a label and task."""
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        lines[row["label"], row["task"]].append(row)
    labels = {label for label, _ in lines}
    ticks = sorted({int(row["length"]) for points in lines.values() for row in points})
    for place, ((label, task), points) in enumerate(lines.items()):
        points.sort(key=lambda row: int(row["length"]))
        scores = [float(row["score"]) for row in points]
        below = [max(0.0, s - float(row["low"])) for s, row in zip(scores, points, strict=True)]
        above = [max(0.0, float(row["high"]) - s) for s, row in zip(scores, points, strict=True)]
        # Side by side, or the intervals of several tasks would hide one another.
        aside = 1.02 ** (place - (len(lines) - 1) / 2)
        axes.errorbar(
            [aside * int(row["length"]) for row in points],
            scores,
            [below, above],
            marker="o",
            capsize=3,
            label=f"{label} {task}" if len(labels) > 1 else task,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens of prompt and reply", ylabel="score, 95 % interval", ylim=(-2, 102))
    axes.legend(fontsize="small")
