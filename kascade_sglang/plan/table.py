"""A plan as text, for ``kascade plan show``."""

from collections.abc import Sequence
from typing import Any

from kascade_sglang.errors import sentence
from kascade_sglang.plan.measurements import choices_of
from kascade_sglang.plan.presets import warning_of
from kascade_sglang.plan.ranks import rank_losses
from kascade_sglang.plan.schema import IDENTITY, ONE_HOT, LayerRole, Plan

_MATRICES = ("importance", "layer_score", "mass", "error", "choices")
"""Provenance that is shown as columns of the table, or not at all, for its size."""


def describe(plan: Plan) -> str:
    """Return the plan's model, budget, one row per layer, what ranks cost, and provenance."""
    shape = plan.shape
    warning = warning_of(plan)
    lines = [
        *([f"WARNING    {warning}"] if warning else []),
        f"model      {plan.model}",
        f"shape      {shape.layers} layers, {shape.q_heads or '?'} query heads, "
        f"{shape.kv_heads} KV heads, head_dim {shape.head_dim or '?'}, "
        f"hidden {shape.hidden or '?'}",
        f"anchors    {','.join(map(str, plan.anchors))}",
        f"budget     {plan.budget.ratio:g} of the context, at least {plan.budget.min_k} keys"
        + (f", {plan.decode_min_k} in decoding" if plan.decode_min_k is not None else "")
        + (f", {plan.prefill_min_k} in prefill" if plan.prefill_min_k is not None else ""),
        f"heads      {plan.heads}",
        *_pools(plan),
        "",
        *_layer_table(plan),
        *_section("tensor parallel", rank_table(plan)),
        *_section("anchors by count", choice_table(plan)),
        "",
        "provenance",
    ]
    lines += [
        f"  {sentence(name):<16} {sentence(str(value))}"
        for name, value in plan.provenance.items()
        if name not in _MATRICES
    ]
    return "\n".join(lines)


def _pools(plan: Plan) -> list[str]:
    """Say who makes candidate pools, and of what size; nothing of other plans."""
    if plan.pool_rule is None:
        return []
    makers = ",".join(map(str, plan.makers))
    return [f"pools      layers {makers} leave {plan.pool_share:g} of the keys, used in decoding"]


def _layer_table(plan: Plan) -> list[str]:
    importance = plan.provenance.get("importance")
    rows = [("layer", "role", "anchor", "similarity", "importance", "head map")]
    for layer in range(plan.shape.layers):
        borrows = layer in plan.head_map
        lender = plan.maker_of.get(layer, plan.anchor_of[layer])
        rows.append(
            (
                str(layer),
                "pooled anchor" if layer in plan.maker_of else plan.role(layer).value,
                "-" if plan.role(layer) is LayerRole.WINDOW else str(lender),
                _mean_similarity(plan, layer) if borrows else "-",
                _number_at(importance, layer),
                " ".join(map(str, plan.head_map[layer])) if borrows else "-",
            )
        )
    return aligned(rows)


def rank_table(plan: Plan) -> list[str]:
    """Head maps within ranks against the plan's own; empty where no count of ranks fits."""
    losses = rank_losses(plan)
    if not losses:
        return []
    measured = plan.provenance.get("similarity") not in (ONE_HOT, IDENTITY)
    rows = [("ranks", "heads moved", "similarity lost", "worst head")]
    for loss in losses:
        lost = (f"{loss.lost:.4f}", f"{loss.worst:.4f}") if measured else ("-", "-")
        rows.append((str(loss.ranks), f"{loss.moved:.1%}", *lost))
    return aligned(rows)


def choice_table(plan: Plan) -> list[str]:
    """The best anchors of every count tried, by what they were chosen by; none for other plans."""
    choices = choices_of(plan)
    if not choices:
        return []
    by_answers = plan.provenance.get("criterion") == "kl"
    rows = [("count", "answers lose, nats" if by_answers else "objective", "anchors")]
    for anchors, objective in choices:
        rows.append((str(len(anchors)), f"{objective:.4f}", ",".join(map(str, anchors))))
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines, columns aligned left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _mean_similarity(plan: Plan, layer: int) -> str:
    """Share of their own Top-k mass that the layer's heads recover, on average."""
    if plan.provenance.get("similarity") in (ONE_HOT, IDENTITY):
        return "-"  # the map's ones are no measurement
    return f"{sum(map(max, plan.similarity[layer])) / plan.shape.kv_heads:.3f}"


def _number_at(values: Any, index: int) -> str:
    """Provenance is free-form: a hand-written one may hold anything."""
    if not isinstance(values, list) or index >= len(values):
        return "-"
    value = values[index]
    try:
        return f"{value:.4f}" if isinstance(value, (int, float)) else "-"
    except OverflowError:
        return "-"
