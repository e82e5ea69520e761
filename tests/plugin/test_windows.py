"""Which layers have a sliding window: by the model's config, and by what SGLang made of it."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from torch import nn

from kascade_sglang.errors import KascadeError
from kascade_sglang.host.runtime import require_layers
from kascade_sglang.host.server import SERVED_WITHOUT_WINDOWS, server_facts
from tests.support.models import GEMMA_3, WINDOWED_PLAN, make_plan, parse

SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 8}


def of(name: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, **changes}


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        (GEMMA_3, (0, 2)),
        ({**GEMMA_3, "sliding_window_pattern": 3}, (0, 1, 3)),
        ({**GEMMA_3, "layer_types": [FULL, SLIDING, FULL, SLIDING]}, (1, 3)),
        ({**GEMMA_2, "attn_logit_softcapping": None}, (0, 2)),
        (of("Mistral", "mistral", sliding_window=8), ()),
        (of("Phi3", "phi3", sliding_window=8, pad_token_id=0), ()),
        (of("Qwen2", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2), ()),
        ({}, ()),
    ],
    ids=["pattern", "of-three", "types", "gemma-2", "mistral", "phi-3", "qwen-2", "llama"],
)
def test_windows_come_from_the_models_config(
    make_model: Callable[..., Path], changes: dict[str, Any], windowed: tuple[int, ...]
) -> None:
    plan = {}
    if windowed:
        full = [layer for layer in range(4) if layer not in windowed]
        similarity = dict.fromkeys(full[1:], WINDOWED_PLAN["similarity"][3])
        plan = {"windowed": windowed, "anchors": (full[0],), "similarity": similarity}
    facts = server_facts(parse(make_model(make_plan(**plan), **changes))).model
    assert (facts.windowed, facts.window) == (windowed, 8 if windowed else 0)
    assert facts.unsupported == ()


@pytest.mark.parametrize("name", sorted(SERVED_WITHOUT_WINDOWS | {"Phi3ForCausalLM"}))
def test_what_is_served_without_windows_has_none_in_its_source(name: str) -> None:
    modules = {"Phi3ForCausalLM": "llama", "MistralForCausalLM": "mistral"}
    short = name.removesuffix("ForCausalLM").lower().removesuffix("moe")
    short += "_moe" if "Moe" in name else ""
    module = import_module(f"sglang.srt.models.{modules.get(name, short)}")
    for each in getattr(module, name).__mro__:
        if each.__module__.startswith("sglang."):
            assert "sliding_window" not in inspect.getsource(import_module(each.__module__))


def model(windows: list[int], **changes: Any) -> nn.Module:
    """Layers as SGLang makes them, each with so many positions before the query's own."""
    layers = (
        RadixAttention(2, 16, 0.25, 1, layer_id, sliding_window_size=window, **changes)
        for layer_id, window in enumerate(windows)
    )
    return nn.ModuleList(nn.ModuleDict({"attn": layer}) for layer in layers)


def window_of(layer: int) -> int:
    return (8, 0)[layer % 2]


def test_layers_that_are_as_the_config_says() -> None:
    require_layers(model([7, -1, 7, None]), window_of)


@pytest.mark.parametrize(
    ("windows", "changes", "sentence"),
    [
        ([7, 7], {}, "layer 1: expected a sliding window of 0 positions .* got 8; serve"),
        ([-1, -1], {}, "layer 0: expected a sliding window of 8 positions .* got 0; serve"),
        ([8, -1], {}, "layer 0: expected a sliding window of 8 positions .* got 9; serve"),
        ([7], {"logit_cap": 50.0}, "layer 0: expected causal self-attention without a cap"),
        ([7], {"is_cross_attention": True}, "layer 0: expected causal self-attention"),
        ([7], {"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "layer 0: expected causal self"),
    ],
)
def test_layers_that_are_not(windows: list[int], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KascadeError, match=sentence):
        require_layers(model(windows, **changes), window_of)
