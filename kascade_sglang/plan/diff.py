"""How two plans differ, for ``kascade plan diff``."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from kascade_sglang.errors import sentence
from kascade_sglang.plan.schema import LayerRole, Plan

_SHOWN = 60


def differences(a: Plan, b: Plan) -> list[str]:
    """Return one line for each thing that differs, ``name  a | b``; empty for equal plans."""
    return [*_settings(a, b), *_layers(a, b), *_provenance(a, b)]


def _settings(a: Plan, b: Plan) -> Iterator[str]:
    for name, one, other in (
        ("model", a.model, b.model),
        *((key, value, asdict(b.shape)[key]) for key, value in asdict(a.shape).items()),
        ("windowed", _numbers(a.windowed), _numbers(b.windowed)),
        ("anchors", _numbers(a.anchors), _numbers(b.anchors)),
        ("topk_ratio", a.budget.ratio, b.budget.ratio),
        ("min_k", a.budget.min_k, b.budget.min_k),
        ("decode_min_k", a.decode_min_k, b.decode_min_k),
        ("prefill_min_k", a.prefill_min_k, b.prefill_min_k),
        ("makers", _numbers(a.makers), _numbers(b.makers)),
        ("pool_share", a.pool_share, b.pool_share),
        ("heads", a.heads, b.heads),
    ):
        if one != other:
            yield _line(name, one, other)


def _layers(a: Plan, b: Plan) -> Iterator[str]:
    """Layers that do something else; those beyond the shorter plan are the settings' affair."""
    for layer in range(min(a.shape.layers, b.shape.layers)):
        one, other = _role(a, layer), _role(b, layer)
        if one != other:
            yield _line(f"layer {layer}", one, other)
        elif layer in a.head_map and a.shape.kv_heads == b.shape.kv_heads:
            yield from _head_map(a, b, layer)


def _head_map(a: Plan, b: Plan, layer: int) -> Iterator[str]:
    if a.head_map[layer] != b.head_map[layer]:
        one, other = (" ".join(map(str, plan.head_map[layer])) for plan in (a, b))
        yield _line(f"layer {layer}", f"head map {one}", other)
    change = np.abs(np.array(a.similarity[layer]) - np.array(b.similarity[layer])).max()
    if change > 0:
        yield f"{f'layer {layer}':<14}  similarities differ by up to {change:.6f}"


def _provenance(a: Plan, b: Plan) -> Iterator[str]:
    for name in sorted(set(a.provenance) | set(b.provenance)):
        one, other = a.provenance.get(name, "-"), b.provenance.get(name, "-")
        if one == other:
            continue
        if isinstance(one, (list, dict)) or isinstance(other, (list, dict)):
            yield f"{name:<14}  differs"
        else:
            yield _line(name, one, other)


def _role(plan: Plan, layer: int) -> str:
    role = plan.role(layer)
    if layer in plan.maker_of:
        return f"selects of {plan.maker_of[layer]}'s pool"
    return f"reuses {plan.anchor_of[layer]}" if role is LayerRole.REUSE else role.value


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values)) or "none"


def _line(name: str, one: Any, other: Any) -> str:
    shown = (sentence(str(value))[:_SHOWN] for value in (one, other))
    return f"{sentence(name):<14}  {' | '.join(shown)}"
