"""Write the README's tables from the CSVs in ``results/``: ``make readme-tables``.

A table stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``. ``--check`` changes nothing and
fails where the README differs from the CSVs.
"""

import csv
import re
import sys
from pathlib import Path

from kascade_sglang.evaluation.report import mean_accuracy, read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out one table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table() -> str:
    """``make demo``: one column a backend."""
    with open(RESULTS / "demo.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    names = [name for name in runs[0] if name not in ("backend", "commit", "versions", "date")]
    rows = [[name, *(run[name] for run in runs)] for name in names]
    return markdown(["--attention-backend", *(run["backend"] for run in runs)], rows)


def quality_table() -> str:
    """``make eval``: share of right replies, one row a method, one column a budget."""
    rows = read_rows(RESULTS / "quality_demo.csv")
    means = mean_accuracy(rows)
    asked = {
        key: sum(int(r["n"]) for r in rows if (r["method"], r["heads"], r["ratio"]) == key)
        for key in means
    }
    ratios = sorted({key[2] for key in means if key[2]}, key=float)
    lines = []
    for method, heads in dict.fromkeys(key[:2] for key in means):
        name = f"{method}, {heads}" if method == "kascade" else method
        if (method, heads, "") in means:
            key = (method, heads, "")
            cells = [f"{means[key]:.1%} (n={asked[key]})"] * len(ratios)
        else:
            keys = [(method, heads, ratio) for ratio in ratios]
            cells = [f"{means[k]:.1%} (n={asked[k]})" if k in means else "" for k in keys]
        lines.append([name, *cells])
    return markdown(["method", *(f"{float(ratio):.0%}" for ratio in ratios)], lines)


def main() -> int:
    """Fill the README in, or check it."""
    path = ROOT / "README.md"
    text = path.read_text()
    for name, table in (("demo", demo_table()), ("quality", quality_table())):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.S)
        text, found = pattern.subn(lambda match, t=table: match[1] + t + match[2], text)
        if found != 1:
            sys.exit(f"README.md: expected one table between <!-- {name} --> marks, got {found}")
    if "--check" in sys.argv:
        return 0 if text == path.read_text() else 1
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
