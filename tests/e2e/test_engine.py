"""``sglang.Engine`` in this process: budget of everything gives the dense backend's tokens."""

import json
from typing import Any

import pytest
import sglang

from kascade_sglang.servers.demo_model import MODEL
from tests.support.requests import prompt_ids, sampling

pytestmark = pytest.mark.e2e

LENGTHS = (200, 1100, 2100)


def tokens(backend: str, **options: Any) -> list[list[int]]:
    engine = sglang.Engine(
        model_path=str(MODEL),
        attention_backend=backend,
        dtype="float32",
        page_size=32,
        max_total_tokens=16384,
        mem_fraction_static=0.5,
        log_level="warning",
        **options,
    )
    try:
        prompts = [prompt_ids(20 + index, length) for index, length in enumerate(LENGTHS)]
        replies = engine.generate(input_ids=prompts, sampling_params=sampling(16))
        return [reply["output_ids"] for reply in replies]
    finally:
        engine.shutdown()


def test_budget_of_everything_gives_the_dense_tokens() -> None:
    everything = json.dumps({"kascade": {"topk_ratio": 1.0}})
    assert tokens("kascade", json_model_override_args=everything) == tokens("torch_native")
