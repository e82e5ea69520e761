"""Hugging Face models: shape, context length, loading, and where the decoder layers are.

Importing this module loads transformers, not torch's CUDA state; every failure to read a model
becomes one sentence.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kascade_sglang.calibration.quantised import (
    WAY_OUT,
    quantisation,
    refuse_unread_scales,
    refuse_unused,
)
from kascade_sglang.calibration.weight_files import refuse_files_elsewhere
from kascade_sglang.errors import CalibrationError
from kascade_sglang.files import expand
from kascade_sglang.plan.schema import MAX_LAYERS, ModelShape
from kascade_sglang.text import tokenizer
from kascade_sglang.text.reading import UnreadableError, cause, one_line, why_no_model

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "sequential")


def read_config(model: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of a local folder or hub id; raises CalibrationError.

    trust_remote_code: whether code that comes with a model may run; never asked for on a terminal.
    """
    # Files of others, and their code where it is trusted, raise errors of any type.
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CalibrationError(
            f"model {model}: cannot read its configuration ({why_no_model(error, model)})"
        ) from error


def name_of(model: str) -> str:
    """Return a hub id as it is and a local folder's name, so that no path enters the plan."""
    folder = expand(model)
    return folder.resolve().name if os.path.isdir(folder) else model


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Return the shape a plan depends on; raises CalibrationError for other than decoders."""
    text = config.get_text_config()
    if config.is_encoder_decoder or getattr(text, "kv_lora_rank", None):
        what = "an encoder-decoder" if config.is_encoder_decoder else "latent attention (MLA)"
        raise CalibrationError(
            f"model: expected a decoder with KV heads, got {what} ({config.model_type}); "
            "serve it with another --attention-backend"
        )
    try:
        q_heads, hidden = text.num_attention_heads, text.hidden_size
        kv_heads, head_dim = (getattr(text, n, None) for n in ("num_key_value_heads", "head_dim"))
        shape = ModelShape(
            layers=text.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=q_heads if kv_heads is None else kv_heads,
            head_dim=hidden // q_heads if head_dim is None else head_dim,
            hidden=hidden,
        )
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise CalibrationError(
            f"model: a {config.model_type} configuration describes no decoder of attention "
            f"layers ({one_line(error)})"
        ) from error
    for name, value in asdict(shape).items():
        if not isinstance(value, int) or value < 1:
            raise CalibrationError(
                f"model: expected a configuration with 1 or more for {name}, got {value!r}; mend "
                "its config.json"
            )
    if max(shape.layers, shape.kv_heads) > MAX_LAYERS:
        raise CalibrationError(
            f"model: expected at most {MAX_LAYERS} layers and KV heads, got {shape.layers} and "
            f"{shape.kv_heads}; mend its config.json"
        )
    return shape


def windowed_layers(config: PreTrainedConfig, longest: int) -> tuple[int, ...]:
    """Return the layers with a sliding window; Kascade neither measures nor serves them.

    longest: tokens of the longest prompt. A model whose layers all have the same window (Mistral
    7B v0.1, Phi-3 mini) has none within it, and SGLang serves such models without.
    Raises CalibrationError for layers of another kind and for prompts longer than that window.
    """
    text = config.get_text_config()
    layers = shape_of(config).layers
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(text, "layer_types", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * layers
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise CalibrationError(
            f"model: expected layers of full or sliding attention, got {', '.join(unknown)}; "
            "Kascade selects keys of attention layers only"
        )
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if len(windowed) < layers:
        return windowed
    if window is not None and window >= longest:
        return ()
    raise CalibrationError(
        f"model: every layer has a sliding window of {window} tokens, and the longest prompt has "
        f"{longest}; --max-tokens {window} measures within the window"
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions the model is for, where the configuration says so.

    Where rotary embeddings are scaled, the context that they are scaled to, if it is larger.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer = isinstance(rope, Mapping) and "full_attention" in rope
    rope = rope["full_attention"] if by_layer else rope
    if not isinstance(rope, Mapping):
        return positions
    factor = rope.get("factor")
    # Models with embeddings for each kind of layer (Gemma 3) count in ``positions`` what they
    # scale, unless they say from where.
    original = rope.get("original_max_position_embeddings") or (None if by_layer else positions)
    numbers = (positions, factor, original)
    if any(not isinstance(number, int | float) or not number < math.inf for number in numbers):
        return positions
    return max(positions, int(factor * original))


def pick_device(name: str) -> torch.device:
    """Return the device of a ``--device`` value; ``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has room, but for no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CalibrationError(f"--device {name}: not usable ({one_line(error)})") from error
    return device


