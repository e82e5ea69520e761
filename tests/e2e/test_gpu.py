"""Real servers on a GPU: the replies of a float32 server on the CPU, whatever is captured or exact.

So they are with an fp8 cache, also on a CPU.

``cpu_replies.json`` holds what the torch reference answers: ``python -m tests.e2e.test_gpu`` asks
a server on a CPU and writes it anew.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.requests import (
    REPLIES,
    ask_everything,
    generate,
    prompt_ids,
    tokens_and_logprobs,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--disable-cuda-graph"],
        ["--kascade-exact"],
        ["--kascade-exact", "--disable-cuda-graph", "--disable-radix-cache"],
        ["--chunked-prefill-size", "1024", "--disable-overlap-schedule"],
        ["--kv-cache-dtype", "fp8_e4m3"],
        ["--kv-cache-dtype", "fp8_e4m3", "--kascade-dense-backend", "triton"],
    ],
    ids=["default", "eager", "exact", "exact-eager", "chunked", "fp8", "fp8-triton"],
)
def test_replies_are_those_of_the_cpu(flags: list[str], tmp_path: Path) -> None:
    with Server([*demo_arguments("kascade"), *flags], tmp_path / "log") as server:
        assert ask_everything(server) == json.loads(REPLIES.read_text())


def test_an_fp8_cache_holds_twice_the_tokens(tmp_path: Path) -> None:
    """More than that: there are no copies of keys."""
    held = []
    for name in ("auto", "fp8_e4m3"):
        arguments = demo_arguments("kascade")
        at = arguments.index("--max-total-tokens")
        del arguments[at : at + 2]
        flags = ["--kv-cache-dtype", name, "--mem-fraction-static", "0.2"]
        with Server([*arguments, *flags], tmp_path / name) as server:
            reply = httpx.get(f"{server.url}/server_info", timeout=60, trust_env=False)
            held.append(reply.json()["max_total_num_tokens"])
    assert held[1] >= 1.98 * held[0]


def test_deterministic_inference_is_bit_identical_cold_warm_and_in_company(tmp_path: Path) -> None:
    flags = ["--enable-deterministic-inference", "--chunked-prefill-size", "2048"]
    prompts = [prompt_ids(seed, tokens) for seed, tokens in ((3, 3000), (4, 6000), (5, 1500))]
    with Server([*demo_arguments("kascade"), *flags], tmp_path / "log") as server:
        cold = [generate(server, ids, 24) for ids in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            warm = list(pool.map(lambda ids: generate(server, ids, 24), prompts))
    assert all(reply["meta_info"]["cached_tokens"] < 128 for reply in cold)
    assert all(reply["meta_info"]["cached_tokens"] > 1000 for reply in warm)
    assert list(map(tokens_and_logprobs, cold)) == list(map(tokens_and_logprobs, warm))


def record() -> None:
    """Write the replies of a server on this machine's CPU."""
    if torch.cuda.is_available():
        sys.exit("expected no GPU: set CUDA_VISIBLE_DEVICES to nothing")
    log = Path(tempfile.mkdtemp()) / "log"
    with Server(demo_arguments("kascade"), log) as server:
        replies = ask_everything(server)
    REPLIES.write_text(json.dumps(replies, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    record()
