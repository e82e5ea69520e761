"""A real server that runs the kernels in Triton's interpreter: slow, so there are few tokens."""

from pathlib import Path

import pytest
import torch

from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    assert_equals,
    generate,
    prompt_ids,
    reference,
    shipped_plan,
    tokens_and_logprobs,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on this machine's GPU"),
]


def test_kernels_serve_what_the_reference_says(tmp_path: Path) -> None:
    """Prefill of two chunks, decoding, and both again after a prefix hit; some rows are sparse."""
    ids = prompt_ids(4, 200)
    flags = ["--kascade-exact", "--chunked-prefill-size", "128", "--skip-server-warmup"]
    flags += ["--log-level", "info"]
    interpreted = {"TRITON_INTERPRET": "1"}
    arguments = [*demo_arguments("kascade"), *flags]
    with Server(arguments, tmp_path / "log", environment=interpreted) as server:
        cold, warm = (generate(server, ids, 3) for _ in range(2))
        assert "kascade: attention runs through Triton kernels" in server.log.read_text()
    assert warm["meta_info"]["cached_tokens"] >= len(ids) // 32 * 32 - 32
    expected = reference(shipped_plan(), ids, 3)
    for reply in (cold, warm):
        assert_equals(tokens_and_logprobs(reply), expected)
