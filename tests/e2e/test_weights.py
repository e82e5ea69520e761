"""A model whose weights are experts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.calibration.hf_attention import kascade_generate
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.plan.presets import identity_plan
from tests.e2e.test_windows import load, save, serve
from tests.support.requests import assert_equals, generate, prompt_ids, tokens_and_logprobs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compares with float32 on a CPU"),
]

EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def test_a_mixture_of_experts_equals_the_reference(tmp_path: Path) -> None:
    """Qwen3-MoE, the family of Qwen3-30B-A3B."""
    folder = save(tmp_path / "model", "Qwen3Moe", sliding_window=None, **EXPERTS)
    model = load(folder)
    plan = replace(
        identity_plan("test", shape_of(model.config), (0, 3), "test"), budget=Budget(0.1, 128)
    )
    with serve(folder, plan, tmp_path / "log") as server:
        for tokens in (300, 1100):
            ids = prompt_ids(31, tokens)
            reply = tokens_and_logprobs(generate(server, ids, 12))
            assert_equals(reply, kascade_generate(model, plan, ids, 12))
