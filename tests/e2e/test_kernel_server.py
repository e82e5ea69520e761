"""A real server that runs the kernels in Triton's interpreter: slow, so there are few tokens."""

import pytest
import torch

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
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU"),
]
FLAGS = ["--kascade-exact", "--chunked-prefill-size", "128", "--skip-server-warmup"]


@served(*FLAGS, "--log-level", "info", TRITON_INTERPRET="1")
def test_kernels_serve_what_the_reference_says(server: Server) -> None:
    """Prefill of two chunks, decoding, and both again after a prefix hit; some rows are sparse."""
    ids = prompt_ids(4, 170)
    cold, warm = (generate(server, ids, 2) for _ in range(2))
    assert "kascade: attention runs through Triton kernels" in server.log.read_text()
    assert warm["meta_info"]["cached_tokens"] >= len(ids) // 32 * 32 - 32
    expected = reference(shipped_plan(), ids, 2)
    for reply in (cold, warm):
        assert_equals(tokens_and_logprobs(reply), expected)
