"""Write trained weights as a Hugging Face Llama model in bfloat16."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kascade_sglang.demo.recipe.network import Shape

LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}
BOS, END, PAD_TOKEN = 0, 1, 2


def hugging_face_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stacked weights, one tensor for each layer, under Transformers' names."""
    named = {
        "model.embed_tokens.weight": weights["embed"],
        "model.norm.weight": weights["norm_out"],
    }
    for ours, theirs in LAYER_NAMES.items():
        for layer, weight in enumerate(weights[ours]):
            named[f"model.layers.{layer}.{theirs}.weight"] = weight
    return {name: weight.detach().bfloat16().cpu().clone() for name, weight in named.items()}


def export(weights: dict[str, Tensor], shape: Shape, out: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    tokens = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD_TOKEN}
    config = (
        asdict(shape)
        | tokens
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
    )
    generation = tokens | {"do_sample": False, "max_new_tokens": 48}
    for name, content in (("config", config), ("generation_config", generation)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(hugging_face_weights(weights), out / "model.safetensors", {"format": "pt"})
