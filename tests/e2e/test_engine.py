"""``sglang.Engine`` in this process, with models of other families than the servers' own.

An engine that ends takes all children of its process with it, so no server runs beside one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import sglang
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.presets import identity_plan
from kascade_sglang.servers.demo_model import MODEL
from tests.support.engines import continue_all, engine_of
from tests.support.requests import assert_equals, hf_model, prompt_ids, tokens_and_logprobs
from tests.support.servers import Servers
from tests.support.small_models import least, load, own, save

pytestmark = pytest.mark.e2e
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="compares with float32 on a CPU")

LENGTHS = (200, 1100, 2100)
NEW_TOKENS = 16
COVERED = 320
"""Tokens that a budget covers."""
EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

Engines = Callable[..., AbstractContextManager[sglang.Engine]]


@pytest.fixture
def engines(servers: Servers) -> Engines:
    """``engine_of``, once no server runs that an engine's end would take with it."""
    servers.stop()
    return engine_of


def dense_tokens(ids: list[int]) -> list[int]:
    """Continue one prompt by transformers' own attention."""
    whole = hf_model().generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return whole[0, len(ids) :].tolist()


def test_budget_of_everything_gives_the_dense_tokens(engines: Engines) -> None:
    prompts = [prompt_ids(20 + index, length) for index, length in enumerate(LENGTHS)]
    with engines(MODEL, topk_ratio=1.0) as engine:
        replies = continue_all(engine, prompts, NEW_TOKENS)
    assert [reply["output_ids"] for reply in replies] == list(map(dense_tokens, prompts))


@on_a_cpu
def test_a_mixture_of_experts_equals_the_reference(engines: Engines, tmp_path: Path) -> None:
    """Qwen3-MoE, the family of Qwen3-30B-A3B."""
    folder = save(tmp_path / "model", "Qwen3Moe", sliding_window=None, **EXPERTS)
    model = load(folder)
    plan = identity_plan("test", shape_of(model.config), (0, 3), "test")
    plan = replace(plan, budget=Budget(0.1, 128))
    plan.save(folder / PLAN_NAME)
    prompts = [prompt_ids(31, tokens) for tokens in (300, 1100)]
    with engines(folder, **least(plan)) as engine:
        replies = continue_all(engine, prompts, NEW_TOKENS)
    for ids, reply in zip(prompts, replies, strict=True):
        expected = kascade_generate(model, plan, ids, NEW_TOKENS)
        assert_equals(tokens_and_logprobs(reply), expected)


@on_a_cpu
@pytest.mark.parametrize("name", ["Mistral", "Phi3"])
def test_a_window_everywhere_is_served_as_full_attention(
    name: str, engines: Engines, tmp_path: Path
) -> None:
    """As SGLang's own backends do: its classes for these models know no windows."""
    folder, ids = save(tmp_path / "model", name), prompt_ids(5, 900)[: COVERED - NEW_TOKENS]
    full = load(folder, sliding_window=None)
    plan = identity_plan(name, shape_of(full.config), (0, 2, 4), "test")
    plan = replace(plan, budget=Budget(0.1, COVERED))
    plan.save(folder / PLAN_NAME)
    with engines(folder, **least(plan)) as engine:
        reply = tokens_and_logprobs(continue_all(engine, [ids], NEW_TOKENS)[0])
    assert_equals(reply, own(full, ids, NEW_TOKENS))
    assert own(load(folder), ids, NEW_TOKENS)[0] != reply[0], "the window says nothing"
