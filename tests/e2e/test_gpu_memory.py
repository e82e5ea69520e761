"""GPU memory that runs out while a server prefills: one sentence, no hang, no process left."""

import random
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server, ServerError
from tests.support.requests import generate, post, prompt_ids

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LEFT = 32 * 2**20
"""Bytes that are left free."""
LONG_STEPS = ["--chunked-prefill-size", "65536", "--max-prefill-tokens", "65536"]
LONG_STEPS += ["--cuda-graph-backend-prefill", "disabled"]
"""So that a step needs memory that no earlier one took."""


def take_memory() -> list[torch.Tensor]:
    """Hold all memory that is free on the GPU, but for ``LEFT``."""
    taken: list[torch.Tensor] = []
    for block in (2**30, 2**26, 2**22):
        try:
            while torch.cuda.mem_get_info()[0] > LEFT + block:
                taken.append(torch.empty(block, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue
    return taken


def test_the_command_says_why_and_the_client_waits_for_nothing(tmp_path: Path) -> None:
    torch.empty(1, device="cuda")  # This process's own context comes first.
    arguments = [*demo_arguments("kascade"), *LONG_STEPS]
    taken: list[torch.Tensor] = []
    try:
        with (
            pytest.raises(ServerError, match=r"GPU memory: .* of \d+ new tokens.*; lower") as died,
            Server(arguments, tmp_path / "log") as server,
        ):
            generate(server, prompt_ids(3, 700), 4)
            processes = psutil.Process(server._process.pid).children(recursive=True)
            taken, draw = take_memory(), random.Random(0)
            prompts = [[draw.randrange(3, 900) for _ in range(8000)] for _ in range(6)]
            body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 1}}
            with pytest.raises(httpx.HTTPError) as failed:
                post(server, "/generate", body, timeout=100)
            assert not isinstance(failed.value, httpx.TimeoutException), "it waited in vain"
            server.require_running(60)
    finally:
        taken.clear()
        torch.cuda.empty_cache()
    assert len(str(died.value).splitlines()) == 1
    assert not psutil.wait_procs(processes, timeout=10)[1], "a process is left"
