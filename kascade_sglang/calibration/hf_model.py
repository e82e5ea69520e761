"""Hugging Face models: shape, context length, loading, and where the decoder layers are.

Importing this module loads transformers, not torch's CUDA state; every failure to read a model
becomes one sentence.
"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kascade_sglang.calibration.errors import CalibrationError
from kascade_sglang.plan.schema import ModelShape

DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def _one_line(error: BaseException) -> str:
    """Return a library's message, which may run over many lines, as a part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def read_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a local folder or hub id; raises CalibrationError."""
    try:
        return AutoConfig.from_pretrained(model)
    except _UNREADABLE as error:
        raise CalibrationError(
            f"model {model}: cannot read its configuration ({_one_line(error)})"
        ) from error


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Return the shape a plan depends on; raises CalibrationError for other than decoders."""
    text = config.get_text_config()
    try:
        q_heads = text.num_attention_heads
        return ModelShape(
            layers=text.num_hidden_layers,
            q_heads=q_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or q_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // q_heads,
            hidden=text.hidden_size,
        )
    except AttributeError as error:
        raise CalibrationError(
            f"model: a {config.model_type} configuration describes no decoder of attention "
            f"layers ({_one_line(error)})"
        ) from error


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of positions the model was made for, where the configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def pick_device(name: str) -> torch.device:
    """Return the device of a ``--device`` value; ``auto`` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CalibrationError(f"--device {name}: not usable ({_one_line(error)})") from error
    return device


def load_model(model: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load the weights for inference.

    dtype: one of DTYPES; ``auto`` is the checkpoint's own on a GPU and float32 on a CPU.
    Raises CalibrationError where the model cannot be read or does not fit.
    """
    if dtype not in DTYPES:
        raise CalibrationError(f"--dtype: expected one of {DTYPES}, got {dtype!r}")
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=wanted)
        return loaded.to(device).eval()
    except _UNREADABLE as error:
        raise CalibrationError(
            f"model {model}: cannot load its weights ({_one_line(error)})"
        ) from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; raises CalibrationError."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except _UNREADABLE as error:
        raise CalibrationError(
            f"model {model}: cannot load its tokenizer ({_one_line(error)})"
        ) from error


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers, each with its attention under ``self_attn``."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise CalibrationError(
            f"model: {type(model).__name__} does not keep its attention in "
            "`layers[i].self_attn`; Llama, Qwen and Mistral style decoders do"
        )
    return list(layers)
