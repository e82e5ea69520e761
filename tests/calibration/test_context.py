"""How long a context a configuration is for, scaled rotary embeddings included."""

import json
from pathlib import Path
from typing import Any

import pytest

from kascade_sglang.calibration.hf_model import context_length, read_config
from kascade_sglang.calibration.prompts import check_limits
from kascade_sglang.errors import CalibrationError

QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768}
LONGROPE = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PHI = {"model_type": "phi3", "hidden_size": 96, "num_attention_heads": 1}
FROM_4K = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
GEMMA = {"model_type": "gemma3_text", "max_position_embeddings": 131072}


def scaled(kind: str, factor: Any = 4.0, original: int | None = None, **more: Any) -> dict:
    from_where = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor, **from_where, **more}


CONFIGS = {
    "none": (QWEN, 32768),
    "yarn": (QWEN | {"rope_scaling": scaled("yarn")}, 131072),
    "yarn, old name": (QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
    "yarn, new spelling": (QWEN | {"rope_parameters": scaled("yarn", rope_theta=1e6)}, 131072),
    "yarn, from where": (
        QWEN | {"max_position_embeddings": 40960, "rope_scaling": scaled("yarn", 4.0, 32768)},
        131072,
    ),
    "yarn, counted already": (
        QWEN | {"max_position_embeddings": 163840, "rope_scaling": scaled("yarn", 40, 4096)},
        163840,
    ),
    "linear": (QWEN | {"rope_scaling": scaled("linear", 2)}, 65536),
    "dynamic": (QWEN | {"rope_scaling": scaled("dynamic", 2.5)}, 81920),
    "llama3": (
        {
            "model_type": "llama",
            "max_position_embeddings": 131072,
            "rope_scaling": scaled("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        },
        131072,
    ),
    "longrope": (
        PHI | FROM_4K | {"rope_scaling": {"rope_type": "longrope", **FROM_4K, **LONGROPE}},
        131072,
    ),
    "default": (QWEN | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 32768),
    "a scale by layer, counted already": (GEMMA | {"rope_scaling": scaled("linear", 8.0)}, 131072),
    "a scale by layer, from where": (
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": scaled("yarn", 8.0, 32768, rope_theta=1e6),
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        262144,
    ),
    "a text": (QWEN | {"rope_scaling": scaled("yarn", "x")}, 32768),
    "no number": (QWEN | {"rope_scaling": scaled("yarn", float("nan"))}, 32768),
    "no end": (QWEN | {"rope_scaling": scaled("yarn", float("inf"))}, 32768),
}


@pytest.mark.parametrize(("config", "context"), CONFIGS.values(), ids=CONFIGS.keys())
def test_context(config: dict, context: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = context_length(read_config(str(tmp_path)))
    assert found == context
    check_limits(found, context, None)
    with pytest.raises(CalibrationError, match="how its rotary embeddings are scaled"):
        check_limits(found, context + 1, None)
