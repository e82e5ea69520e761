"""The methods compared, as server arguments and environment."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kascade_sglang.config import every_layer_an_anchor
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.presets import identity_similarity
from kascade_sglang.plan.schema import Plan, load_plan
from kascade_sglang.servers.demo_model import MODEL, demo_arguments

COMPARISONS = ("window", "random", "quest", "omnikv", "lessismore")
"""Methods that are another selection than Kascade's."""


@dataclass(frozen=True)
class Method:
    """One server configuration. heads and ratio are None for dense attention.

    heads: ``per_head`` or ``pooled``; ``no_map`` is per head, without the plan's head map.
    """

    name: str
    heads: str | None
    ratio: float | None

    @property
    def label(self) -> str:
        """Name in results, in which ``show`` finds the budget."""
        if self.ratio is None:
            return self.name
        heads = f", {self.heads}" if self.name == "kascade" else ""
        return f"{self.name}{heads} {100 * self.ratio:g}%"


def all_methods(ratios: list[float]) -> list[Method]:
    """Dense, and every sparse method at every ratio."""
    kinds = [("kascade", heads) for heads in ("per_head", "pooled", "no_map")]
    kinds += [(name, "per_head") for name in ("oracle", *COMPARISONS)]
    sparse = [Method(name, heads, ratio) for ratio in ratios for name, heads in kinds]
    return [Method("dense", None, None), *sparse]


def without_head_map(plan: Plan) -> Plan:
    """Let every head of a reuse layer attend to the keys of the anchor head of its own number.

    Source: "no remapping", an ablation of the paper's (arXiv 2512.16391, section 3.4).
    """
    identity = identity_similarity(plan.shape.kv_heads)
    return replace(plan, similarity=dict.fromkeys(plan.borrowing_layers, identity))


CHANGED_PLANS: dict[str, Callable[[Plan], Plan]] = {
    "oracle per_head": every_layer_an_anchor,
    "kascade no_map": without_head_map,
}


def server_arguments(method: Method, dense: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return a method's server arguments and environment; plans are written to ``folder``."""
    if method.ratio is None:
        return demo_arguments(dense), {}
    arguments = [*demo_arguments("kascade", dense), "--kascade-topk-ratio", str(method.ratio)]
    arguments += ["--kascade-heads", "pooled" if method.heads == "pooled" else "per_head"]
    kind = f"{method.name} {method.heads}"
    if kind in CHANGED_PLANS:
        path = folder / f"{kind.replace(' ', '_')}.json"
        CHANGED_PLANS[kind](load_plan(MODEL / PLAN_NAME)).save(path)
        arguments += ["--kascade-plan", str(path)]
    selection = method.name if method.name in COMPARISONS else "topk"
    return arguments, {"KASCADE_SELECTION": selection}
