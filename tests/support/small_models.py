"""Tiny random models of any family, and what transformers makes of them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from kascade_sglang.plan.schema import Plan
from tests.support.requests import tokenizer

WINDOW = 96
"""Positions of a window, in families that have one."""
SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.2,
    "max_position_embeddings": 4096, "sliding_window": WINDOW,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def save(folder: Path, name: str, **changes: Any) -> Path:
    """Save a model of the family whose configuration transformers calls ``{name}Config``."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> PreTrainedModel:
    """Load it in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes).eval()


@torch.inference_mode()
def own(model: PreTrainedModel, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    """What the model itself says, greedily, without a cache: tokens and log probabilities."""
    logprobs = []
    for _ in range(new):
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
        ids = [*ids, int(row.argmax())]
        logprobs.append(float(row.max()))
    return ids[-new:], logprobs


def least(plan: Plan) -> dict[str, int]:
    """Settings: lists no longer than the plan says, which a server's own would make."""
    return {"min_k": plan.budget.min_k, "prefill_min_k": plan.budget.min_k}
