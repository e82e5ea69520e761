"""Speculative decoding on a GPU: chains of drafts change no reply, and spoil no prefix cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kascade_sglang.host.release import VERIFIED_WITH_SPECULATION
from kascade_sglang.servers.demo_model import MODEL, demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    REPLIES,
    ask_everything,
    generate,
    prompt_ids,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        version("sglang") not in VERIFIED_WITH_SPECULATION, reason="refused on this release"
    ),
]

COMPILER = {"CXX": "c++ -include cstddef"}
"""SGLang compiles what finds n-grams; newer compilers miss an include there."""
NGRAM = ["--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1"]
NGRAM += ["--speculative-num-draft-tokens", "4"]
CHAIN = ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
CHAIN += ["--speculative-num-draft-tokens", "4"]


def drafted_by(algorithm: str, model: Path, backend: str) -> list[str]:
    """Flags of a draft model, which attends densely."""
    flags = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(model)]
    return [*flags, "--speculative-draft-attention-backend", backend, *CHAIN]


def eagle_head(folder: Path) -> Path:
    """A draft model of EAGLE's kind: the demo's first layer, which guesses badly."""
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    config |= {"tie_word_embeddings": False}  # They are the model's, which SGLang puts in.
    first, weights = "model.layers.0.", {}
    for path in MODEL.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.startswith(first) and "input_layernorm" not in name:
                weights[name.removeprefix("model.")] = tensor
    size = config["hidden_size"]
    weights["fc.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    weights["fc.weight"] = torch.eye(size).repeat(1, 2).to(torch.bfloat16).contiguous()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--disable-cuda-graph"],
        ["--kascade-exact", "--page-size", "1", "--disable-overlap-schedule"],
        ["--kv-cache-dtype", "fp8_e4m3", "--kascade-dense-backend", "triton"],
    ],
    ids=["default", "eager", "exact", "fp8"],
)
def test_replies_with_ngrams_are_those_of_the_cpu(flags: list[str], tmp_path: Path) -> None:
    arguments = [*demo_arguments("kascade"), *NGRAM, *flags]
    with Server(arguments, tmp_path / "log", environment=COMPILER) as server:
        expected = json.loads(REPLIES.read_text())
        assert ask_everything(server) == expected
        # Now all drafts are right.
        assert ask_everything(server) == expected


@pytest.mark.parametrize(
    "name, backend, flags",
    [
        ("STANDALONE", "fa3", []),
        ("STANDALONE", "triton", ["--disable-cuda-graph"]),
        ("EAGLE", "fa3", []),
    ],
)
def test_replies_with_a_draft_model_are_those_of_the_cpu(
    name: str, backend: str, flags: list[str], tmp_path: Path
) -> None:
    drafting = MODEL if name == "STANDALONE" else eagle_head(tmp_path / "eagle")
    arguments = [*demo_arguments("kascade"), *drafted_by(name, drafting, backend), *flags]
    with Server(arguments, tmp_path / "log") as server:
        assert ask_everything(server) == json.loads(REPLIES.read_text())
        verified = generate(server, prompt_ids(3, 3000), 24)["meta_info"]["spec_verify_ct"]
    if name == "STANDALONE":
        assert verified < 16, "most drafts of the same model are right"


def test_tokens_are_those_without_speculation(tmp_path: Path) -> None:
    """Alone, in company, and where what chains left in the prefix cache is read again."""
    prompts = [prompt_ids(seed, tokens) for seed, tokens in ((3, 3000), (4, 6000), (5, 1500))]
    common = [*demo_arguments("kascade"), "--enable-deterministic-inference"]
    found = []
    for name, flags in (("plain", []), ("ngram", NGRAM)):
        with Server([*common, *flags], tmp_path / name, environment=COMPILER) as server:
            replies = [generate(server, ids, 64) for ids in prompts]
            with ThreadPoolExecutor(len(prompts)) as pool:
                replies += pool.map(lambda ids: generate(server, ids, 64), prompts)
            for ids, reply in zip(prompts, replies[: len(prompts)], strict=True):
                replies.append(generate(server, [*ids, *reply["output_ids"], *ids[-40:]], 64))
        found.append(replies)
    plain, ngram = found
    again = ngram[len(prompts) : 2 * len(prompts)]
    assert all(reply["meta_info"]["spec_verify_ct"] < 40 for reply in again), "drafts were right"
    for ids, reply in zip(prompts, ngram[2 * len(prompts) :], strict=True):
        assert reply["meta_info"]["cached_tokens"] > len(ids)
    assert [reply["output_ids"] for reply in ngram] == [reply["output_ids"] for reply in plain]
