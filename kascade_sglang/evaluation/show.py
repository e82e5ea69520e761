"""From rows of ``kascade eval`` to a table and a plot; no measuring here."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from kascade_sglang.errors import EvaluationError
from kascade_sglang.files import why_undrawable

Row = dict[str, Any]
KINDS = (".png", ".svg", ".pdf")


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
            row["label"],
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
        shown.caption = "\n".join(f"{place}: {note}" for place, note in enumerate(notes, 1))
        shown.caption_justify = "left"
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
    """Draw score against length with its interval, one line a label and task, where lengths are.

    Raises EvaluationError where no row has a length or the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in check_drawable(picture, rows):
        lines[row["label"], row["task"]].append(row)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
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
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--plot {picture}: cannot write ({error})") from error
    finally:
        pyplot.close(figure)
