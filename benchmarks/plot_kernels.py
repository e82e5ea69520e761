"""Draw the composites of a kernel benchmark's CSV: speed over FlashAttention-3, one bar a mode."""

from pathlib import Path

from benchmarks.tables import KERNELS, newest


def plot(path: Path, picture: Path) -> None:
    """Draw the composites of the CSV at ``path``, random inputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = newest(path, KERNELS)
    rows = rows[(rows["kind"] == "composite") & (rows["inputs"] == "random")]
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    table = rows.pivot_table(index="case", columns=["plan", "mode"], values="speedup", sort=False)
    table.plot.bar(ax=axes, width=0.8, rot=20, legend=False, xlabel="")
    for bars in axes.containers:
        axes.bar_label(bars, fmt=lambda speed: f"{speed:.1f}" if speed else "", fontsize=7)
    axes.axhline(1, color="black", linestyle="--")
    gpus = ", ".join(rows["gpu"].unique())
    axes.set(ylabel="times as fast as FlashAttention-3", title=f"Attention of all layers, {gpus}")
    labels = ["FlashAttention-3", *map(", ".join, table.columns)]
    handles = [axes.lines[0], *axes.containers]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(picture, dpi=120)