def weights_version(model: str, config: PreTrainedConfig) -> Any:
    """Return what tells these weights from others: a hub commit, or the files' sizes and times."""
    folder = expand(model)
    if not os.path.isdir(folder):
        return getattr(config, "_commit_hash", None)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def check_device_map(device_map: str | None) -> None:
    """Refuse a ``--device-map`` that cannot be used, before anything large is read."""
    if device_map is None:
        return
    if device_map not in DEVICE_MAPS:
        raise CalibrationError(f"--device-map: expected one of {DEVICE_MAPS}, got {device_map!r}")
    if importlib.util.find_spec("accelerate") is None:
        raise CalibrationError(
            f"--device-map {device_map}: needs the accelerate package; pip install accelerate"
        )


def load_model(
    model: str,
    dtype: str,
    device: torch.device,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the weights for inference.

    dtype: one of DTYPES; ``auto`` is the checkpoint's own on a GPU and float32 on a CPU.
    device_map: one of DEVICE_MAPS, by which accelerate spreads the layers over all GPUs, then
        the CPU; None puts everything on ``device``.
    Raises CalibrationError where the model cannot be read, lacks weights or does not fit, or has
    weights that are nothing without scales which would not be read.
    """
    if dtype not in DTYPES:
        raise CalibrationError(f"--dtype: expected one of {DTYPES}, got {dtype!r}")
    check_device_map(device_map)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    config = read_config(model, trust_remote_code)
    refuse_files_elsewhere(model)
    refuse_unread_scales(model, config)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=wanted,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        if device_map is None:
            loaded = loaded.to(device)
    except Exception as error:  # as above
        way_out = f"; {WAY_OUT}" if quantisation(config) else ""
        raise CalibrationError(
            f"model {model}: cannot load its weights ({cause(error, model)}){way_out}"
        ) from error
    refuse_unread_scales(model, config)
    refuse_unused(model, loaded, found["unexpected_keys"])
    _check_complete(model, found)
    return loaded.eval()


def _check_complete(model: str, found: Mapping[str, Any]) -> None:
    """Refuse weights that transformers has drawn at random, for the files hold none that fit."""
    drawn = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if drawn:
        raise CalibrationError(
            f"model {model}: expected weights for all of its configuration, got none of their name "
            f"and size for {len(drawn)}, {drawn[0]} the first; mend its files or its config.json"
        )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; raises CalibrationError."""
    try:
        return tokenizer.load_tokenizer(model, trust_remote_code)
    except UnreadableError as error:
        raise CalibrationError(f"model {model}: cannot load its tokenizer ({error})") from error


def input_ids(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return token ids as the model takes them: int64 [1, L] where its embeddings are."""
    device = model.get_input_embeddings().weight.device
    # Weights that accelerate keeps elsewhere stand on "meta"; its hooks move the ids.
    return torch.tensor([ids], device="cpu" if device.type == "meta" else device)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers, each with its attention under ``self_attn``."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise CalibrationError(
            f"model: {type(model).__name__} does not keep its attention in "
            "`layers[i].self_attn`; Llama, Qwen, Mistral, Phi-3 and Gemma style decoders do"
        )
    return list(layers)


def last_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after the decoder's last layer."""
    norm = getattr(model.get_decoder(), "norm", None)
    if norm is None:
        raise CalibrationError(
            f"model: {type(model).__name__} does not keep its last norm in `norm`, as Llama, Qwen, "
            "Mistral, Phi-3 and Gemma style decoders do; --criterion mass does without"
        )
    return norm


def next_tokens(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the next tokens, float32 [n, vocabulary], of what the last layer returns.

    hidden: [n, hidden]. Scaled or capped as the configuration says (Cohere, Granite, Gemma 2).
    """
    logits = model.get_output_embeddings()(last_norm(model)(hidden)).float()
    text = model.config.get_text_config()
    logits = logits * getattr(text, "logit_scale", 1.0) / getattr(text, "logits_scaling", 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
