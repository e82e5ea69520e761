"""Weights of other kinds on a GPU: LoRA adapters, fp8 made while loading, packed 4-bit integers.

Kascade reads queries, keys and values, whatever weights made them. So where its budget covers
everything it may differ from a dense backend as two dense backends differ from each other.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.presets import identity_plan
from kascade_sglang.servers.process import Server, started
from tests.support.requests import post, prompt_ids, sampling, tokenizer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PROMPT, NEW, GROUP = 3000, 8, 128
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=2, head_dim=128, initializer_range=0.07,
    max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER, RANK = "shown", 8
WHOLE = ["--kascade-min-k", "8192", "--kascade-prefill-min-k", "8192"]
SHORT = ["--kascade-min-k", "128", "--kascade-prefill-min-k", "128"]
BACKENDS = {
    "fa3": ["--attention-backend", "fa3"],
    "triton": ["--attention-backend", "triton"],
    "whole": ["--attention-backend", "kascade", *WHOLE],
    "short": ["--attention-backend", "kascade", *SHORT],
}


def save_model(folder: Path) -> None:
    """A random Llama in bfloat16, with a tokenizer, and a plan beside its weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).bfloat16()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    identity_plan("test", shape_of(model.config), (0, 3), "test").save(folder / PLAN_NAME)


def as_it_is(folder: Path) -> list[str]:
    """The weights that were saved, which SGLang may quantise as it loads them."""
    save_model(folder)
    return []


def with_adapter(folder: Path) -> list[str]:
    """Save an adapter as PEFT does, large enough to matter; return its flags."""
    save_model(folder)
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.split(".")[-2] in LINEAR:
            begin = f"base_model.model.{name.removesuffix('.weight')}"
            outputs, inputs = tensor.shape
            weights[f"{begin}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
            weights[f"{begin}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.2
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK}
    config |= {"lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": list(LINEAR)}
    config |= {"base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return ["--enable-lora", "--lora-paths", f"{ADAPTER}={adapter}", "--max-loras-per-batch", "2"]


def packed(folder: Path) -> list[str]:
    """Replace the layers' weights by random 4-bit integers with scales, as AWQ packs them."""
    save_model(folder)
    weights, eights = {}, -2004318072  # 0x88888888: a zero point of 8 in every four bits
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.split(".")[-2] not in LINEAR:
            weights[name] = tensor.clone()  # The file it lies in is written anew.
            continue
        begin, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
        shape, groups = (inputs, outputs // 8), inputs // GROUP
        integers = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64)
        weights[f"{begin}.qweight"] = integers.to(torch.int32)
        weights[f"{begin}.qzeros"] = torch.full((groups, outputs // 8), eights, dtype=torch.int32)
        # Four random bits spread by 4.6.
        scale = CONFIG.initializer_range / 4.6
        weights[f"{begin}.scales"] = torch.full((groups, outputs), scale, dtype=torch.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP,
        "zero_point": True, "modules_to_not_convert": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return ["--dtype", "float16"]


class Kind(NamedTuple):
    """How weights are made, with what they are served, and what a request says."""

    name: str
    make: Callable[[Path], list[str]]
    flags: list[str]
    body: dict[str, Any]


KINDS = {
    "lora": Kind("test", with_adapter, [], {"lora_path": ADAPTER}),
    "fp8": Kind("test-FP8", as_it_is, ["--quantization", "fp8"], {}),
    "awq": Kind("test-AWQ", packed, [], {}),
}


class Served(NamedTuple):
    """A kind of weights, and its servers by backend."""

    kind: Kind
    servers: dict[str, Server]


@pytest.fixture(scope="module", params=KINDS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / kind.name
    flags = [*kind.make(folder), *kind.flags, "--model-path", str(folder), "--page-size", "32"]
    flags += ["--max-total-tokens", "32768", "--mem-fraction-static", "0.5"]
    flags += ["--cuda-graph-max-bs", "4", "--chunked-prefill-size", "1024"]
    servers = {
        name: Server([*flags, *own], folder.parent / f"{name}.log")
        for name, own in BACKENDS.items()
    }
    with started(servers.values()):
        yield Served(kind, servers)


def ask(server: Server, ids: list[int], tokens: int, **body: Any) -> dict[str, Any]:
    """Return what a reply says beside its text."""
    body |= {"input_ids": ids, "sampling_params": sampling(tokens), "return_logprob": True}
    return post(server, "/generate", body)["meta_info"]


def scores(server: Server, **body: Any) -> np.ndarray:
    """Log probabilities of a prompt's tokens: what prefill made of them."""
    found = ask(server, prompt_ids(2, PROMPT), 1, logprob_start_len=0, **body)
    return np.array([value for value, *_ in found["input_token_logprobs"][1:]])


def replies(server: Server, **body: Any) -> list[list[tuple[int, float]]]:
    """Tokens and log probabilities of several prompts' replies: what decoding made of them."""
    found = [ask(server, prompt_ids(seed, 1200), NEW, **body) for seed in range(20, 32)]
    return [[(each[1], each[0]) for each in reply["output_token_logprobs"]] for reply in found]


def apart(
    one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]
) -> tuple[int, float]:
    """Return how many tokens agree before replies part, and how far their scores are apart."""
    differences = []
    for first, second in zip(one, other, strict=True):
        for (token, score), (expected, value) in zip(first, second, strict=True):
            if token != expected:
                break
            differences.append(abs(score - value))
    return len(differences), float(np.mean(differences))


def test_prefill_differs_as_two_dense_backends_do(served: Served) -> None:
    servers, body = served.servers, served.kind.body
    dense = scores(servers["fa3"], **body)
    noise = np.abs(scores(servers["triton"], **body) - dense).mean()
    assert 0 < noise < 0.5
    assert np.abs(scores(servers["whole"], **body) - dense).mean() <= 1.5 * noise
    assert np.abs(scores(servers["short"], **body) - dense).mean() > 2 * noise


def test_decoding_differs_as_two_dense_backends_do(served: Served) -> None:
    servers, body = served.servers, served.kind.body
    dense = replies(servers["fa3"], **body)
    agreed, noise = apart(replies(servers["triton"], **body), dense)
    ours, difference = apart(replies(servers["whole"], **body), dense)
    # More than a token a reply: with random weights in fp8, even dense backends soon part.
    assert agreed > 12 and ours >= 0.7 * agreed, (agreed, ours)
    assert difference <= 2 * noise


def test_an_adapter_changes_the_requests_that_name_it_alone(served: Served) -> None:
    if not served.kind.body:
        pytest.skip("no adapter")
    servers, body = served.servers, served.kind.body
    base, adapted = scores(servers["whole"]), scores(servers["whole"], **body)
    noise = np.abs(scores(servers["triton"]) - scores(servers["fa3"])).mean()
    assert np.abs(adapted - base).mean() > 4 * noise
    assert np.abs(base - scores(servers["fa3"])).mean() <= 1.5 * noise
    ids = prompt_ids(5, PROMPT)
    # KV of one must not serve the other, nor requests that ask for attention of their own.
    cached = [ask(servers["short"], ids, 2, **each)["cached_tokens"] for each in ({}, body, body)]
    assert cached[0] < 128 and cached[1] < 128 and cached[2] > PROMPT // 2
    params = {**sampling(2), "custom_params": {"kascade": {"phases": "none"}}}
    asked = {"input_ids": ids, "sampling_params": params, **body}
    reply = [post(servers["short"], "/generate", asked)["meta_info"] for _ in range(2)]
    assert reply[0]["cached_tokens"] < 128 and reply[1]["cached_tokens"] > PROMPT // 2
