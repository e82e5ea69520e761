"""What a process serves with, for those who run the server: log, `/metrics`, `/server_info`."""

from collections.abc import Callable

from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.dense import default_dense_backend

FIELDS: dict[str, Callable[[KascadeConfig], object]] = {
    "plan": lambda config: config.plan.model,
    "anchors": lambda config: ",".join(map(str, config.plan.anchors)),
    "heads": lambda config: config.heads,
    "topk_ratio": lambda config: config.budget.ratio,
    "min_k": lambda config: config.budget.min_k,
    "prefill_topk_ratio": lambda config: config.prefill_budget.ratio,
    "prefill_min_k": lambda config: config.prefill_budget.min_k,
    "phases": lambda config: config.phases,
    "selection": lambda config: config.selection,
    "exact": lambda config: config.exact,
    "kv_cache_dtype": lambda config: config.kv_cache_dtype,
    "dense_backend": lambda config: config.dense_backend or default_dense_backend(),
}


def in_force(config: KascadeConfig) -> dict[str, str]:
    """Return plan, budgets and choices as text, by the names in ``FIELDS``."""
    return {name: str(value_of(config)) for name, value_of in FIELDS.items()}
