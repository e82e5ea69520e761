"""A server compiles kernels before it serves: no length and no batch asks for another variant."""

import numpy as np
import pytest

# First, because it replaces functions of Triton that kernels might call.
import sglang.srt.utils.common  # noqa: F401
import torch
import triton
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from kascade_kernels.budget import Budget
from kascade_sglang.backend.paths import build_paths
from kascade_sglang.backend.warm_up import warm_up, warm_up_decode
from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.host.steps import Batch, Layer, Rank
from kascade_sglang.plan.schema import ModelShape, Plan
from tests.support.capture import launched_variants

HEADS, GROUP, DIM, CONTEXT, SLOTS = 2, 4, 64, 70_000, 256


class Pool:
    memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)

    def __init__(self, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(SLOTS, HEADS, DIM).to(dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    get_value_buffer = get_key_buffer


@pytest.mark.parametrize(
    ("exact", "kv_cache_dtype", "sinks"),
    [
        (False, "auto", None),
        (True, "auto", None),
        (False, "fp8_e4m3", None),
        (False, "auto", torch.zeros(HEADS * GROUP, dtype=torch.bfloat16)),
    ],
    ids=["default", "exact", "fp8", "sinks"],
)
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_warming_up_compiles_all_that_prefill_launches(
    exact: bool,
    kv_cache_dtype: str,
    sinks: torch.Tensor | None,
    heads: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    shape = ModelShape(2, HEADS * GROUP, HEADS, DIM, 64)
    plan = Plan("test", shape, (0,), {1: ((0.1, 0.9), (0.8, 0.2))})
    options = {"exact": exact, "kv_cache_dtype": kv_cache_dtype, "score_memory": 2**21}
    config = KascadeConfig(plan, Budget(), heads, **options)
    pool = Pool(FP8_TYPES.get(kv_cache_dtype, torch.bfloat16))
    v_scale = 1.0 if config.fp8 else None
    anchor, reuse = (Layer(index, 1.0, v_scale, sinks) for index in range(2))
    table = torch.zeros(8, CONTEXT, dtype=torch.int32)
    rank = Rank(range(HEADS), range(2), table, slots=SLOTS, device="cpu")
    paths = build_paths(rank, pool, config)
    batches = [[(0, 5)], [(0, 2000)], [(96, 3000), (7, 9)], [(65_000, 65_001)] * 3, [(31, 9_999)]]
    with launched_variants(90) as compiled:
        warm_up(paths, anchor, torch.bfloat16)
    with launched_variants(90) as launched:
        for spans in batches:
            tokens = sum(end - begin for begin, end in spans)
            q = torch.zeros(tokens, HEADS * GROUP, DIM, dtype=torch.bfloat16)
            begins, ends = np.array(spans).T
            requests = torch.arange(len(spans))
            written = torch.zeros(tokens, dtype=torch.int64)
            batch = Batch(False, requests, torch.from_numpy(ends), written, ends, begins.tolist())
            paths.kv.copy(0, batch.written)
            step = paths.extend.record(batch)
            selected = paths.extend.select(step, q, anchor)
            paths.extend.attend(step, q, reuse, selected, torch.zeros(HEADS, dtype=torch.int32))
    assert len(launched) >= (8 if config.fp8 else 9)
    assert launched - compiled == set()


# Half of all combinations, in which any three choices meet in all ways.
@pytest.mark.parametrize("makers", [(), (2,)], ids=["whole", "pools"])
@pytest.mark.parametrize("score_memory", [2**24, 2**27], ids=["in_groups", "together"])
@pytest.mark.parametrize("invariant", [False, True], ids=["any", "invariant"])
def test_warming_up_compiles_all_that_eager_decoding_launches(
    invariant: bool,
    score_memory: int,
    makers: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Batches above the largest graph once waited 2.5 s for a compiler in the middle of serving."""
    exact = (invariant + (score_memory == 2**24) + bool(makers)) % 2 == 1
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    shape, rows = ModelShape(4, HEADS * GROUP, HEADS, DIM, 64), ((0.1, 0.9), (0.8, 0.2))
    anchors, similarity = (0, 2, 3), dict.fromkeys((1, 3), rows)
    if makers:
        plan = Plan("test", shape, anchors, similarity, makers=makers, pool_share=0.25)
    else:
        plan = Plan("test", shape, anchors, {1: rows})
    config = KascadeConfig(
        plan,
        Budget(),
        "per_head",
        exact=exact,
        score_memory=score_memory,
        batch_invariant=invariant,
    )
    captured, eager = 5, 150
    table = torch.zeros(eager + 1, 4096, dtype=torch.int32)
    rank = Rank(range(HEADS), range(4), table, slots=SLOTS, device="cpu")
    paths = build_paths(rank, Pool(torch.bfloat16), config)
    layers = [Layer(anchor, 1.0) for anchor in plan.anchors]
    paths.decode.reserve(captured)
    with launched_variants(90) as compiled:
        warm_up_decode(paths, layers, captured, eager, torch.bfloat16)
    with launched_variants(90) as launched:
        # What is compiled changes at powers of two, and with what divides a number of rows.
        for count in (*range(captured + 1, 70), *range(126, 132), 144, eager):
            requests = torch.arange(count)
            batch = Batch(True, requests, 100 + requests, torch.zeros(count, dtype=torch.int64))
            q = torch.zeros(count, HEADS * GROUP, DIM, dtype=torch.bfloat16)
            paths.kv.copy(0, batch.written)
            paths.decode.prepare(batch)
            step = paths.decode.record(batch)
            for layer in layers:
                out = None if layer.index else torch.empty_like(q)
                selected = paths.decode.select(step, q, layer, out, paths.store)
                paths.store.put(layer.index, selected)
                kept = paths.store.get(layer.index + (layer.index == 0))
                paths.decode.attend(step, q, layer, *kept)
    assert len(launched) >= 12 + 7 * len(makers)
    assert launched - compiled == set()
