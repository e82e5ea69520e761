"""The methods compared, as server arguments and environment."""

from dataclasses import dataclass, replace
from pathlib import Path

from kascade_sglang.demo.server import MODEL, demo_arguments
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan, load_plan


@dataclass(frozen=True)
class Method:
    """One server configuration. heads and ratio are None for dense attention."""

    name: str
    heads: str | None
    ratio: float | None

    @property
    def label(self) -> str:
        """Name for progress lines and plots."""
        if self.ratio is None:
            return self.name
        return f"{self.name} {self.heads} {self.ratio:.0%}"


def all_methods(ratios: list[float]) -> list[Method]:
    """Dense, and every sparse method at every ratio."""
    kinds = (
        ("kascade", "per_head"),
        ("kascade", "pooled"),
        ("oracle", "per_head"),
        ("window", "per_head"),
        ("random", "per_head"),
    )
    sparse = [Method(name, heads, ratio) for ratio in ratios for name, heads in kinds]
    return [Method("dense", None, None), *sparse]


def oracle_plan(plan: Plan) -> Plan:
    """Make every layer an anchor: each attends to its own exact Top-k."""
    return replace(plan, anchors=tuple(range(plan.shape.layers)), similarity={})


def server_arguments(method: Method, dense: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return a method's server arguments and environment; plans are written to ``folder``."""
    if method.ratio is None:
        return demo_arguments(dense), {}
    arguments = [*demo_arguments("kascade", dense), "--kascade-topk-ratio", str(method.ratio)]
    arguments += ["--kascade-heads", method.heads]
    if method.name == "oracle":
        path = folder / "oracle.json"
        oracle_plan(load_plan(MODEL / PLAN_NAME)).save(path)
        arguments += ["--kascade-plan", str(path)]
    selection = method.name if method.name in ("window", "random") else "topk"
    return arguments, {"KASCADE_SELECTION": selection}
