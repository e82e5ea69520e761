"""Tables and plots of several labels: means, budgets, and what was measured twice."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from kascade_sglang.evaluation.show import means, plot, summary, table

SHARED = {"model": "m", "metric": "accuracy", "low": "0", "high": "100", "note": ""}


def row(label: str, length: int, score: float, n: int = 10, **cells: str) -> dict[str, str]:
    named = {"label": label, "task": "vt", "length": str(length), "score": str(score)}
    return {**SHARED, "prefill_attended": "", "n": str(n), **named, **cells}


ROWS = [
    row("dense", 1024, 0.0),
    row("dense", 1024, 100.0),
    row("dense", 2048, 50.0, n=30),
    row("ours 5%", 1024, 90.0, prefill_attended="0.1"),
    row("ours 10%", 1024, 95.0, prefill_attended="0.2"),
    row("ours 10%", 1024, 3.5, task="perplexity", metric="perplexity"),
]


def test_means_are_over_replies_and_the_newest_rows() -> None:
    assert means(ROWS) == {"dense": (62.5, 40), "ours 5%": (90.0, 10), "ours 10%": (95.0, 10)}


def test_the_summary_has_a_line_a_label_and_a_column_a_length() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(ROWS))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells == [
        ["dense", "-", "100.0", "50.0", "62.5", "40"],
        ["ours 5%", "10%-10%", "90.0", "", "90.0", "10"],
        ["ours 10%", "20%-20%", "95.0", "", "95.0", "10"],
    ]


@pytest.mark.parametrize(("rows", "x"), [(ROWS, "budget"), (ROWS[:3], "tokens")])
def test_labels_with_budgets_are_drawn_against_them(
    rows: list[dict[str, str]], x: str, tmp_path: Path
) -> None:
    plot(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert f"<!-- {x}" in drawn and ("<!-- ours -->" in drawn) == (x == "budget")


def test_labels_and_notes_are_text_and_no_markup() -> None:
    cells = {"note": "see [/i]", "seconds": "1", "prompt_tokens": "1", "decode_attended": ""}
    rows = [row("a [/] [bold]b", 1024, 1.0, task="vt", **cells)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(rows))
    console.print(summary(rows))
    shown = console.export_text()
    assert shown.count("a [/] [bold]b") == 2 and "see [/i]" in shown


def test_a_version_is_no_budget(tmp_path: Path) -> None:
    plot([row("x 1.2.3%", 1024, 50.0)], tmp_path / "plot.svg")
    assert "tokens of prompt" in (tmp_path / "plot.svg").read_text()
