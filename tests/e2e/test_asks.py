"""Requests that ask a real server for attention of their own."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from kascade_kernels.budget import Budget
from kascade_sglang.plan.schema import Plan
from kascade_sglang.servers.demo_model import MODEL_NAME
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    TOLERANCE,
    assert_equals,
    generate,
    grown_counters,
    post,
    prompt_ids,
    reference,
    sampling,
    shipped_plan,
    tokens_and_logprobs,
)
from tests.support.servers import everyday

pytestmark = [pytest.mark.e2e, everyday]

DENSE = {"phases": "none"}
MORE = {"topk_ratio": 0.4, "min_k": 256, "prefill_min_k": 256}


def text(seed: int, tokens: int) -> list[int]:
    """A prompt that ends amid a document: what comes next depends on all that is attended to."""
    return prompt_ids(seed, tokens)[: tokens - 297]


def with_budget(budget: Budget) -> Plan:
    return replace(shipped_plan(), budget=budget, decode_min_k=None, prefill_min_k=None)


EXPECTED = {"dense": Budget(1.0, 64), "more": Budget(0.4, 256)}
ASKED = {"dense": DENSE, "more": MORE}


def ask(
    server: Server, ids: list[int], asked: dict[str, Any], new_tokens: int = 12, **body: Any
) -> dict[str, Any]:
    """Continue one prompt greedily through /generate, with attention of its own."""
    params = {**sampling(new_tokens), "custom_params": {"kascade": asked}}
    body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, **body}
    return post(server, "/generate", body)


@pytest.mark.parametrize("kind", ASKED)
def test_replies_equal_the_reference_of_that_budget(server: Server, kind: str) -> None:
    ids = text(21, 1500)
    expected = reference(with_budget(EXPECTED[kind]), ids, 12)
    usual = reference(shipped_plan(), ids, 12)
    assert max(abs(a - b) for a, b in zip(expected[1], usual[1], strict=True)) > 2 * TOLERANCE
    assert_equals(tokens_and_logprobs(ask(server, ids, ASKED[kind])), expected)
    assert_equals(tokens_and_logprobs(generate(server, ids, 12)), usual)


def test_only_prefill_is_dense_where_a_request_says_so(server: Server) -> None:
    ids = text(22, 1500)
    tokens, logprobs = tokens_and_logprobs(ask(server, ids, {"phases": "decode"}))
    dense = reference(with_budget(Budget(1.0, 64)), ids, 12)
    assert_equals((tokens[:1], logprobs[:1]), (dense[0][:1], dense[1][:1]))
    assert max(abs(a - b) for a, b in zip(logprobs, dense[1], strict=True)) > 2 * TOLERANCE


def test_kv_of_different_kinds_never_meets(server: Server) -> None:
    ids = text(23, 1500)
    usual = generate(server, ids, 12)
    replies = {kind: [ask(server, ids, asked) for _ in range(2)] for kind, asked in ASKED.items()}
    for first, second in replies.values():
        assert first["meta_info"]["cached_tokens"] == 0
        assert second["meta_info"]["cached_tokens"] == (len(ids) - 1) // 32 * 32
        assert_equals(tokens_and_logprobs(second), tokens_and_logprobs(first))
    again = generate(server, ids, 12)
    assert again["meta_info"]["cached_tokens"] == (len(ids) - 1) // 32 * 32
    assert_equals(tokens_and_logprobs(again), tokens_and_logprobs(usual))
    # What the server does anyway is no kind of its own; a user's own key still parts its users.
    same = ask(server, ids, {"phases": "both"})
    assert same["meta_info"]["cached_tokens"] == (len(ids) - 1) // 32 * 32
    assert ask(server, ids, DENSE, extra_key="mine")["meta_info"]["cached_tokens"] == 0
    mine = ask(server, ids, DENSE, extra_key="mine")
    assert mine["meta_info"]["cached_tokens"] == (len(ids) - 1) // 32 * 32


def test_mixed_company_changes_nothing(server: Server) -> None:
    prompts = [text(seed, tokens) for seed, tokens in ((24, 900), (25, 1500), (26, 1200))]
    asked = [DENSE, MORE, {"phases": "both"}, {"min_k": 64}]
    cases = [(ids, each) for ids in prompts for each in asked]
    alone = [tokens_and_logprobs(ask(server, *case, extra_key="alone")) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: ask(server, *case, extra_key="together"), cases))
    for reply, expected in zip(together, alone, strict=True):
        assert_equals(tokens_and_logprobs(reply), expected)


def test_the_openai_api_takes_it_in_extra_body(server: Server) -> None:
    client, ids = OpenAI(base_url=f"{server.url}/v1", api_key="none"), text(27, 1100)
    body = {"custom_params": {"kascade": DENSE}, "ignore_eos": True}
    request = {"model": MODEL_NAME, "prompt": ids, "max_tokens": 12, "temperature": 0}
    reply = client.completions.create(**request, extra_body=body)
    assert reply.choices[0].text == ask(server, ids, DENSE)["text"]
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=2, extra_body=body
    )
    assert chat.usage.completion_tokens == 2
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="phases: expected one of 'both'.*got 'off'"):
            client.chat.completions.create(
                model=MODEL_NAME,
                messages=messages,
                stream=stream,
                extra_body={"custom_params": {"kascade": {"phases": "off"}}},
            )


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"topk_ratio": 2}, r"topk_ratio: expected a number in (0, 1], got 2"),
        ({"topk_ratio": 0.9}, "expected at most"),
        ({"min_k": "many"}, "min_k: expected a whole number"),
        ({"phases": "none", "min_k": 128}, "min_k: expected no budget where attention is dense"),
        ({"ratio": 0.2}, "unknown 'ratio'; a request may ask for phases, topk_ratio"),
        ("dense", "expected an object like"),
    ],
    ids=str,
)
def test_what_may_not_be_asked_is_one_sentence(server: Server, asked: Any, sentence: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refused:
        ask(server, prompt_ids(28, 300)[:40], asked)
    assert refused.value.response.status_code == 400
    message = refused.value.response.json()["error"]["message"]
    assert message.startswith("custom_params.kascade: ") and sentence in message
    assert "\n" not in message


def test_a_session_and_a_forged_key_are_refused(server: Server) -> None:
    ids = prompt_ids(29, 300)[:40]
    session = json.loads(post(server, "/open_session", {"capacity_of_str_len": 1000}))
    for body, sentence in (
        ({"session_params": {"id": session}}, "expected no session"),
        ({"extra_key": "\x1fkascade:1000000/64"}, "extra_key: expected no"),
    ):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            ask(server, ids, DENSE, **body)
        assert refused.value.response.status_code == 400
        assert sentence in refused.value.response.json()["error"]["message"]
    post(server, "/close_session", {"session_id": session})
    assert generate(server, ids, 2)["meta_info"]["completion_tokens"] == 2


def test_counters_count_what_was_asked(server: Server) -> None:
    ids = text(30, 1300)
    grown = grown_counters(server, lambda: ask(server, ids, DENSE, 1))
    assert grown["prefill", "attended"] == grown["prefill", "dense"] > 0
    assert grown["prefill", "scored"] == 0
