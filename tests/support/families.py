"""Every family of decoders that calibration measures, tiny and random."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from kascade_kernels.budget import TILE

LENGTH = 6 * TILE + 5
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GEMMA = {"sliding_window": 40, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256}}, (0, 1, 2, 3)),
    "qwen2": ("Qwen2", {}, (0, 1, 2, 3)),
    "qwen3": ("Qwen3", {}, (0, 1, 2, 3)),
    "mistral": ("Mistral", {"sliding_window": None}, (0, 1, 2, 3)),
    "mistral-window": ("Mistral", {"sliding_window": LENGTH}, (0, 1, 2, 3)),
    "phi3": ("Phi3", {"sliding_window": None}, (0, 1, 2, 3)),
    "phi3-window": ("Phi3", {"sliding_window": LENGTH + 1}, (0, 1, 2, 3)),
    "olmo2": ("Olmo2", {}, (0, 1, 2, 3)),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}, (1, 3)),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window_pattern": 3}, (2,)),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    name, changes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def build_with_sinks(mean: float, layers: int = 4) -> PreTrainedModel:
    """A gpt-oss with windows in every second layer, the first one, and sinks about the mean."""
    changes = {
        "sliding_window": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.GptOssConfig(**{**SMALL, **changes}))
    for layer in model.get_decoder().layers:
        layer.self_attn.sinks.data.normal_(mean, 2.0)
    return model.eval()
