"""Draw the composites of a kernel benchmark's CSV: speed over FlashAttention-3, one bar a mode."""

import csv
from pathlib import Path


def newest(path: Path) -> list[dict[str, str]]:
    """The CSV's rows; where something was measured twice on one GPU, the newest."""
    names = ("case", "kind", "plan", "mode", "method", "inputs", "gpu")
    with open(path, newline="") as file:
        rows = {tuple(row[name] for name in names): row for row in csv.DictReader(file)}
    return list(rows.values())


def plot(path: Path, picture: Path) -> None:
    """Draw the composites of the CSV at ``path``, random inputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in newest(path) if r["kind"] == "composite" and r["inputs"] == "random"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    bars = list(dict.fromkeys((row["plan"], row["mode"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    for index, bar in enumerate(bars):
        mine = {
            row["case"]: float(row["speedup"]) for row in rows if (row["plan"], row["mode"]) == bar
        }
        places = [
            case + (index - (len(bars) - 1) / 2) * 0.8 / len(bars) for case in range(len(cases))
        ]
        heights = [mine.get(case, 0.0) for case in cases]
        drawn = axes.bar(places, heights, 0.8 / len(bars), label=", ".join(bar))
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linestyle="--", label="FlashAttention-3")
    axes.set_xticks(range(len(cases)), cases, rotation=20)
    gpus = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    axes.set(ylabel="times as fast as FlashAttention-3", title=f"Attention of all layers, {gpus}")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(picture, dpi=120)
