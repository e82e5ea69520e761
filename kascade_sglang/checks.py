"""Everything Kascade refuses: one sentence each, all of them at once, before requests come."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kascade_sglang.config import KascadeConfig, read_config
from kascade_sglang.errors import KascadeError, noted
from kascade_sglang.host.dense import WITH_SINKS, default_dense_backend, require_dense_backend
from kascade_sglang.host.facts import RefusedFlag, ServerFacts

HEAD_DIMS = (64, 128, 256)
"""Head dimensions that the kernels are tested with."""
E4M3_CAPABILITY = (8, 9)
"""From where on Triton converts fp8_e4m3."""


def check(facts: ServerFacts) -> KascadeConfig:
    """Return the configuration to serve with.

    Raises KascadeError that says all that is refused, a line each.
    """
    refused = [*flag_reasons(facts.refused_flags), *model_reasons(facts.model.unsupported)]
    config = None
    if not facts.model.unsupported:
        refused += [*_refused_heads(facts), *_refused_window_pool(facts)]
        with noted(refused):
            config, values = read_config(facts.model.path, facts.model.shape, facts.model.options)
            refused += values
            require_dense_backend(config.dense_backend)
    if config is not None:
        refused += reasons(facts, config)
    if refused:
        raise KascadeError("\n".join(refused))
    return replace(
        config,
        batch_invariant=facts.deterministic,
        kv_cache_dtype=facts.kv_cache_dtype,
        window=facts.model.window,
    )


def reasons(facts: ServerFacts, config: KascadeConfig) -> list[str]:
    """Return why this server cannot be served with a configuration, a sentence each."""
    kernels = facts.gpu and config.selection == "topk"
    found = [*_refused_plan(facts, config), *_refused_ranks(facts, config)]
    found += [*_refused_sinks(facts, config), *_refused_speculation(facts, config)]
    found += _refused_hicache(facts, config)
    if facts.deterministic and not facts.gpu:
        found.append(
            "--enable-deterministic-inference: expected a GPU, which SGLang's operations for it "
            "need, got none; drop it"
        )
    return [*found, *_refused_on_gpu(facts, config)] if kernels else found


def flag_reasons(flags: Iterable[RefusedFlag]) -> Iterator[str]:
    """Yield the sentence of each flag."""
    for flag in flags:
        yield (
            f"{flag.flag}: expected {flag.expected} with the kascade backend, got {flag.got}; "
            f"{flag.remedy}"
        )


def model_reasons(unsupported: Iterable[str]) -> Iterator[str]:
    """Yield the sentence of each reason why a model is not served."""
    for reason in unsupported:
        yield f"model: {reason}; serve it with another --attention-backend"


def _refused_on_gpu(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    if facts.model.dtype not in ("bfloat16", "float16"):
        yield f"--dtype: expected bfloat16 or float16 on a GPU, got {facts.model.dtype}"
    if config.plan.shape.head_dim not in HEAD_DIMS:
        yield f"model: expected a head_dim of {HEAD_DIMS}, got {config.plan.shape.head_dim}"
    dense = config.dense_backend or default_dense_backend()
    if facts.deterministic and dense == "flashinfer":
        yield (
            "--kascade-dense-backend: expected fa3 or triton with "
            "--enable-deterministic-inference, got flashinfer, whose sums depend on the cached "
            "prefix; add --kascade-dense-backend triton"
        )
    if facts.kv_cache_dtype == "fp8_e5m2" and dense == "fa3":
        yield (
            "--kv-cache-dtype: expected fp8_e4m3 with fa3 as the dense backend, which reads no "
            "other fp8, got fp8_e5m2; add --kascade-dense-backend triton"
        )
    if facts.kv_cache_dtype == "fp8_e4m3" and facts.capability < E4M3_CAPABILITY:
        yield (
            "--kv-cache-dtype: expected a GPU of compute capability 8.9 at least for fp8_e4m3, got "
            f"{facts.capability[0]}.{facts.capability[1]}; use fp8_e5m2 there"
        )
    if facts.phases == {"decode"} and not config.exact and facts.kv_cache_dtype == "auto":
        yield (
            "--prefill-attention-backend: expected kascade, which keeps 8-bit copies of keys for "
            f"decoding, got {facts.prefill_backend!r}; drop it and set --kascade-phases decode, "
            "or add --kascade-exact"
        )


def _refused_plan(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    expected, got = facts.model.windowed, config.plan.windowed
    if expected != got:
        yield (
            f"plan.windowed: expected {list(expected)}, the layers that SGLang serves with a "
            f"sliding window, got {list(got)}; run `kascade calibrate` for the model you serve"
        )


def _refused_sinks(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    dense = config.dense_backend or default_dense_backend()
    if facts.model.sinks and dense not in WITH_SINKS:
        yield (
            f"--kascade-dense-backend: expected {' or '.join(WITH_SINKS)}, which know attention "
            f"sinks, got {dense}; add --kascade-dense-backend triton (on a CPU it needs "
            "TRITON_INTERPRET=1)"
        )
    if facts.model.sinks and config.selection != "topk":
        yield (
            f"selection: expected topk for a model with attention sinks, got {config.selection}; "
            "compare selections on another model"
        )


def _refused_window_pool(facts: ServerFacts) -> Iterator[str]:
    if not facts.model.window_pool:
        return
    if not facts.gpu:
        yield (
            "--disable-hybrid-swa-memory: expected on a CPU, whose layers share one KV pool, got "
            "a pool for layers with a window; add the flag"
        )
    if facts.stages > 1:
        yield (
            "--pp-size: expected 1 where layers with a window have a KV pool of their own, got "
            f"{facts.stages}; add --disable-hybrid-swa-memory"
        )


def _refused_speculation(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    if facts.speculates_by is None:
        return
    if not facts.gpu:
        yield (
            "--speculative-algorithm: expected none without a GPU, got "
            f"{facts.speculates_by}; drop the flag"
        )
    if config.selection != "topk":
        yield (
            "selection: expected topk with speculative decoding, whose drafts the kernels verify, "
            f"got {config.selection}; drop --speculative-algorithm"
        )
    if facts.phases != {"prefill", "decode"}:
        yield (
            "--attention-backend: expected kascade in both phases with speculative decoding, got "
            f"it in {' and '.join(facts.phases)} alone; drop the flag of the other phase"
        )
    if facts.model.windowed:
        yield (
            "--speculative-algorithm: expected none for a model with a sliding window in layers "
            f"{list(facts.model.windowed)}, got {facts.speculates_by}; drop the flag"
        )


def _refused_hicache(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    if not facts.hicache:
        return
    if not facts.gpu:
        yield (
            "--enable-hierarchical-cache: expected a GPU, whose KV pool host memory extends, got "
            "none; drop the flag"
        )
    if config.selection == "topk" and not config.exact and facts.kv_cache_dtype == "auto":
        yield (
            "--enable-hierarchical-cache: expected no 8-bit copies of keys beside the KV pool, "
            "which host memory does not hold, got them; add --kascade-exact, or "
            "--kv-cache-dtype fp8_e4m3"
        )
    if facts.model.window_pool:
        yield (
            "--enable-hierarchical-cache: expected one KV pool for all layers, got one of their "
            "own for layers with a window; add --disable-hybrid-swa-memory"
        )
    if facts.speculates_by is not None:
        yield (
            "--enable-hierarchical-cache: expected no speculative decoding beside it, got "
            f"{facts.speculates_by}; drop one of the two flags"
        )


def _refused_heads(facts: ServerFacts) -> Iterator[str]:
    ranks, kv_heads = facts.tensor_ranks, facts.model.shape.kv_heads
    if kv_heads % ranks:
        yield (
            f"--tp-size: expected a divisor of the model's {kv_heads} KV heads, got {ranks}; "
            "a KV head's query group must sit on one rank"
        )


def _refused_ranks(facts: ServerFacts, config: KascadeConfig) -> Iterator[str]:
    ranks = facts.tensor_ranks
    if ranks > 1 and config.heads == "pooled":
        yield "--kascade-heads: expected per_head with --tp-size above 1, got pooled"
    elif ranks > 1 and config.pooled:
        yield (
            f"selection: {config.selection} makes one list for all heads, which works with "
            f"--tp-size 1 alone, got {ranks}; serve on one GPU"
        )
    orphans = [layer for layer in _first_layers(facts, config) if layer not in config.plan.anchors]
    if orphans:
        yield (
            f"--pp-size: pipeline stages start at layers {orphans}, whose anchor sits on another "
            f"rank; calibrate with anchors there, or use --tp-size (anchors: "
            f"{list(config.plan.anchors)})"
        )
    lost = [
        anchor
        for anchor, maker in config.plan.maker_of.items()
        if any(maker < start <= anchor for start in facts.stage_starts)
    ]
    if lost:
        yield (
            f"--pp-size: anchors {lost} score a pool whose maker sits on another rank; make "
            f"stages start at makers, or use --tp-size (makers: {list(config.plan.makers)})"
        )


def _first_layers(facts: ServerFacts, config: KascadeConfig) -> list[int]:
    """Return the first layer with full attention of every stage that has one."""
    full = config.plan.full_layers
    ends = (*facts.stage_starts[1:], config.plan.shape.layers)
    stages = (range(*bounds) for bounds in zip(facts.stage_starts, ends, strict=True))
    firsts = (next((layer for layer in stage if layer in full), None) for stage in stages)
    return [layer for layer in firsts if layer is not None]
