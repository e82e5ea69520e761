"""Real servers of tiny random models with sliding windows, against transformers' own attention."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.cli import main
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import Plan, load_plan
from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from kascade_sglang.sparsity import key_reads
from tests.support.requests import (
    TOLERANCE,
    assert_equals,
    generate,
    grown_counters,
    prompt_ids,
    tokenizer,
    tokens_and_logprobs,
)
from tests.support.small_models import WINDOW, least, load, own, save

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with float32 on a CPU"),
]

COVERED, NEW = 320, 12
"""Tokens that the budget covers; tokens asked for."""


def serve(folder: Path, plan: Plan, log: Path) -> Server:
    flags = [(f"--kascade-{name.replace('_', '-')}", str(n)) for name, n in least(plan).items()]
    plan.save(folder / PLAN_NAME)
    arguments = [*demo_arguments("kascade"), "--model-path", str(folder), *sum(flags, ())]
    return Server([*arguments, "--chunked-prefill-size", "512"], log)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with full attention in layers 1, 3 and 5."""
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    gemma3 = {"sliding_window_pattern": 2, "query_pre_attn_scalar": 64}
    return save(folder, "Gemma3Text", **gemma3)


@pytest.fixture(scope="module")
def plan(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Calibrated for that model."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "dev.txt").write_text(tokenizer().decode(prompt_ids(1, 700)))
    out = folder / "plan.json"
    arguments = ["--model", str(gemma), "--prompts", str(folder / "dev.txt"), "--out", str(out)]
    arguments += ["--anchors", "1,3", "--min-k", str(COVERED), "--device", "cpu"]
    assert main(["calibrate", *arguments]) == 0
    found = load_plan(out)
    assert (found.windowed, found.reuse_layers) == ((0, 2, 4), [5])
    return found


@pytest.fixture(scope="module")
def server(gemma: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(gemma, plan, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def test_gemma_3_within_the_budget_is_transformers_own(server: Server, gemma: Path) -> None:
    ids = prompt_ids(2, 900)[: COVERED - NEW]
    reply = tokens_and_logprobs(generate(server, ids, NEW))
    assert_equals(reply, own(load(gemma), ids, NEW))
    narrower = own(load(gemma, sliding_window=WINDOW - 1), ids, NEW)
    assert narrower[1] != pytest.approx(reply[1], abs=TOLERANCE), "the window says nothing"


@pytest.mark.parametrize("tokens", [700, 1500])
def test_gemma_3_beyond_it_is_the_reference(
    server: Server, gemma: Path, plan: Plan, tokens: int
) -> None:
    ids, model = prompt_ids(3, tokens), load(gemma)
    cold, warm = (generate(server, ids, NEW) for _ in range(2))
    expected = kascade_generate(model, plan, ids, NEW)
    for reply in (cold, warm):
        assert_equals(tokens_and_logprobs(reply), expected)
    assert warm["meta_info"]["cached_tokens"] >= (len(ids) - 1) // 32 * 32
    assert own(model, ids, NEW)[1] != pytest.approx(expected[1], abs=0.01), "nothing was left out"


def test_windows_are_counted_as_what_they_hold(server: Server, plan: Plan) -> None:
    ids = prompt_ids(4, 1200)
    config = KascadeConfig(plan, plan.budget, plan.heads, window=WINDOW)
    grown = grown_counters(server, lambda: generate(server, ids, NEW))
    prefill = key_reads(config, np.arange(len(ids)))
    for kind in ("attended", "scored", "dense"):
        assert grown["prefill", kind] == getattr(prefill, kind)
        steps = (np.arange(len(ids), len(ids) + NEW - 1 + ahead) for ahead in (0, 1))
        least, most = (getattr(key_reads(config, step), kind) for step in steps)
        assert least <= grown["decode", kind] <= most
    assert prefill.attended < 0.8 * prefill.dense
    assert prefill.dense < 0.6 * 6 * sum(range(1, len(ids) + 1))
