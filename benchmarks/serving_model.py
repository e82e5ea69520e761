"""A model folder of a real shape for ``--load-format dummy``: configuration, plan and tokenizer.

The tokenizer has one word a token, so text of n words is n tokens however often it is decoded and
encoded again, and every length asked for is the length served.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.presets import identity_plan, preset
from kascade_sglang.plan.schema import Plan

SHAPES = Path(__file__).parent / "models"
ANCHORS = {
    "llama-3.1-8b": preset("Llama-3.1-8B-Instruct").anchors,
    "qwen3-8b": preset("Qwen3-8B").anchors,
    "llama-3.1-70b": (0, *range(4, 80, 8)),
    "qwen3-32b": (0, *range(4, 64, 8)),
    "qwen3-30b-a3b": (0, 4, 12, 20, 28, 36, 44),
    "four-layers": (0, 2),
}
"""The paper's; of models which it has none for, every eighth: speed asks for no better.

Four narrow layers leave the GPU idle: what is timed there is the host."""


def make_shape(name: str, folder: Path) -> Path:
    """Write the folder for a shape of ``benchmarks/models``; heads are mapped to themselves."""
    config = json.loads((SHAPES / f"{name}.json").read_text())
    shape = shape_of(AutoConfig.for_model(**config))
    plan = identity_plan(name, shape, ANCHORS[name], "benchmark")
    return make_model(config, plan, folder / name)


def make_model(config: dict[str, Any], plan: Plan, path: Path) -> Path:
    """Write a model folder without weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    plan.save(path / PLAN_NAME)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    chat = "{% for message in messages %}{{ message.content }} {% endfor %}"
    words = [*special.values(), *(f"w{n}" for n in range(len(special), config["vocab_size"]))]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat, **special)
    fast.save_pretrained(path)
    return path
