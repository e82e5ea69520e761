"""Prompts about real documents, requests to a server, and the reference to compare with."""

import asyncio
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.demo.__main__ import documents
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan, load_plan
from kascade_sglang.servers.client import ask_all
from kascade_sglang.servers.counters import KeyCounters
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server
from kascade_sglang.text.documents import Document, make_document, messages

REPLIES = Path(__file__).with_name("cpu_replies.json")
"""The replies of a float32 server on a CPU; test_gpu.py says how to write them."""
TOLERANCE = 2e-3
"""Largest difference of a log probability in float32: GEMMs of other shapes round differently."""


def settled_counters(server: Server) -> KeyCounters:
    """A server's counters once no step adds to them: one may run ahead of the last reply."""
    for _ in range(50):
        before = server.key_counters()
        time.sleep(0.2)
        if server.key_counters() == before:
            return before
    raise AssertionError("the counters went on growing for ten seconds")


def grown_counters(server: Server, ask: Callable[[], object]) -> KeyCounters:
    """By how much the counters of a server grow as something asks it."""
    before = settled_counters(server)
    ask()
    return {key: value - before.get(key, 0) for key, value in settled_counters(server).items()}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def shipped_plan() -> Plan:
    return load_plan(MODEL / PLAN_NAME)


@cache
def document(seed: int, tokens: int) -> Document:
    def count_tokens(text: str) -> int:
        return len(tokenizer().encode(text, add_special_tokens=False))

    return make_document(seed, tokens, count_tokens, 2, ("single_key", "multi_key"))


def prompt_ids(seed: int, tokens: int, question: int = 0) -> list[int]:
    """Token ids of the chat that asks one question about a document of about ``tokens`` tokens."""
    text = document(seed, tokens)
    chat = messages(text, text.questions[question])
    return tokenizer().apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )


@cache
def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def reference(plan: Plan, ids: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Return the tokens and log probabilities that the torch reference gives."""
    return kascade_generate(hf_model(), plan, ids, new_tokens)


def post(server: Server, path: str, body: dict[str, Any], timeout: float = 120) -> Any:
    """Ask a server; raises httpx.HTTPStatusError where it refuses."""
    reply = httpx.post(server.url + path, json=body, timeout=timeout, trust_env=False)
    reply.raise_for_status()
    return reply.json() if reply.text.startswith(("{", "[")) else reply.text


def sampling(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}


def generate(server: Server, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Continue one prompt greedily through /generate."""
    body = {"input_ids": ids, "sampling_params": sampling(new_tokens), "return_logprob": True}
    return post(server, "/generate", body)


def tokens_and_logprobs(reply: dict[str, Any]) -> tuple[list[int], list[float]]:
    pairs = reply["meta_info"]["output_token_logprobs"]
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]


def assert_equals(
    ours: tuple[list[int], list[float]], theirs: tuple[list[int], list[float]]
) -> None:
    """Same tokens, and log probabilities within the tolerance."""
    assert ours[0] == theirs[0]
    difference = torch.tensor(ours[1]) - torch.tensor(theirs[1])
    assert difference.abs().max() <= TOLERANCE


def ask_everything(server: Server, about: list[Document] | None = None) -> dict[str, str]:
    """Ask the demo's questions, those about one document four at a time.

    about: some of the demo's documents; None for all.
    """

    async def replies() -> dict[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
            answers = []
            for document in about or documents():
                answers += await ask_all(client, document, document.questions, 4)
        return {answer.question.text: answer.text for answer in answers}

    return asyncio.run(replies())
