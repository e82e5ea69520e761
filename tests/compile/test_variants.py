"""A server compiles its prefill kernels once: no length and no batch asks for another variant."""

from types import SimpleNamespace

import pytest

# First, because it replaces functions of Triton that kernels might call.
import sglang.srt.utils.common  # noqa: F401
import torch
import triton

from capture import launched_variants
from kascade_kernels.budget import Budget
from kascade_sglang.backend.paths import build_paths
from kascade_sglang.backend.warm_up import warm_up
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import ModelShape, Plan

HEADS, GROUP, DIM, CONTEXT, SLOTS = 2, 4, 64, 70_000, 256
ANCHOR = SimpleNamespace(layer_id=0, scaling=1.0)
REUSE = SimpleNamespace(layer_id=1, scaling=1.0)


class Pool:
    start_layer, layer_num, page_size, size = 0, 2, 1, SLOTS - 1
    keys = torch.zeros(SLOTS, HEADS, DIM, dtype=torch.bfloat16)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    get_value_buffer = get_key_buffer


def make_runner() -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, CONTEXT, dtype=torch.int32)),
        token_to_kv_pool=Pool(),
        model_config=SimpleNamespace(get_num_kv_heads=lambda ranks: HEADS),
        server_args=SimpleNamespace(tp_size=1),
        ps=SimpleNamespace(tp_rank=0),
    )


@pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_warming_up_compiles_all_that_prefill_launches(
    exact: bool, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    shape = ModelShape(2, HEADS * GROUP, HEADS, DIM, 64)
    plan = Plan("test", shape, (0,), {1: ((0.1, 0.9), (0.8, 0.2))})
    config = KascadeConfig(plan, Budget(), heads, exact=exact, score_memory=2**21)
    runner = make_runner()
    paths = build_paths(runner, config)
    batches = [[(0, 5)], [(0, 2000)], [(96, 3000), (7, 9)], [(65_000, 65_001)] * 3, [(31, 9_999)]]
    with launched_variants(90) as compiled:
        warm_up(paths, runner, config)
    with launched_variants(90) as launched:
        for spans in batches:
            tokens = sum(end - begin for begin, end in spans)
            q = torch.zeros(tokens, HEADS * GROUP, DIM, dtype=torch.bfloat16)
            paths.copies.write(0, Pool.keys, torch.zeros(tokens, dtype=torch.int64))
            paths.extend.begin_spans(spans, torch.arange(len(spans)))
            paths.extend.select(q, ANCHOR)
            paths.extend.attend(q, REUSE)
    assert len(launched) >= 9
    assert launched - compiled == set()
