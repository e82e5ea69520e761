"""A real server with the shipped model and plan, as a user meets it."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI

from kascade_sglang.cli import main
from kascade_sglang.config import load_config
from kascade_sglang.servers.demo_model import MODEL, MODEL_NAME
from kascade_sglang.servers.process import Server
from kascade_sglang.sparsity import key_reads
from kascade_sglang.text.documents import is_correct, messages
from tests.support.requests import (
    assert_equals,
    document,
    generate,
    grown_counters,
    post,
    prompt_ids,
    reference,
    sampling,
    shipped_plan,
    tokens_and_logprobs,
)
from tests.support.servers import everyday, flush

pytestmark = [pytest.mark.e2e, everyday]


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.mark.parametrize("tokens", [300, 1100, 2300])
def test_output_equals_the_reference(server: Server, tokens: int) -> None:
    ids = prompt_ids(1, tokens)
    reply = generate(server, ids, 12)
    assert_equals(tokens_and_logprobs(reply), reference(shipped_plan(), ids, 12))


def test_prefix_hit_uses_the_prefix_and_changes_nothing(server: Server) -> None:
    ids = prompt_ids(2, 1500)
    flush(server)
    cold, warm = generate(server, ids, 12), generate(server, ids, 12)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["meta_info"]["cached_tokens"] == (len(ids) - 1) // 32 * 32
    assert_equals(tokens_and_logprobs(warm), tokens_and_logprobs(cold))
    other = prompt_ids(2, 1500, question=1)
    hit = generate(server, other, 12)
    shared = next(i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
    assert hit["meta_info"]["cached_tokens"] == shared // 32 * 32 > 1300
    assert_equals(tokens_and_logprobs(hit), reference(shipped_plan(), other, 12))


def test_concurrent_mixed_lengths_equal_requests_alone(server: Server) -> None:
    prompts = [
        prompt_ids(seed, tokens) for seed, tokens in ((3, 200), (4, 2000), (5, 700), (6, 1200))
    ]
    prompts.append(prompts[0][:33])
    alone = [tokens_and_logprobs(generate(server, ids, 10)) for ids in prompts]
    flush(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda ids: generate(server, ids, 10), prompts))
    for reply, expected in zip(together, alone, strict=True):
        assert_equals(tokens_and_logprobs(reply), expected)


def test_counters_equal_the_budget(server: Server) -> None:
    """What a report says of one request is what the backend counted, plus one step run ahead."""
    ids = prompt_ids(7, 1800)
    config = load_config(str(MODEL), shipped_plan().shape)
    grown = grown_counters(server, lambda: generate(server, ids, 9))
    prefill = key_reads(config, np.arange(len(ids)))
    for kind in ("attended", "scored", "dense"):
        assert grown["prefill", kind] == getattr(prefill, kind)
        least = getattr(key_reads(config, np.arange(len(ids), len(ids) + 8)), kind)
        most = getattr(key_reads(config, np.arange(len(ids), len(ids) + 9)), kind)
        assert least <= grown["decode", kind] <= most
    assert prefill.attended < 0.5 * prefill.dense


def test_eval_command_scores_and_counts_reads(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    asked = ["--tasks", "facts_single_key,perplexity", "--lengths", "2048", "--samples", "3"]
    page = tmp_path / "page.html"
    asked += ["--report", str(page)]
    assert main(["eval", "--url", server.url, *asked, "--out", str(out)]) == 0
    with open(out, newline="") as file:
        facts, perplexity = csv.DictReader(file)
    assert (facts["task"], facts["n"]) == ("facts_single_key", "3")
    assert float(facts["score"]) == 100
    assert 0 < float(facts["prefill_attended"]) < 0.5
    assert 0 < float(facts["decode_attended"]) < 0.5
    assert float(perplexity["score"]) > 1
    assert facts["label"] == "kascade"
    assert "the answer: <b>The " in page.read_text() and "class=mark" in page.read_text()


def test_chat_streams_the_right_answer(client: OpenAI) -> None:
    text = document(8, 2000)
    question = text.questions[0]
    request = {
        "model": MODEL_NAME,
        "messages": messages(text, question),
        "max_tokens": 48,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request).choices[0].message.content
    stream = client.chat.completions.create(**request, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3
    assert is_correct(question, whole)


def test_completions_take_token_ids(client: OpenAI, server: Server) -> None:
    ids = prompt_ids(9, 900)
    reply = client.completions.create(
        model=MODEL_NAME, prompt=ids, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.usage.completion_tokens == 8
    assert reply.choices[0].text == generate(server, ids, 8)["text"]


def test_abort_leaves_the_server_in_order(server: Server) -> None:
    ids = prompt_ids(10, 1200)
    expected = tokens_and_logprobs(generate(server, ids, 10))
    body = {"input_ids": ids, "sampling_params": sampling(4000), "stream": True}
    url, options = f"{server.url}/generate", {"timeout": 60, "trust_env": False}
    with httpx.stream("POST", url, json=body, **options) as stream:
        assert next(stream.iter_lines()).startswith("data:")
    post(server, "/abort_request", {"rid": "", "abort_all": True})
    flush(server)
    again = generate(server, ids, 10)
    assert again["meta_info"]["cached_tokens"] == 0
    assert_equals(tokens_and_logprobs(again), expected)
