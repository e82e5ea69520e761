"""Rows of ``results/`` as pandas' tables, and these as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
KERNELS = ("case", "kind", "plan", "mode", "method", "inputs", "gpu")
QUALITY = ("model", "config", "task", "length")
SERVING = ("model", "workload", "backend")
"""Columns that say what was measured, in the CSVs of each benchmark."""


def read(path: Path) -> pd.DataFrame:
    """A CSV's rows; an empty plan and an empty mode are names, not gaps."""
    # A commit of digits alone is no number.
    return pd.read_csv(path, dtype={"commit": str}).fillna({"plan": "", "mode": ""})


def newest(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV's rows; of those that are alike in ``columns``, measured twice, the newest."""
    return read(path).drop_duplicates(list(columns), keep="last")


def newest_runs(path: Path) -> pd.DataFrame:
    """Rows of serving, several a run: of each server, workload and backend the last commit's."""
    rows = read(path)
    return rows[rows["commit"] == rows.groupby(list(SERVING))["commit"].transform("last")]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out one table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def laid_out(corner: Sequence[str], table: pd.DataFrame, form: str) -> str:
    """Lay out a table of numbers. corner: names of the index; form: of a number; gaps are empty."""
    names = [name if isinstance(name, tuple) else (name,) for name in table.columns]
    lines = []
    for index, row in table.iterrows():
        indices = index if isinstance(index, tuple) else (index,)
        lines.append([*map(str, indices), *cells(row, form)])
    return markdown([*corner, *(", ".join(map(str, name)) for name in names)], lines)


def cells(values: Iterable[float], form: str) -> list[str]:
    """Numbers as text; gaps are empty."""
    return ["" if pd.isna(value) else form.format(value) for value in values]


def rounded(value: float) -> str:
    """A figure of serving as text: no more digits than runs agree in."""
    return f"{value:,.{0 if value >= 100 else 1}f}"
