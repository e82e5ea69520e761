"""Benchmarks that ask a server, on a small scale: exact lengths, aborts, flushes, retractions."""

import asyncio
import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_serving as bench
from benchmarks import soak
from benchmarks.serving_model import make_model
from kascade_sglang.servers.process import Server
from tests.support.models import LLAMA, make_plan
from tests.support.servers import served


def tiny(folder: Path) -> list[str]:
    """Serve four layers of random weights, which know 1024 words of one token each."""
    config = {**LLAMA, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    flags = ["--max-total-tokens", "8192"]
    if not torch.cuda.is_available():
        flags += ["--dtype", "float32", "--mem-fraction-static", "0.5", "--sleep-on-idle"]
    model = make_model(config, make_plan(), folder / "model")
    return bench.server_arguments(model, "kascade", Namespace(model_path=None, server_flags=flags))


# Every third step takes a request out again where there are several.
pytestmark = [pytest.mark.e2e, served(model=tiny, SGLANG_TEST_RETRACT="true")]


def test_every_request_gets_what_it_asks_for(server: Server, tmp_path: Path) -> None:
    model = server.log.parent / "model"
    plain = bench.Workload(2, 300, 4, "itl_p50_ms", 2.0)
    rag = bench.Workload(4, 320, 4, "ttft_p99_ms", 1.2, prefix=256, groups=2, arrivals=0.8)
    plain_row = bench.measure(server, model, plain, float("inf"), tmp_path)
    rag_row = bench.measure(server, model, rag, 1.0, tmp_path)
    assert (plain_row["input_tokens"], plain_row["output_tokens"]) == (600, 8)
    assert rag_row["input_tokens"] == 4 * 320
    assert rag_row["cache_hit_rate"] > 0.05
    assert set(bench.COLUMNS) >= set(rag_row)


def test_a_short_soak(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FLUSH_SECONDS", 2)
    monkeypatch.setattr(soak, "ABORT_SHARE", 0.5)
    draw = random.Random(0)
    prompts = [soak.Prompt(draw, 300, 16) for _ in range(3)]
    options = Namespace(seconds=6, clients=3, deterministic=False, weights=None)
    row = asyncio.run(soak.soak(server, prompts, options))
    assert server.is_healthy()
    assert set(soak.COLUMNS) >= set(row)
    assert min(row[name] for name in ("requests", "aborted", "flushed", "retracted")) > 0
    assert row["wrong_length"] == row["failed"] == row["different"] == 0
