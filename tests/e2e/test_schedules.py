"""Another schedule, the same results: no prefix cache, small chunks, chunks mixed with decoding."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from kascade_sglang.servers.process import Server
from tests.support.requests import (
    assert_equals,
    generate,
    prompt_ids,
    reference,
    shipped_plan,
    tokens_and_logprobs,
)
from tests.support.servers import served

pytestmark = [
    pytest.mark.e2e,
    served("--disable-radix-cache", "--chunked-prefill-size", "128", "--enable-mixed-chunk"),
]


@pytest.mark.parametrize("tokens", [300, 1100, 2300])
def test_small_chunks_without_cache_equal_the_reference(server: Server, tokens: int) -> None:
    ids = prompt_ids(1, tokens)
    reply = generate(server, ids, 12)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert_equals(tokens_and_logprobs(reply), reference(shipped_plan(), ids, 12))


def test_chunks_mixed_with_decoding_give_the_same_tokens(server: Server) -> None:
    """Decoding takes tokens from a chunk, which then ends inside a tile: only tokens must agree."""
    prompts = [prompt_ids(seed, tokens) for seed, tokens in ((3, 200), (4, 1500), (5, 700))]
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(lambda ids: generate(server, ids, 16), prompts))
    for ids, reply in zip(prompts, replies, strict=True):
        assert tokens_and_logprobs(reply)[0] == reference(shipped_plan(), ids, 16)[0]
