"""What the user asked for, merged once into one frozen object.

Precedence: command-line flag, environment variable, ``"kascade"`` key of the model's config,
then the plan's own defaults. This module alone reads the environment.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kascade_kernels.budget import Budget
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.library import find_plan
from kascade_sglang.plan.schema import ModelShape, Plan

MB = 2**20
PREFILL_MIN_K = 4096
"""Keys that a tile attends to in prefill at least, where neither user nor plan says otherwise.

A tile's 32 queries of every head of a group share one list, so it must hold what each of them
looks for. What real models lose in prefill depends on how many keys a list has more than on which
share of the context they are (``benchmarks/results/prefill_rules.csv``)."""
SCORE_MEMORY = 768 * MB
"""Room for 64 requests that decode with a context of 128K in the shape of Llama-3.1-8B."""
FLAGS_VARIABLE = "KASCADE_FLAGS"
"""Carries the parsed flags, as JSON, to the processes that SGLang starts."""

ONE_LIST = ("omnikv", "lessismore")
"""Selections that are one list for all heads, whatever ``heads`` says."""


class Settings(BaseModel):
    """One source's settings; None where the source is silent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str | None = None
    topk_ratio: float | None = None
    min_k: int | None = None
    heads: Literal["per_head", "pooled"] | None = None
    dense_backend: str | None = None
    selection: Literal["topk", "window", "random", "quest", "omnikv", "lessismore"] | None = None
    exact: bool | None = None
    phases: Literal["both", "decode"] | None = None
    preset: Literal["fast", "balanced", "careful"] | None = None
    prefill_topk_ratio: float | None = None
    prefill_min_k: int | None = None
    score_memory_mb: int | None = None


PRESETS = {
    "fast": {"prefill_min_k": 128},
    "balanced": {},
    "careful": {"phases": "decode"},
}
"""What a preset says where the user says nothing else: prefill as sparse as decoding; the
defaults; prefill dense."""


@dataclass(frozen=True)
class KascadeConfig:
    """A plan and the way it is served.

    budget: of decoding. prefill: of prefill; None is that of decoding.
    dense_backend: SGLang's backend for layer 0; None leaves the choice to the hardware.
    selection: ``topk``, the method; the others (``backend/selectors.py``) exist so that its
        quality can be compared at an equal budget.
    exact: score with the pool's own keys and every query's exact log-sum-exp, not with 8-bit
        copies and an estimate.
    phases: ``both``, or ``decode`` where prefill attends to every key and only decoding is sparse.
    score_memory: bytes that scores of one launch may take.
    batch_invariant: sums of a request's decoding are in the same order in any batch.
    """

    plan: Plan
    budget: Budget
    heads: str
    dense_backend: str | None = None
    selection: str = "topk"
    exact: bool = False
    phases: str = "both"
    score_memory: int = SCORE_MEMORY
    batch_invariant: bool = False
    prefill: Budget | None = None

    @property
    def pooled(self) -> bool:
        """Whether one selection serves all KV heads of a layer."""
        return self.heads == "pooled" or self.selection in ONE_LIST

    @property
    def prefill_budget(self) -> Budget:
        """How many keys a tile attends to in prefill."""
        return self.prefill or self.budget

    @property
    def sparse_prefill(self) -> bool:
        """Whether prefill is sparse, too."""
        return self.phases == "both"


def environment_variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"KASCADE_{name.upper()}"


def _parse(source: str, values: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "kascade"
        known = ", ".join(Settings.model_fields)
        if first["type"] == "extra_forbidden":
            raise KascadeError(f"{source}: unknown setting {name!r}; known: {known}") from error
        raise KascadeError(f"{source}: {name}: {first['msg']}, got {first['input']!r}") from error


def read_settings(model_options: Any, environ: Mapping[str, str] | None = None) -> Settings:
    """Merge flags, environment and the model config's ``kascade`` key, in that order.

    model_options: the value of that key, None if there is none.
    Raises KascadeError naming the source and the setting that is wrong.
    """
    environ = os.environ if environ is None else environ
    if model_options is not None and not isinstance(model_options, Mapping):
        raise KascadeError(
            f'model config "kascade": expected an object of settings, got {model_options!r}'
        )
    from_environment = {
        name: environ[environment_variable(name)]
        for name in Settings.model_fields
        if environ.get(environment_variable(name))
    }
    sources = (
        _parse('model config "kascade"', model_options or {}),
        _parse("environment KASCADE_*", from_environment),
        _parse("command line", json.loads(environ.get(FLAGS_VARIABLE) or "{}")),
    )
    merged: dict[str, Any] = {}
    for settings in sources:
        merged.update(settings.model_dump(exclude_none=True))
    return Settings(**{**PRESETS[merged.get("preset", "balanced")], **merged})


def every_layer_an_anchor(plan: Plan) -> Plan:
    """Return a plan by which every layer selects for itself."""
    return replace(plan, anchors=tuple(range(plan.shape.layers)), similarity={})


def load_config(
    model: str,
    shape: ModelShape,
    model_options: Any = None,
    environ: Mapping[str, str] | None = None,
) -> KascadeConfig:
    """Return the configuration for serving ``model``; raises KascadeError with one sentence."""
    settings = read_settings(model_options, environ)
    plan = find_plan(model, shape, settings.plan)

    budget = _budget("", plan.budget, settings.topk_ratio, settings.min_k)
    least = PREFILL_MIN_K if plan.prefill_min_k is None else plan.prefill_min_k
    default = Budget(budget.ratio, max(budget.min_k, least))
    prefill = _budget("prefill_", default, settings.prefill_topk_ratio, settings.prefill_min_k)
    memory = settings.score_memory_mb
    if memory is not None and memory < 1:
        default = SCORE_MEMORY // MB
        raise KascadeError(f"score_memory_mb: expected at least 1, got {memory}; default {default}")
    selection = settings.selection or "topk"
    return KascadeConfig(
        # Quest hands nothing from layer to layer.
        plan=every_layer_an_anchor(plan) if selection == "quest" else plan,
        budget=budget,
        heads=settings.heads or plan.heads,
        dense_backend=settings.dense_backend,
        selection=selection,
        exact=bool(settings.exact),
        phases=settings.phases or "both",
        score_memory=SCORE_MEMORY if memory is None else memory * MB,
        prefill=prefill,
    )


def _budget(prefix: str, default: Budget, ratio: float | None, min_k: int | None) -> Budget:
    """Return a budget with what the user says instead of the default; raises KascadeError."""
    try:
        return Budget(
            default.ratio if ratio is None else ratio, default.min_k if min_k is None else min_k
        )
    except ValueError as error:
        raise KascadeError(f"{prefix}{error}") from error
