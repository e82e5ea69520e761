"""What a process serves with, for those who run the server: log, `/metrics`, `/server_info`."""

from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.dense import default_dense_backend

FIELDS = (
    "plan",
    "anchors",
    "heads",
    "topk_ratio",
    "min_k",
    "prefill_topk_ratio",
    "prefill_min_k",
    "phases",
    "selection",
    "exact",
    "kv_cache_dtype",
    "dense_backend",
)


def in_force(config: KascadeConfig) -> dict[str, str]:
    """Return plan, budgets and choices as text, by the names in ``FIELDS``."""
    decode, prefill = config.budget, config.prefill_budget
    values = (
        config.plan.model,
        ",".join(map(str, config.plan.anchors)),
        config.heads,
        decode.ratio,
        decode.min_k,
        prefill.ratio,
        prefill.min_k,
        config.phases,
        config.selection,
        config.exact,
        config.kv_cache_dtype,
        config.dense_backend or default_dense_backend(),
    )
    return dict(zip(FIELDS, map(str, values), strict=True))
