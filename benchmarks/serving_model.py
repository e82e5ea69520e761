"""A model folder of a real shape for ``--load-format dummy``: configuration, plan and tokenizer.

The tokenizer has one word a token, so text of n words is n tokens however often it is decoded and
encoded again, and every length asked for is the length served.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.presets import identity_similarity, preset
from kascade_sglang.plan.schema import ModelShape, Plan

SHAPES = Path(__file__).parent / "models"
ANCHORS = {
    "llama-3.1-8b": preset("Llama-3.1-8B-Instruct").anchors,
    "qwen3-8b": preset("Qwen3-8B").anchors,
    "four-layers": (0, 2),
}
"""The paper's. Four narrow layers leave the GPU idle: what is timed there is the host."""


def make_shape(name: str, folder: Path) -> Path:
    """Write the folder for a shape of ``benchmarks/models``; heads are mapped to themselves."""
    config = json.loads((SHAPES / f"{name}.json").read_text())
    shape = ModelShape(
        layers=config["num_hidden_layers"],
        q_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        hidden=config["hidden_size"],
    )
    reuse = [layer for layer in range(shape.layers) if layer not in ANCHORS[name]]
    similarity = dict.fromkeys(reuse, identity_similarity(shape.kv_heads))
    return make_model(config, Plan(name, shape, ANCHORS[name], similarity), folder / name)


def make_model(config: dict[str, Any], plan: Plan, path: Path) -> Path:
    """Write a model folder without weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    plan.save(path / PLAN_NAME)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{n}" for n in range(len(special), config["vocab_size"]))]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path
