"""Everything Kascade refuses, each with one sentence, before the server accepts requests."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kascade_kernels.budget import TILE
from kascade_sglang.backend.dense import default_dense_backend, require_dense_backend
from kascade_sglang.config import KascadeConfig, load_config
from kascade_sglang.errors import KascadeError

if TYPE_CHECKING:
    from kascade_sglang.compat import ModelRunner

HEAD_DIMS = (64, 128, 256)
"""Head dimensions that the kernels are tested with."""

# ServerArgs field -> the values Kascade works with. A flag stays here until it is tested.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "speculative_algorithm": (None,),
    "disaggregation_mode": (None, "null"),
    "dllm_algorithm": (None,),
    "kv_cache_dtype": ("auto", "bfloat16", "bf16"),
    "dcp_size": (None, 1),
    "attn_cp_size": (None, 1),
    "enable_prefill_cp": (False,),
    "enable_dp_attention": (False,),
    "enable_two_batch_overlap": (False,),
    "enable_single_batch_overlap": (False,),
    "enable_pdmux": (False,),
    "enable_torch_compile": (False,),
    "enable_hierarchical_cache": (False,),
    "enable_lmcache": (False,),
    "enable_flexkv": (False,),
    "radix_cache_backend": (None,),
    "enable_hisparse": (False,),
    "enable_mis": (False,),
    "enable_unified_memory": (False,),
    "enable_page_major_kv_layout": (False,),
    "prefill_only_disable_kv_cache": (False,),
    "use_ray": (False,),
}


def _refused_flags(server_args: Any) -> Iterator[str]:
    for field, supported in SUPPORTED_VALUES.items():
        value = getattr(server_args, field)
        if value not in supported:
            flag = "--" + field.replace("_", "-")
            yield (
                f"{flag}: expected {supported[0]!r} with the kascade backend, got {value!r}; "
                "drop the flag, or serve with another --attention-backend"
            )
    # JSON in --cuda-graph-config overrides the flag.
    graphs = server_args.cuda_graph_config
    if "full" in (server_args.cuda_graph_backend_prefill, graphs and graphs.prefill.backend):
        yield (
            "--cuda-graph-backend-prefill: expected breakable or disabled with the kascade "
            "backend, got 'full'; tiles are cut on the host"
        )


def _refused_model(model_config: Any) -> Iterator[str]:
    text = model_config.hf_text_config
    use = "serve it with another --attention-backend"
    if model_config.attention_arch.name == "MLA":
        yield f"model: multi-head latent attention (MLA) has no KV heads to select for; {use}"
    if model_config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        yield f"model: encoder-decoder and cross attention are not supported; {use}"
    if not model_config.is_generation:
        yield f"model: expected a generative decoder, got an embedding or reward model; {use}"
    if model_config.is_multimodal:
        yield f"model: multimodal models are not supported; {use}"
    if model_config.is_hybrid_swa:
        yield f"model: sliding-window layers are not supported; {use}"
    if model_config.has_attention_sinks:
        yield f"model: attention sinks are not supported; {use}"
    if getattr(text, "attn_logit_softcapping", None):
        yield f"model: soft-capped attention logits are not supported; {use}"
    if model_config.head_dim != model_config.v_head_dim:
        yield f"model: expected one head_dim for K and V; {use}"


def _refused_on_gpu(server_args: Any, model_config: Any, config: KascadeConfig) -> Iterator[str]:
    from kascade_sglang.compat import phases_on_kascade

    dtype = str(model_config.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        yield f"--dtype: expected bfloat16 or float16 on a GPU, got {dtype}"
    if config.plan.shape.head_dim not in HEAD_DIMS:
        yield f"model: expected a head_dim of {HEAD_DIMS}, got {config.plan.shape.head_dim}"
    dense = config.dense_backend or default_dense_backend()
    if server_args.enable_deterministic_inference and dense == "flashinfer":
        yield (
            "--kascade-dense-backend: expected fa3 or triton with "
            "--enable-deterministic-inference, got flashinfer, whose sums depend on the cached "
            "prefix; add --kascade-dense-backend triton"
        )
    if phases_on_kascade(server_args) == {"decode"} and not config.exact:
        yield (
            "--prefill-attention-backend: expected kascade, which keeps 8-bit copies of keys for "
            f"decoding, got {server_args.prefill_attention_backend!r}; or add --kascade-exact"
        )


def _refused_plan(config: KascadeConfig) -> Iterator[str]:
    if config.plan.windowed:
        yield (
            f"plan: expected full attention in every layer, got sliding windows in layers "
            f"{list(config.plan.windowed)}; serve with another --attention-backend"
        )


def _refused_ranks(server_args: Any, config: KascadeConfig) -> Iterator[str]:
    from kascade_sglang.compat import stage_starts

    ranks, kv_heads = server_args.tp_size, config.plan.shape.kv_heads
    if kv_heads % ranks:
        yield (
            f"--tp-size: expected a divisor of the model's {kv_heads} KV heads, got {ranks}; "
            "a KV head's query group must sit on one rank"
        )
    if ranks > 1 and config.heads == "pooled":
        yield "--kascade-heads: expected per_head with --tp-size above 1, got pooled"
    elif ranks > 1 and config.pooled:
        yield (
            f"selection: {config.selection} makes one list for all heads, which works with "
            f"--tp-size 1 alone, got {ranks}; serve on one GPU"
        )
    starts = stage_starts(config.plan.shape.layers, server_args.pp_size)
    orphans = [layer for layer in starts if layer not in config.plan.anchors]
    if orphans:
        yield (
            f"--pp-size: pipeline stages start at layers {orphans}, whose anchor sits on another "
            f"rank; calibrate with anchors there, or use --tp-size (anchors: "
            f"{list(config.plan.anchors)})"
        )


def _refuse(sentences: Iterator[str]) -> None:
    for sentence in sentences:
        raise KascadeError(sentence)


def check_server_args(server_args: Any) -> KascadeConfig:
    """Return the configuration to serve with; raises KascadeError for the first thing refused."""
    from kascade_sglang import compat

    compat.require_supported_host()
    _refuse(_refused_flags(server_args))
    model_config = server_args.get_model_config()
    _refuse(_refused_model(model_config))
    options = getattr(model_config.hf_config, "kascade", None)
    config = load_config(server_args.model_path, compat.model_shape(model_config), options)
    require_dense_backend(config.dense_backend)
    _refuse(_refused_plan(config))
    _refuse(_refused_ranks(server_args, config))
    if compat.has_gpu() and config.selection == "topk":
        _refuse(_refused_on_gpu(server_args, model_config, config))
    return replace(config, batch_invariant=server_args.enable_deterministic_inference)


class ReservedMemory(NamedTuple):
    """Bytes of one rank that the KV pool must leave. per_token: for each token of the pool."""

    per_token: int
    scratch: int


def reserved_memory(server_args: Any) -> ReservedMemory:
    """Return what the kernels allocate beside the KV pool; nothing where they do not run."""
    from kascade_sglang import compat
    from kascade_sglang.backend.decode_path import DecodeBuffers, list_room
    from kascade_sglang.backend.kv import KeyValues
    from kascade_sglang.backend.rank_shape import RankShape

    config = check_server_args(server_args)
    if not compat.has_gpu() or config.selection != "topk":
        return ReservedMemory(0, 0)
    model, layers = config.plan.shape, -(-config.plan.shape.layers // server_args.pp_size)
    kv_heads = model.kv_heads // server_args.tp_size
    copies = 0 if config.exact else min(len(config.plan.anchors), layers)
    shape = RankShape(
        heads=range(kv_heads),
        q_heads=model.q_heads // server_args.tp_size,
        head_dim=model.head_dim,
        layers=range(layers),
        context=server_args.get_model_config().context_len,
        slots=0,
        lists=1 if config.pooled else kv_heads,
        device="cuda",
    )
    # What decode steps keep, and the lists of the tiles of a prefill step.
    batches = compat.largest_decodes(server_args)
    decode = sum(DecodeBuffers.bytes(rows, shape, config) for rows in batches)
    tiles = -(-compat.largest_prefill(server_args) // TILE)
    prefill = 4 * tiles * shape.lists * list_room(shape.context, config)
    return ReservedMemory(
        per_token=copies * KeyCopies.bytes_per_slot(kv_heads, model.head_dim),
        scratch=config.score_memory + decode + prefill,
    )


def check_runner(runner: "ModelRunner") -> KascadeConfig:
    """The same in a worker, where the KV pool exists; catches what bypassed the parent's check."""
    from kascade_sglang.compat import require_plain_pool

    config = check_server_args(runner.server_args)
    require_plain_pool(runner.token_to_kv_pool, runner.model_config.dtype)
    return config
