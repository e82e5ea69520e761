"""HiCache on a GPU: a prefix that was in host memory selects the keys it selected before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kascade_sglang.host.release import VERIFIED_WITH_HICACHE
from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import generate, post, prompt_ids, sampling, tokens_and_logprobs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(version("sglang") not in VERIFIED_WITH_HICACHE, reason="refused there"),
]

PROMPT, NEW = 3000, 24
SMALL = ["--max-total-tokens", "8192", "--chunked-prefill-size", "2048"]
SMALL += ["--enable-deterministic-inference"]
HICACHE = ["--enable-hierarchical-cache", "--hicache-ratio", "8"]
KINDS = {
    "through": (["--kascade-exact"], ["--hicache-write-policy", "write_through"]),
    "back": (
        ["--kascade-exact", "--disable-cuda-graph"],
        ["--hicache-write-policy", "write_back", "--hicache-io-backend", "direct"],
    ),
    "fp8": (["--kv-cache-dtype", "fp8_e4m3", "--kascade-dense-backend", "triton"], []),
}


@contextmanager
def small_server(log: Path, *flags: str) -> Iterator[Server]:
    """A server whose pool holds two of the prompts."""
    with Server([*demo_arguments("kascade"), *SMALL, *flags], log) as server:
        yield server


def crowd_out(server: Server, seed: int) -> None:
    """Ask about documents until none that was asked about before is left on the GPU."""
    for other in range(seed, seed + 3):
        generate(server, prompt_ids(other, PROMPT), 2)


def ask(server: Server, ids: list[int], asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """Continue a prompt greedily; asked: for attention of the request's own."""
    params = sampling(NEW) | ({} if asked is None else {"custom_params": {"kascade": asked}})
    body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
    return post(server, "/generate", body)


def cached(reply: dict[str, Any]) -> int:
    """Tokens of a prompt that were in a cache."""
    return reply["meta_info"]["cached_tokens"]


def longer(reply: dict[str, Any], ids: list[int]) -> list[int]:
    """A prompt that goes on behind another's reply."""
    return [*ids, *reply["output_ids"], *ids[-40:]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_from_host_memory_changes_no_bit(kind: str, tmp_path: Path) -> None:
    own, tier = KINDS[kind]
    prompts = [prompt_ids(seed, PROMPT) for seed in (3, 4)]
    ids = prompts[0]
    with small_server(tmp_path / "without", *own) as server:
        cold, warm = ([ask(server, each) for each in prompts] for _ in range(2))
        expected = [*warm, ask(server, longer(cold[0], ids))]
        crowd_out(server, 10)
        assert cached(ask(server, ids)) < 128, "the pool is too small to keep it"
    with small_server(tmp_path / "with", *own, *HICACHE, *tier) as server:
        first = [ask(server, each) for each in prompts]
        crowd_out(server, 10)
        found = [ask(server, each) for each in prompts]
        crowd_out(server, 20)
        found.append(ask(server, longer(first[0], ids)))
        crowd_out(server, 30)
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda each: ask(server, each), prompts))
    assert list(map(tokens_and_logprobs, first)) == list(map(tokens_and_logprobs, cold))
    assert all(cached(reply) < 128 for reply in first)
    assert list(map(cached, found)) == list(map(cached, expected))
    assert all(reply["meta_info"]["cached_tokens_details"]["host"] > PROMPT // 2 for reply in found)
    assert list(map(tokens_and_logprobs, found)) == list(map(tokens_and_logprobs, expected))
    assert all(cached(reply) > PROMPT // 2 for reply in together)
    assert list(map(tokens_and_logprobs, together)) == list(map(tokens_and_logprobs, warm))
    assert list(map(tokens_and_logprobs, warm)) == list(map(tokens_and_logprobs, cold))


def test_what_another_kind_of_attention_left_on_the_host_is_not_used(tmp_path: Path) -> None:
    ids, dense = prompt_ids(3, PROMPT), {"phases": "none"}
    with small_server(tmp_path / "log", "--kascade-exact", *HICACHE) as server:
        usual = ask(server, ids)
        crowd_out(server, 10)
        apart = ask(server, ids, dense)
        crowd_out(server, 20)
        again = [ask(server, ids, dense), ask(server, ids)]
    assert cached(usual) < 128 and cached(apart) < 128
    assert tokens_and_logprobs(usual) != tokens_and_logprobs(apart)
    assert all(cached(reply) > PROMPT // 2 for reply in again)
    assert list(map(tokens_and_logprobs, again)) == list(map(tokens_and_logprobs, (apart, usual)))


def test_a_storage_tier_is_refused_while_it_runs_too(tmp_path: Path) -> None:
    """What other servers share may hold keys and values that dense attention made."""
    key = {"Authorization": "Bearer admin"}
    flags = ["--kascade-exact", *HICACHE, "--admin-api-key", "admin"]
    with small_server(tmp_path / "log", *flags) as server:
        reply = httpx.put(
            f"{server.url}/hicache/storage-backend",
            json={"hicache_storage_backend": "file"},
            headers=key,
            timeout=60,
            trust_env=False,
        )
        assert reply.status_code == 400 and "--hicache-storage-backend: expected" in reply.text
        assert cached(ask(server, prompt_ids(5, 300))) < 128
