"""What the user asked for and what the plan says, merged once into one frozen object."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kascade_kernels.budget import Budget, PoolRule, tile_of
from kascade_sglang.errors import KascadeError
from kascade_sglang.plan.library import find_plan
from kascade_sglang.plan.schema import ModelShape, Plan
from kascade_sglang.settings import MIN_K, PREFILL_MIN_K, Settings, changed, judge_settings

MB = 2**20
SCORE_MEMORY = Settings().score_memory_mb * MB

ONE_LIST = ("omnikv", "lessismore")
"""Selections that are one list for all heads, whatever ``heads`` says."""


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
    kv_cache_dtype: ``fp8_e4m3``, ``fp8_e5m2``, or ``auto``: the model's.
    window: positions that a query of the plan's windowed layers sees.
    max_ratio: the largest share of the context that one request may ask for; None: no longer
        lists than the server's own.
    changed: settings that differ from their defaults, for the log.
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
    kv_cache_dtype: str = "auto"
    window: int = 0
    prefill: Budget | None = None
    max_ratio: float | None = None
    changed: Mapping[str, object] = field(default_factory=dict, compare=False)

    @property
    def pooled(self) -> bool:
        """Whether one selection serves all KV heads of a layer."""
        return self.heads == "pooled" or self.selection in ONE_LIST

    @property
    def fp8(self) -> bool:
        """Whether keys and values are kept in 8 bits, with one scale a layer each."""
        return self.kv_cache_dtype != "auto"

    def window_of(self, layer: int) -> int:
        """Return the positions that a query of a layer sees; 0 where it sees all before it."""
        return self.window if layer in self.plan.windowed else 0

    @property
    def prefill_budget(self) -> Budget:
        """How many keys a tile attends to in prefill."""
        return self.prefill or self.budget

    @property
    def pool_rule(self) -> PoolRule | None:
        """How many keys candidate pools of decoding hold; None where every anchor scores all."""
        return self.plan.pool_rule

    def most_selected(self, phase: str, context: int) -> int:
        """Return how many keys a list may hold in a phase, own tile apart; 'prefill' or 'decode'.

        context: positions that a request may have.
        """
        return self._largest(phase).selected(tile_of(context - 1))

    def most_pooled(self, context: int) -> int:
        """Return how many keys a candidate pool may hold, own tile apart; 0 without pools."""
        rule = self.pool_rule
        return rule.pooled(tile_of(context - 1), self._largest("decode")) if rule else 0

    def _largest(self, phase: str) -> Budget:
        """The largest budget of a request, apart from those of every key."""
        own = self.prefill_budget if phase == "prefill" else self.budget
        return Budget(max(own.ratio, self.max_ratio or 0), own.min_k)

    @property
    def sparse_prefill(self) -> bool:
        """Whether prefill is sparse, too."""
        return self.phases == "both"


def every_layer_an_anchor(plan: Plan) -> Plan:
    """Return a plan by which every layer selects for itself."""
    return replace(plan, anchors=tuple(plan.full_layers), similarity={}, makers=(), pool_share=None)


def without_pools(plan: Plan) -> Plan:
    """Return a plan by which every anchor scores all keys."""
    kept = {layer: plan.similarity[layer] for layer in plan.reuse_layers}
    return replace(plan, similarity=kept, makers=(), pool_share=None)


def _plan_for(selection: str, plan: Plan) -> Plan:
    """Return the plan that a selection is served by."""
    if selection == "quest":  # It hands nothing from layer to layer.
        return every_layer_an_anchor(plan)
    return plan if selection == "topk" else without_pools(plan)


def load_config(
    model: str,
    shape: ModelShape,
    model_options: Any = None,
    environ: Mapping[str, str] | None = None,
) -> KascadeConfig:
    """Return the configuration for serving ``model``; raises KascadeError, a line a reason."""
    config, refused = read_config(model, shape, model_options, environ)
    if refused:
        raise KascadeError("\n".join(refused))
    return config


def read_config(
    model: str,
    shape: ModelShape,
    model_options: Any = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[KascadeConfig, list[str]]:
    """Return a configuration, and why some values are refused, which are the defaults in it.

    Raises KascadeError where no plan is found, with what else is refused.
    """
    settings, refused = judge_settings(model_options, environ)
    try:
        plan = find_plan(model, shape, settings.plan)
    except KascadeError as error:
        for prefix in ("", "prefill_"):
            given = (getattr(settings, f"{prefix}{name}") for name in ("topk_ratio", "min_k"))
            _budget(prefix, Budget(), *given, refused)
        raise KascadeError("\n".join([*refused, str(error)])) from error

    decode_default = _at_least(plan.budget, plan.decode_min_k, MIN_K)
    budget = _budget("", decode_default, settings.topk_ratio, settings.min_k, refused)
    prefill_default = _at_least(budget, plan.prefill_min_k, PREFILL_MIN_K)
    prefill = _budget(
        "prefill_", prefill_default, settings.prefill_topk_ratio, settings.prefill_min_k, refused
    )
    defaults = {
        "topk_ratio": plan.budget.ratio,
        "min_k": decode_default.min_k,
        "prefill_topk_ratio": prefill_default.ratio,
        "prefill_min_k": prefill_default.min_k,
        "heads": plan.heads,
    }
    if settings.max_topk_ratio is not None:
        _budget("max_", budget, settings.max_topk_ratio, None, refused)
    config = KascadeConfig(
        plan=_plan_for(settings.selection, plan),
        budget=budget,
        heads=settings.heads or plan.heads,
        dense_backend=settings.dense_backend,
        selection=settings.selection,
        exact=settings.exact,
        phases=settings.phases,
        score_memory=settings.score_memory_mb * MB,
        prefill=prefill,
        max_ratio=settings.max_topk_ratio,
        changed=changed(settings, defaults),
    )
    return config, refused


def _at_least(budget: Budget, planned: int | None, release: int) -> Budget:
    """Return a budget of no fewer keys than the plan wants, or, where it is silent, the release."""
    return Budget(budget.ratio, max(budget.min_k, release if planned is None else planned))


def _budget(
    prefix: str, default: Budget, ratio: float | None, min_k: int | None, refused: list[str]
) -> Budget:
    """Return a budget with what the user says instead of the default; notes what is refused."""
    chosen = default
    for name, value in (("ratio", ratio), ("min_k", min_k)):
        try:
            chosen = chosen if value is None else replace(chosen, **{name: value})
        except ValueError as error:
            refused.append(f"{prefix}{error}")
    return chosen
