"""SGLang's ServerArgs, model config, registry and releases, turned into facts of ours."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import (
    ATTENTION_BACKEND_CHOICES,
    add_attention_backend_choices,
    add_deterministic_attention_backend_choices,
    add_radix_supported_deterministic_attention_backend_choices,
)

from kascade_sglang.errors import KascadeError
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.host.facts import ModelFacts, RefusedFlag, ServerFacts
from kascade_sglang.host.release import (
    VERIFIED_WITH_HICACHE,
    VERIFIED_WITH_SINKS,
    resolves_late,
    serves_sinks,
)
from kascade_sglang.host.speculation import algorithm_of, chain_length, refused_speculation
from kascade_sglang.plan.schema import ModelShape

NAME = "kascade"

# ServerArgs field -> the values Kascade works with. A flag stays here until it is tested.
SUPPORTED_VALUES: dict[str, tuple[object, ...]] = {
    "speculative_adaptive": (False,),
    "enable_multi_layer_eagle": (False,),
    "disaggregation_mode": (None, "null"),
    "dllm_algorithm": (None,),
    "kv_cache_dtype": ("auto", "bfloat16", "bf16", *FP8_TYPES),
    # Sets scales by a name of their own, which SGLang's dense backends do not read.
    "quantization_param_path": (None,),
    "dcp_size": (None, 1),
    "attn_cp_size": (None, 1),
    "enable_prefill_cp": (False,),
    "enable_dp_attention": (False,),
    "enable_two_batch_overlap": (False,),
    "enable_single_batch_overlap": (False,),
    "enable_pdmux": (False,),
    "enable_torch_compile": (False,),
    # Other servers may share it, whose keys and values another attention made.
    "hicache_storage_backend": (None,),
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
# The same for fields that older releases do not have.
SUPPORTED_VALUES_LATER: dict[str, tuple[object, ...]] = {
    "attn_dp_size": (None, 1),
    "enable_kv_cache_sharding": (False,),
    "enable_unified_cache_external_linker": (False,),
    "enable_nvidia_megakernel": (False,),
}
# Architectures whose configs may name layers with a sliding window, and whose classes in SGLang
# let every layer attend to everything. (Mistral's and Phi-3's configs name no layers.)
SERVED_WITHOUT_WINDOWS = frozenset(
    f"{name}ForCausalLM" for name in ("Mistral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe")
)
# Architectures with attention sinks in every layer, and windows in a KV pool of their own.
SERVED_WITH_SINKS = frozenset({"GptOssForCausalLM"})


def resolved(server_args: Any) -> Any:
    """Return what reads ServerArgs as they are resolved."""
    if not resolves_late():
        return server_args
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def register_backend(factory: Any) -> None:
    """Make ``--attention-backend kascade`` build ``factory(model_runner)``; repeatable."""
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
        add_deterministic_attention_backend_choices([NAME])
        add_radix_supported_deterministic_attention_backend_choices([NAME])
    register_attention_backend(NAME)(factory)


def require_hooks(targets: list[str]) -> None:
    """Raise KascadeError if SGLang logged and skipped one of our hooks."""
    missing = sorted(set(targets) - HookRegistry._patched)
    if missing:
        raise KascadeError(
            f"hooks on {', '.join(missing)} are not live; SGLang's log says why "
            "(is SGLANG_PLUGINS or SGLANG_PLATFORM set without kascade?)"
        )


def has_gpu() -> bool:
    """Whether steps can run on a GPU of this machine."""
    return torch.cuda.is_available()


def device_kind(device: str) -> str:
    """Return the kind of a ``--device``, which torch calls ``cuda`` for AMD's GPUs, too."""
    kind = str(device).partition(":")[0]
    return "rocm" if kind == "cuda" and torch.version.hip else kind


def phases_on_kascade(server_args: Any) -> frozenset[str]:
    """Return which of ``prefill`` and ``decode`` run on the kascade backend."""
    args = resolved(server_args)
    names = {"prefill": args.prefill_attention_backend, "decode": args.decode_attention_backend}
    return frozenset(
        phase for phase, name in names.items() if (name or args.attention_backend) == NAME
    )


