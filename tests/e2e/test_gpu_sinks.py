"""Servers of a small random gpt-oss on a GPU: FlashAttention-3, the hybrid pool, CUDA graphs."""

import json
from collections.abc import Iterator
from importlib.metadata import version

import httpx
import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.host.release import VERIFIED_WITH_SINKS
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan
from kascade_sglang.servers.process import Server, started
from tests.support.requests import generate, prompt_ids, tokenizer, tokens_and_logprobs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(version("sglang") not in VERIFIED_WITH_SINKS, reason="refused there"),
]

WINDOW, PROMPT, NEW = 128, 3000, 24
CONFIG = GptOssConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=6,
    num_attention_heads=16, num_key_value_heads=2, head_dim=128, initializer_range=0.1,
    max_position_embeddings=8192, sliding_window=WINDOW, num_local_experts=4,
    num_experts_per_tok=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
DENSE = {"fa3": ["--attention-backend", "fa3"], "triton": ["--attention-backend", "triton"]}
WHOLE = ["--kascade-min-k", "8192", "--kascade-prefill-min-k", "8192"]
SHORT = ["--kascade-min-k", "128", "--kascade-prefill-min-k", "128"]
PLAIN = ["--disable-hybrid-swa-memory"]
SPARSE = {
    f"{pool}-{budget}": ["--attention-backend", "kascade", *flags, *own]
    for pool, flags in (("hybrid", []), ("plain", PLAIN))
    for budget, own in (("whole", WHOLE), ("short", SHORT))
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    model = GptOssForCausalLM(CONFIG)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.copy_((2 + 2 * torch.randn(16)).bfloat16())
    model.bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    borrowed = {5: ((0.1, 0.9), (0.8, 0.2))}
    plan = Plan("gpt-oss", shape_of(model.config), (1, 3), borrowed, windowed=(0, 2, 4))
    plan.save(folder / PLAN_NAME)
    # Transformers has the number in its code, SGLang in the model's config.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "swiglu_limit": 7.0}))
    common = ["--model-path", str(folder), "--page-size", "32", "--max-total-tokens", "32768"]
    common += ["--mem-fraction-static", "0.5", "--cuda-graph-max-bs", "4", "--dtype", "bfloat16"]
    common += ["--moe-runner-backend", "triton", "--chunked-prefill-size", "1024"]
    found = {
        name: Server([*common, *flags], folder / f"{name}.log")
        for name, flags in {**DENSE, **SPARSE}.items()
    }
    with started(found.values()):
        yield found


def scores(server: Server) -> np.ndarray:
    """Log probabilities of a prompt's tokens."""
    ids = prompt_ids(2, PROMPT)
    body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": 0}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 1}
    reply = httpx.post(f"{server.url}/generate", json=body, timeout=300, trust_env=False)
    found = reply.raise_for_status().json()["meta_info"]["input_token_logprobs"]
    return np.array([value for value, *_ in found[1:]])


@pytest.mark.parametrize("pool", ["hybrid", "plain"])
def test_within_the_budget_it_differs_as_two_dense_backends_do(
    servers: dict[str, Server], pool: str
) -> None:
    dense = scores(servers["fa3"])
    noise = np.abs(scores(servers["triton"]) - dense).mean()
    assert 0 < noise < 0.5  # 0.2 on an H200: where experts score alike, the other one is taken
    assert np.abs(scores(servers[f"{pool}-whole"]) - dense).mean() <= 1.5 * noise
    assert np.abs(scores(servers[f"{pool}-short"]) - dense).mean() > 3 * noise


@pytest.mark.parametrize("budget", ["whole", "short"])
def test_the_hybrid_pool_changes_no_bit(servers: dict[str, Server], budget: str) -> None:
    ids = prompt_ids(3, PROMPT)
    hybrid, plain = (
        generate(servers[f"{pool}-{budget}"], ids, NEW) for pool in ("hybrid", "plain")
    )
    assert tokens_and_logprobs(hybrid) == tokens_and_logprobs(plain)
