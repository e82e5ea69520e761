"""A real server whose KV cache is in fp8, against the reference on keys and values so rounded."""

import httpx
import pytest
import torch

from kascade_sglang.calibration import hf_attention
from kascade_sglang.calibration.hf_attention import KascadeAttention, LayerCall
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    generate,
    prompt_ids,
    reference,
    shipped_plan,
    tokens_and_logprobs,
)
from tests.support.servers import served

NAME = "fp8_e4m3"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with float32 on a CPU"),
    served("--chunked-prefill-size", "512", "--kv-cache-dtype", NAME, "--log-level", "info"),
]


TOLERANCE = 1e-1
"""Log probabilities of float32 servers agree within 2e-3, but a key that lies between two values of
fp8 may go to the one or to the other."""


def apart(
    ours: tuple[list[int], list[float]], theirs: tuple[list[int], list[float]]
) -> torch.Tensor:
    """How far log probabilities are apart."""
    return (torch.tensor(ours[1]) - torch.tensor(theirs[1])).abs()


class RoundedAttention(KascadeAttention):
    """The oracle, with keys and values as the pool keeps them."""

    def attend(self, call: LayerCall) -> torch.Tensor:
        k, v = (each.to(FP8_TYPES[NAME]).to(each.dtype) for each in (call.k, call.v))
        return super().attend(call._replace(k=k, v=v))


@pytest.mark.parametrize("tokens", [300, 1500])
def test_output_equals_the_reference(
    server: Server, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, and again after a prefix hit; amid prose, where no next word is sure."""
    ids = prompt_ids(1, 2000)[:tokens]
    cold, warm = (generate(server, ids, 12) for _ in range(2))
    assert warm["meta_info"]["cached_tokens"] >= len(ids) // 32 * 32 - 32
    unrounded = reference(shipped_plan(), ids, 12)
    monkeypatch.setattr(hf_attention, "KascadeAttention", RoundedAttention)
    expected = reference(shipped_plan(), ids, 12)
    for reply in (cold, warm):
        found = tokens_and_logprobs(reply)
        assert found[0] == expected[0]
        assert apart(found, expected).max() <= TOLERANCE
        assert apart(found, expected).mean() < apart(found, unrounded).mean() / 10


def test_the_server_says_so(server: Server) -> None:
    reply = httpx.get(f"{server.url}/server_info", timeout=60, trust_env=False)
    (state,) = reply.json()["internal_states"]
    assert state["kascade"]["kv_cache_dtype"] == NAME
    assert "scores use the pool's own keys" in server.log.read_text()
