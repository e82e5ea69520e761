"""SGLang's own attention cases, with a budget that covers everything.

``tests/plugin/test_sglang_kit_parts.py`` names the parts of the kit that do not apply.
"""

import unittest
from typing import Any
from unittest import mock

import pytest
import torch

from kascade_kernels.budget import Budget
from kascade_sglang.backend.backend import KascadeAttnBackend
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import ModelShape, Plan

if not torch.cuda.is_available():
    pytest.skip("SGLang's kit needs a GPU", allow_module_level=True)

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods.dense_attention import (
    DenseAttentionCase,
    make_dense_cases,
    run_dense_attention_case,
)
from sglang.test.kits.attention_unittest.runner_modes.cuda_graph_decode_runner import (
    run_dense_cuda_graph_decode_case,
)
from sglang.test.kits.attention_unittest.runner_modes.speculative_target_verify_runner import (
    run_dense_spec_verify_case,
    run_dense_spec_verify_cuda_graph_case,
)
from sglang.test.kits.attention_unittest.runner_modes.split_op_runner import (
    run_dense_split_op_extend_case,
)

HEAD_DIM = 64
CASES = make_dense_cases("kascade")
DECODE_CASES = [case for case in CASES if case.forward_mode.is_decode()]
EXTEND_CASES = [case for case in CASES if case.forward_mode.is_extend()]
CHAIN = 4
CHAINS = [
    DenseAttentionCase(
        f"chain_page_size_{page_size}",
        "kascade",
        ForwardMode.TARGET_VERIFY,
        num_heads=8,
        num_kv_heads=2,
        page_size=page_size,
        prefix_lens=(40, 7, 30),
        extend_lens=(CHAIN,) * 3,
    )
    for page_size in (1, 32)
]


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
        config = KascadeConfig(plan, Budget(1.0, 64), "per_head", dense_backend="triton")
        # The kit's runners name no algorithm, and SGLang's settings may be read-only by now.
        name = "EAGLE" if runner.server_args.speculative_num_draft_tokens == CHAIN else None
        with mock.patch.dict(vars(runner.server_args), speculative_algorithm=name):
            return KascadeAttnBackend(runner, config)

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


@pytest.mark.parametrize("kind", ["eagle", "ngram"])
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_chains(case: Any, kind: str) -> None:
    which = {"topk": 1, "spec_kind": kind, "head_dim": HEAD_DIM}
    run_dense_spec_verify_case(unittest.TestCase(), case, **which)
    if case.page_size > 1:
        # It writes keys again in the order of positions, and the table still names shuffled pages.
        run_dense_spec_verify_cuda_graph_case(unittest.TestCase(), case, **which)
