"""The soak on a small scale: load, aborts, flushes, retractions, every length checked."""

import asyncio
import random
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import soak
from kascade_sglang.servers.process import Server
from tests.support.servers import LOADED


@LOADED
@pytest.mark.e2e
def test_a_short_soak(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "FLUSH_SECONDS", 2)
    monkeypatch.setattr(soak, "ABORT_SHARE", 0.5)
    draw = random.Random(0)
    prompts = [soak.Prompt(draw, 300, 16) for _ in range(3)]
    options = Namespace(minutes=0.1, clients=3, deterministic=False)
    row = asyncio.run(soak.soak(server, prompts, options))
    assert server.is_healthy()
    assert set(soak.COLUMNS) >= set(row)
    assert min(row[name] for name in ("requests", "aborted", "flushed", "retracted")) > 0
    assert row["wrong_length"] == row["failed"] == row["different"] == 0


def test_replies_that_differ_are_counted(tmp_path: Path) -> None:
    prompt = soak.Prompt(random.Random(0), 64, 16)
    prompt.alone = [[-1.0, 7, None]]
    meta = {"completion_tokens": prompt.outputs, "output_token_logprobs": [[-1.0, 7, None]]}
    load = soak.Load(Server([], tmp_path / "log"), [prompt], compare=True)
    load._check(prompt, meta)
    assert load.counts["different"] == load.counts["wrong_length"] == 0
    load._check(prompt, {**meta, "output_token_logprobs": [[-1.1, 7, None]]})
    load._check(prompt, {**meta, "output_token_logprobs": [], "num_retractions": 1})
    load._check(prompt, {**meta, "completion_tokens": 1})
    assert load.counts["different"] == 1
    assert load.counts["wrong_length"] == 1
    assert load.counts["compared"] == 3
