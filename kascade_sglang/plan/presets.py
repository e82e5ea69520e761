"""Anchors that the paper names, for models nobody need calibrate before a first try.

The paper publishes which layers are anchors, not which heads borrow from which, so a preset's head
map is the identity. It is said loudly wherever one is used: a calibrated plan answers better.
"""

import os
import re
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from kascade_sglang.files import expand
from kascade_sglang.plan.schema import IDENTITY, ModelShape, Plan, PlanError

PREFIX = "preset:"
"""``--kascade-plan preset:Qwen3-8B`` names a preset where a path would stand."""

_SOURCE = "preset: anchors named by arXiv 2512.16391"
_LLAMA_8B = ModelShape(layers=32, q_heads=32, kv_heads=8, head_dim=128, hidden=4096)
_QWEN3_8B = ModelShape(layers=36, q_heads=32, kv_heads=8, head_dim=128, hidden=4096)


class _Preset(NamedTuple):
    shape: ModelShape
    anchors: tuple[int, ...]


PRESETS = {
    "Llama-3.1-8B-Instruct": _Preset(_LLAMA_8B, (0, 2, 8, 13, 14)),
    "DeepSeek-R1-Distill-Llama-8B": _Preset(_LLAMA_8B, (0, 2, 8, 13, 14)),
    "Qwen3-8B": _Preset(_QWEN3_8B, (0, 2, 7, 14, 23)),
}
_QUANTISED = re.compile(
    r"([-_.](fp8|fp4|nvfp4|mxfp4|bf16|fp16|f16|awq|gptq|autoround|int[48]|[48]bit|w\d+a\d+|bnb|hf"
    r"|unsloth|quantized|dynamic|static|block|kv|marlin|g\d+|q\d(_[a-z0-9]+)*|gguf))+$"
)
"""Ends of names of the same model with other weights; its shape is compared as well."""
_ALIASES = {
    "meta-llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "qwen2.5-coder-0.5b-instruct": "qwen2.5-coder-0.5b",
    "qwen2.5-coder-1.5b-instruct": "qwen2.5-coder-1.5b",
}


def preset(name: str) -> Plan:
    """Return the preset of this name; raises PlanError, listing those there are.

    >>> preset("Qwen/Qwen3-8B").anchors
    (0, 2, 7, 14, 23)
    """
    for known, (shape, anchors) in PRESETS.items():
        if same_name(known, name):
            return identity_plan(known, shape, anchors, _SOURCE)
    raise PlanError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")


def identity_plan(model: str, shape: ModelShape, anchors: tuple[int, ...], source: str) -> Plan:
    """Return a plan whose heads borrow from the anchor heads of their own number."""
    reuse = [layer for layer in range(shape.layers) if layer not in anchors]
    return Plan(
        model=model,
        shape=shape,
        anchors=anchors,
        similarity=dict.fromkeys(reuse, identity_similarity(shape.kv_heads)),
        provenance={"source": source, "similarity": IDENTITY},
    )


def identity_similarity(kv_heads: int) -> tuple[tuple[float, ...], ...]:
    """Similarity of a reuse layer whose heads borrow from the anchor heads of their own number."""
    return tuple(map(tuple, np.eye(kv_heads).tolist()))


def preset_for(model: str, shape: ModelShape) -> Plan | None:
    """Return the preset for a model, by the last part of its id or folder and by its shape."""
    try:
        plan = preset(model)
    except PlanError:
        return None
    return plan if plan.shape == shape else None


def warning_of(plan: Plan) -> str | None:
    """Return the sentence to say loudly before a plan is used, None for measured plans."""
    if plan.provenance.get("similarity") != IDENTITY:
        return None
    anchors = ",".join(map(str, plan.anchors))
    return (
        f"plan: the preset for {plan.model} holds the paper's anchors and an identity head map "
        "that nobody has measured, so answers may be worse than a calibrated plan's; make one "
        f"with `kascade calibrate --model M --anchors {anchors} --out plan.json`"
    )


def presets_of(shape: ModelShape) -> list[str]:
    """Return the names of the presets for models of a shape."""
    return [name for name, known in PRESETS.items() if known.shape == shape]


def same_name(one: str, other: str) -> bool:
    """Say whether two ids or folders end in the same model's name, quantised or not.

    >>> same_name("Qwen/Qwen3-8B", "/models/qwen3-8b/"), same_name("Qwen3-8B", "Qwen3-4B")
    (True, False)
    """
    return not _keys(one).isdisjoint(_keys(other))


def _keys(model: str) -> set[str]:
    """Return a model's name as the last part of its id or folder says it, and as links do."""
    folder = expand(model)
    paths = {PurePath(model)} | ({folder.resolve()} if os.path.exists(folder) else set())
    return {_key(path) for path in paths} - {""}


def _key(path: PurePath) -> str:
    name = path.name
    # The Hub's cache: models--Qwen--Qwen3-8B/snapshots/COMMIT.
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        name = path.parents[1].name
    # ModelScope's cache writes dots so.
    name = name.rpartition("--")[2].replace("___", ".").lower()
    return _ALIASES.get(_QUANTISED.sub("", name), _QUANTISED.sub("", name))