def gpu_capability() -> tuple[int, int]:
    """Return the compute capability of this machine's GPU; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def server_facts(server_args: Any, kv_dtype: torch.dtype | None = None) -> ServerFacts:
    """Read ServerArgs that are resolved.

    kv_dtype: what a worker made of ``--kv-cache-dtype auto``, which a checkpoint may decide.
    """
    args, model = resolved(server_args), _model_config(server_args)
    facts = _model_facts(args, model)
    captured, eager = largest_decodes(args)
    return ServerFacts(
        model=facts,
        refused_flags=tuple(refused_flags(server_args)),
        gpu=has_gpu(),
        capability=gpu_capability(),
        deterministic=args.enable_deterministic_inference,
        kv_cache_dtype=_kv_cache_dtype(args.kv_cache_dtype, kv_dtype),
        phases=phases_on_kascade(server_args),
        prefill_backend=args.prefill_attention_backend,
        tensor_ranks=args.tp_size,
        stages=args.pp_size,
        stage_starts=tuple(
            get_pp_indices(facts.shape.layers, stage, args.pp_size)[0]
            for stage in range(args.pp_size)
        ),
        captured_decode=captured,
        eager_decode=eager,
        largest_prefill=largest_prefill(server_args, facts.context),
        page_size=args.page_size,
        chunk=max(args.chunked_prefill_size or 0, 0),
        speculates_by=algorithm_of(args),
        chain=chain_length(args),
        hicache=args.enable_hierarchical_cache,
    )


def worker_facts(runner: Any) -> ServerFacts:
    """Read what a worker's model runner was made of."""
    return server_facts(runner.server_args, runner.kv_cache_dtype)


def _kv_cache_dtype(asked: str, found: torch.dtype | None) -> str:
    names = {dtype: name for name, dtype in FP8_TYPES.items()}
    return names.get(FP8_TYPES.get(asked) if found is None else found, "auto")


def _model_config(server_args: Any) -> Any:
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    # From SGLang 0.5.19 on.
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)


def _model_facts(args: Any, model: Any) -> ModelFacts:
    windowed, window = _windows(model)
    return ModelFacts(
        path=args.model_path,
        options=getattr(model.hf_config, "kascade", None),
        shape=ModelShape(
            layers=model.num_hidden_layers,
            q_heads=model.num_attention_heads,
            kv_heads=model.get_total_num_kv_heads(),
            head_dim=model.head_dim,
            hidden=model.hidden_size,
        ),
        dtype=str(model.dtype).removeprefix("torch."),
        context=model.context_len,
        windowed=windowed,
        window=window,
        window_pool=model.is_hybrid_swa,
        sinks=model.has_attention_sinks,
        unsupported=tuple(_unsupported(model)),
    )


def unsupported(server_args: Any) -> list[str]:
    """Say what about a server's model Kascade does not serve; ServerArgs need not be resolved."""
    return list(_unsupported(_model_config(server_args)))


def _windows(model: Any) -> tuple[tuple[int, ...], int]:
    """Return the layers with a sliding window, by the model's config, and how much it holds.

    SGLang's classes go by the same field; ``require_layers`` looks at what they made of it.
    """
    text, architectures = model.hf_text_config, model.hf_config.architectures or ()
    if SERVED_WITHOUT_WINDOWS.intersection(architectures):
        return (), 0
    # Transformers also makes these of Gemma 3's ``sliding_window_pattern``.
    kinds = getattr(text, "layer_types", None) or ()
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    return windowed, text.sliding_window if windowed else 0


def served_with_sinks(hf_config: Any) -> bool:
    """Whether a model's attention sinks are served."""
    return bool(SERVED_WITH_SINKS.intersection(hf_config.architectures or ()))


