"""One page about a calibrated plan: what was measured, which anchors came out, what ranks cost.

``.png`` and ``.svg`` are the drawing; ``.html`` is the drawing and the plan's table, in one file.
"""

import html
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kascade_sglang.files import why_undrawable, write_atomically
from kascade_sglang.plan.measurements import Measurements, measurements_of
from kascade_sglang.plan.schema import Plan, PlanError
from kascade_sglang.plan.table import choice_table, describe, rank_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".html")

_PAGE = (11.7, 8.3)
"""Inches: A4, landscape."""


def check_target(option: str, path: Path, others: Mapping[str, Path | None]) -> None:
    """Refuse a report that could not be written, before anything is measured for it.

    others: see ``why_unwritable``.
    """
    if why := why_undrawable(path, KINDS, others):
        raise PlanError(f"{option} {path}: {why}")


def write_report(plan: Plan, path: Path) -> None:
    """Draw a plan's measurements; raises PlanError where it holds none or the disk is full."""
    measured = measurements_of(plan)
    figure = _draw(plan, measured)
    page = io.BytesIO()
    kind = "svg" if path.suffix == ".html" else path.suffix.removeprefix(".")
    # No date in the file: the same plan gives the same page.
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(page, format=kind, dpi=130, metadata=metadata)
    content = page.getvalue()
    if path.suffix == ".html":
        content = _page(plan, content.decode()).encode()
    try:
        write_atomically(path, content)
    except OSError as error:
        raise PlanError(f"{path}: cannot write the report ({error.strerror})") from error


def _page(plan: Plan, svg: str) -> str:
    title = html.escape(f"Kascade calibration of {plan.model}")
    drawing = svg[svg.index("<svg") :]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<body>{drawing}<pre>{html.escape(describe(plan))}</pre></body></html>\n"
    )


def _draw(plan: Plan, measured: Measurements) -> "Figure":
    import matplotlib
    from matplotlib.figure import Figure

    # Without it the ids inside an SVG are drawn at random.
    matplotlib.rcParams["svg.hashsalt"] = "kascade"
    figure = Figure(figsize=_PAGE, layout="constrained")
    provenance = plan.provenance
    figure.suptitle(
        f"{plan.model}: anchors {','.join(map(str, plan.anchors))}; {provenance.get('prompts')} "
        f"prompts, {provenance.get('tokens')} tokens of {provenance.get('prompts_file')}",
        parse_math=False,  # a file's name may hold dollars
    )
    upper, lower = figure.subfigures(2, 1)
    by_loss = plan.provenance.get("criterion") == "kl" and measured.choices
    left, *middle, right = upper.subplots(1, 3 if by_loss else 2)
    _pairs(left, plan, measured.similarity)
    for axis in middle:
        _losses(axis, plan, measured)
    _importance(right, plan, measured)
    axes = lower.subplots(1, len(measured.mass) + 1, width_ratios=[1] * len(measured.mass) + [1.4])
    for axis, (ratio, table) in zip(axes, sorted(measured.mass.items()), strict=False):
        _mass(axis, plan, ratio, table)
    _tables(axes[-1], plan)
    return figure


def _pairs(axis: "Axes", plan: Plan, table: np.ndarray) -> None:
    image = axis.imshow(table, vmin=0, vmax=1, cmap="viridis")
    axis.figure.colorbar(image, ax=axis)
    for anchor in plan.anchors:
        axis.axhline(plan.full_layers.index(anchor), color="white", linewidth=0.5)
    axis.set_title("similarity of layers", fontsize=9)
    axis.set(xlabel="serves layer", ylabel="keys of layer")
    _layer_ticks(plan, axis.set_xticks)
    _layer_ticks(plan, axis.set_yticks)


def _losses(axis: "Axes", plan: Plan, measured: Measurements) -> None:
    counts = [len(anchors) for anchors, _ in measured.choices]
    axis.plot(counts, [loss for _, loss in measured.choices], marker=".")
    axis.axvline(len(plan.anchors), color="tab:red", linewidth=0.8)
    axis.set_title("divergence of answers in nats; this plan red", fontsize=9)
    axis.set(xlabel="anchors", yscale="log")


def _importance(axis: "Axes", plan: Plan, measured: Measurements) -> None:
    colors = ["tab:red" if layer in plan.anchors else "tab:blue" for layer in plan.full_layers]
    axis.bar(range(len(colors)), measured.importance, color=colors)
    axis.set_title("importance, 1 - cos(x, x + update); anchors red", fontsize=9)
    axis.set(xlabel="layer")
    axis.set_yscale("log")
    _layer_ticks(plan, axis.set_xticks)


def _mass(axis: "Axes", plan: Plan, ratio: float, table: np.ndarray) -> None:
    image = axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.figure.colorbar(image, ax=axis)
    title = f"mass in own Top-k, {ratio:.0%}\nmean {table.mean():.3f}, least {table.min():.3f}"
    axis.set_title(title, fontsize=9)
    axis.set(xlabel="KV head", ylabel="layer")
    axis.set_xticks(range(0, table.shape[1], -(-table.shape[1] // 8)))
    _layer_ticks(plan, axis.set_yticks)


def _tables(axis: "Axes", plan: Plan) -> None:
    axis.axis("off")
    lines = [
        "best anchors of every count",
        *choice_table(plan),
        "",
        "tensor parallel, head maps within a rank",
        *rank_table(plan),
        "",
        f"budget {plan.budget.ratio:g}, at least {plan.budget.min_k} keys; {plan.heads}",
    ]
    axis.text(0, 1, "\n".join(lines), family="monospace", fontsize=6.5, va="top")


def _layer_ticks(plan: Plan, set_ticks: Callable[..., object]) -> None:
    """Label every layer where there are few, else about a dozen of them."""
    layers = plan.full_layers
    step = max(1, round(len(layers) / 12))
    set_ticks(range(0, len(layers), step), map(str, layers[::step]))
