"""What the soak counts, and a short one with a model that has weights."""

import asyncio
import json
import random
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import soak
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.servers.process import Server
from tests.support.servers import served


def test_replies_that_differ_are_counted(tmp_path: Path) -> None:
    prompt = soak.Prompt(random.Random(0), 64, 16)
    prompt.alone = [[-1.0, 7, None]]
    alike = {"completion_tokens": prompt.outputs, "output_token_logprobs": [[-1.0, 7, None]]}

    def reply(**changes: object) -> dict:
        return {"meta_info": alike | changes}

    load = soak.Load(Server([], tmp_path / "log"), [prompt], compare=True)
    load._check(prompt, reply())
    assert load.counts["different"] == load.counts["wrong_length"] == 0
    load._check(prompt, reply(output_token_logprobs=[[-1.1, 7, None]]))
    load._check(prompt, reply(output_token_logprobs=[], num_retractions=1))
    load._check(prompt, reply(completion_tokens=1))
    assert load.counts["different"] == 1
    assert load.counts["wrong_length"] == 1
    assert load.counts["compared"] == 3


def test_replies_of_another_form_are_counted() -> None:
    [_, bound, last] = soak.draw_prompts(3, 300, 16, structured=True)
    assert json.loads(bound.body()["sampling_params"]["json_schema"]) == soak.SCHEMA
    for text, right in (
        ('{"colour": "red", "sure": true}', True),
        ('{"colour": "green", "sure": true}', False),
        ('{"colour": "red"', False),
    ):
        assert bound.is_answered_by({"text": text}) == right
    turns = last.turns()
    assert len(turns) == soak.TURNS and turns[-1] is last
    assert all(b.ids[: len(a.ids)] == a.ids for a, b in zip(turns, turns[1:], strict=False))


# Every third step takes a request out again where there are several.
@pytest.mark.e2e
@served(SGLANG_TEST_RETRACT="true")
def test_a_soak_of_a_real_model(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations, structured output, aborts, retraction, and each way to disturb a server."""
    monkeypatch.setattr(soak, "FLUSH_SECONDS", 4)
    monkeypatch.setattr(soak, "ABORT_SHARE", 0.3)
    prompts = soak.draw_prompts(6, 300, 16, structured=True)
    options = Namespace(seconds=45, clients=3, deterministic=False, weights=str(MODEL))
    row = asyncio.run(soak.soak(server, prompts, options))
    assert server.is_healthy()
    assert set(soak.COLUMNS) >= set(row)
    counted = ("conversations", "structured", "aborted", "flushed", "updated", "released")
    assert min(row[name] for name in (*counted, "retracted")) > 0
    assert row["wrong_length"] == row["failed"] == row["different"] == 0