def _unsupported(model: Any) -> Iterator[str]:
    """Say what about a model Kascade does not serve."""
    text, served = model.hf_text_config, served_with_sinks(model.hf_config)
    cap = getattr(text, "attn_logit_softcapping", None)
    if model.attention_arch.name == "MLA":
        yield "multi-head latent attention (MLA) has no KV heads to select for"
    if model.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        yield "encoder-decoder and cross attention are not supported"
    if not model.is_generation:
        yield "expected a generative decoder, got an embedding or reward model"
    if model.is_multimodal:
        yield "multimodal models are not supported"
    if model.is_hybrid_swa and not served:
        yield "sliding-window layers with a KV pool of their own are not supported"
    elif len(_windows(model)[0]) == model.num_hidden_layers:
        yield "every layer has a sliding window, so none is left to make sparse"
    if model.has_attention_sinks and not served:
        yield "attention sinks are not supported, but for gpt-oss"
    elif model.has_attention_sinks and not serves_sinks():
        yield f"attention sinks are supported on SGLang {', '.join(VERIFIED_WITH_SINKS)} alone"
    if cap:
        yield f"every layer caps its logits at {cap}, so none is left to make sparse"
    if model.head_dim != model.v_head_dim:
        yield "expected one head_dim for K and V"


def refused_flags(server_args: Any) -> Iterator[RefusedFlag]:
    """Yield the flags that Kascade does not work with; ServerArgs need not be resolved."""
    args = resolved(server_args)
    later = {name: of for name, of in SUPPORTED_VALUES_LATER.items() if hasattr(args, name)}
    for field, supported in (SUPPORTED_VALUES | later).items():
        value = getattr(args, field)
        if value not in supported:
            flag = "--" + field.replace("_", "-")
            yield RefusedFlag(flag, repr(supported[0]), repr(value))
    yield from refused_speculation(args)
    yield from refused_hicache(args)
    # None until it is resolved.
    if args.device and (kind := device_kind(args.device)) not in ("cuda", "cpu"):
        remedy = "serve with another --attention-backend"
        yield RefusedFlag("--device", "NVIDIA's cuda, or cpu,", kind, remedy)
    # JSON in --cuda-graph-config overrides the flag.
    graphs = args.cuda_graph_config
    by_json = getattr(getattr(graphs, "prefill", None), "backend", None)
    if "full" in (args.cuda_graph_backend_prefill, by_json):
        flag, remedy = "--cuda-graph-backend-prefill", "tiles are cut on the host"
        yield RefusedFlag(flag, "breakable or disabled", "'full'", remedy)


def refused_hicache(args: Any) -> Iterator[RefusedFlag]:
    """Yield HiCache's flag on releases where it is not tested; ``args`` need not be resolved."""
    release = version("sglang")
    if args.enable_hierarchical_cache and release not in VERIFIED_WITH_HICACHE:
        expected = f"SGLang {' or '.join(VERIFIED_WITH_HICACHE)}"
        yield RefusedFlag("--enable-hierarchical-cache", expected, release)


def largest_decodes(args: Any) -> tuple[int, int]:
    """Return the most requests of a captured decode step, and of an eager one if it may be larger.

    0 where there is none, or where SGLang will choose how many requests may run.
    """
    chosen = resolved(args)
    # None where SGLang captures nothing, as 0.5.23 on a CPU.
    decode = getattr(chosen.cuda_graph_config, "decode", None)
    captured = 0
    if decode is not None and decode.backend != "disabled":
        captured = max([decode.max_bs or 0, *(decode.bs or [])])
    running = chosen.max_running_requests or 0
    # SGLang captures no larger steps than may run.
    return min(captured, running or captured), running if running > captured else 0


def largest_prefill(server_args: Any, context: int) -> int:
    """Return how many new tokens a prefill step may hold; context: the model's."""
    # Without chunks SGLang takes a prompt of any length, if it is the step's only one.
    whole = max(resolved(server_args).max_prefill_tokens, context)
    if hasattr(server_args, "max_prefill_buffer_tokens"):
        return server_args.max_prefill_buffer_tokens() or whole
    # From SGLang 0.5.19 on.
    from sglang.srt.arg_groups.overrides import max_prefill_buffer_tokens

    return max_prefill_buffer_tokens(server_args) or whole
