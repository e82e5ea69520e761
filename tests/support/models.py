"""A small Llama's config, and a plan that fits it."""

from pathlib import Path
from typing import Any

import msgspec
from sglang.srt.server_args import ServerArgs, prepare_server_args

from kascade_sglang.plan.schema import ModelShape, Plan

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
SHAPE = ModelShape(layers=4, q_heads=8, kv_heads=4, head_dim=16, hidden=64)

ROWS = ((0.1, 0.9, 0.2, 0.3),) * 4
# Changes that make LLAMA a Gemma 3 with windows in layers 0 and 2, and its plan that model's.
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
}
WINDOWED_PLAN = {"windowed": (0, 2), "anchors": (1,), "similarity": {3: ROWS}}


POOL_PLAN = {
    "anchors": (0, 1, 2),
    "similarity": {2: ROWS, 3: ROWS},
    "makers": (1,),
    "pool_share": 0.25,
}
"""Layer 2 selects of the candidate pool of layer 1."""


def make_plan(**changes: Any) -> Plan:
    """A valid plan for LLAMA."""
    fields = {
        "model": "test",
        "shape": SHAPE,
        "anchors": (0, 2),
        "similarity": {1: ROWS, 3: ROWS},
    }
    return Plan(**{**fields, **changes})


def resolve(args: ServerArgs) -> ServerArgs:
    """Resolve arguments as launchers do, where making them does not."""
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    return args


def parse(model: Path, *flags: str) -> ServerArgs:
    """Read a command line as every server command does."""
    command = ["--model-path", str(model), "--attention-backend", "kascade", *flags]
    return resolve(prepare_server_args(command))


def overwrite(args: ServerArgs, field: str, value: Any) -> None:
    """Change what SGLang keeps once it is resolved: a field, and in later releases a decision."""
    struct = isinstance(args, msgspec.Struct)
    put = msgspec.Struct.__setattr__ if struct else object.__setattr__
    put(args, field, value)
    if decided := getattr(args, "_resolved_overrides", None):
        put(args, "_resolved_overrides", [*decided, ("test", {field: value})])
