"""``sglang.Engine`` in this process: budget of everything gives the tokens of dense attention."""

import json

import pytest
import sglang
import torch

from kascade_sglang.servers.demo_model import MODEL
from tests.support.requests import hf_model, prompt_ids, sampling

pytestmark = pytest.mark.e2e

LENGTHS = (200, 1100, 2100)
NEW_TOKENS = 16


def dense_tokens(ids: list[int]) -> list[int]:
    """Continue one prompt by transformers' own attention."""
    whole = hf_model().generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return whole[0, len(ids) :].tolist()


def test_budget_of_everything_gives_the_dense_tokens() -> None:
    prompts = [prompt_ids(20 + index, length) for index, length in enumerate(LENGTHS)]
    engine = sglang.Engine(
        model_path=str(MODEL),
        attention_backend="kascade",
        json_model_override_args=json.dumps({"kascade": {"topk_ratio": 1.0}}),
        dtype="float32",
        page_size=32,
        max_total_tokens=16384,
        mem_fraction_static=0.5,
        log_level="warning",
    )
    try:
        replies = engine.generate(input_ids=prompts, sampling_params=sampling(NEW_TOKENS))
    finally:
        engine.shutdown()
    assert [reply["output_ids"] for reply in replies] == list(map(dense_tokens, prompts))
