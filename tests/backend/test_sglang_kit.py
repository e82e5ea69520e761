"""SGLang's own attention cases, with a budget that covers everything.

``tests/plugin/test_sglang_kit_parts.py`` names the parts of the kit that do not apply.
"""

import unittest
from typing import Any

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.backend.backend import KascadeAttnBackend
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import ModelShape, Plan

if not torch.cuda.is_available():
    pytest.skip("SGLang's kit needs a GPU", allow_module_level=True)

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    make_dense_cases,
    run_dense_attention_case,
)
from sglang.test.kits.attention_unittest.runner_modes.cuda_graph_decode_runner import (
    run_dense_cuda_graph_decode_case,
)
from sglang.test.kits.attention_unittest.runner_modes.split_op_runner import (
    run_dense_split_op_extend_case,
)

HEAD_DIM = 64
CASES = make_dense_cases("kascade")
DECODE_CASES = [case for case in CASES if case.forward_mode.is_decode()]
EXTEND_CASES = [case for case in CASES if case.forward_mode.is_extend()]


@pytest.fixture(autouse=True)
def backend_of_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the backend for whatever heads a case has."""

    def build(runner: Any) -> KascadeAttnBackend:
        model = runner.model_config
        model.dtype = runner.dtype  # as SGLang's own has; the kit's does not
        shape = ModelShape(
            1, model.num_attention_heads, model.num_key_value_heads, HEAD_DIM, model.hidden_size
        )
        plan = Plan("case", shape, (0,), {})
        return KascadeAttnBackend(
            runner, KascadeConfig(plan, Budget(1.0, 64), "per_head", dense_backend="triton")
        )

    monkeypatch.setitem(ATTENTION_BACKENDS, "kascade", build)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eager(case: Any) -> None:
    run_dense_attention_case(unittest.TestCase(), case, head_dim=HEAD_DIM)  # asserts closeness


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_captured_decode(case: Any) -> None:
    run_dense_cuda_graph_decode_case(unittest.TestCase(), case, head_dim=HEAD_DIM)


@pytest.mark.parametrize("case", EXTEND_CASES, ids=lambda case: case.name)
def test_prefill_between_captured_pieces(case: Any) -> None:
    run_dense_split_op_extend_case(unittest.TestCase(), case, head_dim=HEAD_DIM, breakable=True)
