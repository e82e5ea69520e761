"""A real server of a tiny random gpt-oss: attention sinks, windows in every second layer.

Of the dense backends, triton alone knows sinks without a GPU: all kernels, SGLang's and ours, run
in Triton's interpreter, so there are few tokens.
"""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

from kascade_kernels.budget import Budget
from kascade_sglang.calibration import hf_attention
from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.calibration.limited_attention import Limits, limited_attention
from kascade_sglang.host.release import VERIFIED_WITH_SINKS
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan
from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    TOLERANCE,
    assert_equals,
    generate,
    prompt_ids,
    tokenizer,
    tokens_and_logprobs,
)
from tests.support.servers import served

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with float32 on a CPU"),
    pytest.mark.skipif(version("sglang") not in VERIFIED_WITH_SINKS, reason="refused there"),
]

WINDOW, COVERED, NEW = 40, 64, 3
"""Positions of a window; tokens that the budget covers; tokens asked for."""
SMALL = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.2,
    "max_position_embeddings": 4096, "sliding_window": WINDOW, "num_local_experts": 4,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FLAGS = ["--kascade-dense-backend", "triton", "--disable-hybrid-swa-memory", "--kascade-exact"]
FLAGS += ["--kascade-min-k", str(COVERED), "--kascade-prefill-min-k", str(COVERED)]
FLAGS += ["--chunked-prefill-size", "128", "--skip-server-warmup", "--moe-runner-backend", "triton"]


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plan_of(model: PreTrainedModel) -> Plan:
    """Layers 1, 3 and 5 see all keys: the first of them attends to them, the last reuses."""
    borrowed = {5: ((0.1, 0.9), (0.8, 0.2))}
    windowed = (0, 2, 4)
    plan = Plan("gpt-oss", shape_of(model.config), (1, 3), borrowed, windowed=windowed)
    return replace(plan, budget=Budget(0.1, COVERED))


def gpt_oss(folder: Path) -> list[str]:
    """Make the model; its sinks take much, and are such as SGLang keeps them, in bfloat16."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SMALL))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.copy_(2 + 2 * torch.randn(4).bfloat16().float())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    plan_of(model).save(folder / PLAN_NAME)
    # Transformers has the number in its code, SGLang in the model's config.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "swiglu_limit": 7.0}))
    return [*demo_arguments("kascade"), "--model-path", str(folder)]


def shorter_in_decoding(q: torch.Tensor, *states: Any) -> torch.Tensor:
    """A window as SGLang 0.5.17's triton backend has it: a decode step sees one position less."""
    *others, limits = states
    window = limits.window - (len(q) == 1)
    return limited_attention(q, *others, Limits(window, sinks=limits.sinks))


def folder_of(server: Server) -> Path:
    return Path(server.log).parent


@served(*FLAGS, model=gpt_oss, TRITON_INTERPRET="1")
def test_within_the_budget_it_is_transformers_own(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, model = prompt_ids(2, 300)[: COVERED - NEW], load(folder_of(server))
    tokens, logprobs = reply = tokens_and_logprobs(generate(server, ids, NEW))
    with torch.inference_mode():
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
    assert tokens[0] == int(row.argmax())
    assert logprobs[0] == pytest.approx(float(row.max()), abs=TOLERANCE)
    monkeypatch.setattr(hf_attention, "limited_attention", shorter_in_decoding)
    assert_equals(reply, kascade_generate(model, plan_of(model), ids, NEW))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(float("-inf"))
    without = kascade_generate(model, plan_of(model), ids, NEW)
    assert without[1] != pytest.approx(logprobs, abs=0.05), "the sinks say nothing"


@served(*FLAGS, model=gpt_oss, TRITON_INTERPRET="1")
def test_beyond_it_it_is_the_reference(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of two chunks and decoding, and both again after a prefix hit."""
    ids, model = prompt_ids(3, 300)[:150], load(folder_of(server))
    cold, warm = (generate(server, ids, NEW) for _ in range(2))
    assert warm["meta_info"]["cached_tokens"] >= 128
    monkeypatch.setattr(hf_attention, "limited_attention", shorter_in_decoding)
    plan = plan_of(model)
    expected = kascade_generate(model, plan, ids, NEW)
    for reply in (cold, warm):
        assert_equals(tokens_and_logprobs(reply), expected)
    everything = kascade_generate(model, replace(plan, budget=Budget(1.0, COVERED)), ids, NEW)
    assert everything[1] != pytest.approx(expected[1], abs=0.01), "nothing was left out"
