"""Draw curves.png from curves.csv: answer loss and accuracy over the training, by row length."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Read the curve, write the picture."""
    by_length: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    with (HERE / "curves.csv").open() as lines:
        for row in csv.DictReader(lines):
            point = (int(row["step"]), float(row["loss"]), float(row["answer_accuracy"]))
            by_length[int(row["length"])].append(point)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for length, points in sorted(by_length.items()):
        steps, losses, accuracies = zip(*points, strict=True)
        left.semilogy(steps, losses, ".", markersize=2.5, label=f"{length} tokens")
        errors = [max(1 - accuracy, 1e-5) for accuracy in accuracies]
        right.semilogy(steps, errors, ".", markersize=2.5, label=f"{length} tokens")
    left.set(xlabel="step", title="loss on answer tokens")
    right.set(xlabel="step", title="share of answer tokens predicted wrong")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(title="row length", markerscale=4)
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
