"""Models whose layers with a window have a KV pool of their own: what Kascade takes of it."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor import pool_configurator
from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator

import kascade_patches
from kascade_sglang import checks
from kascade_sglang.backend import memory
from kascade_sglang.backend.memory import ReservedMemory
from kascade_sglang.errors import KascadeError
from kascade_sglang.host import runtime
from kascade_sglang.host.release import VERIFIED_WITH_SINKS
from tests.support.models import make_plan, parse

HEADS, DIM, WINDOWED, FULL = 4, 16, [0, 2], [1, 3]
A_LAYER = HEADS * 2 * DIM * 2
"""Bytes of a token in one layer, in bfloat16."""
RESERVED = ReservedMemory(per_token=80, scratch=1_000_000)


def make_pool(swa_class: type = MHATokenToKVPool) -> SWAKVPool:
    return SWAKVPool(
        size=64,
        size_swa=32,
        page_size=1,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=DIM,
        swa_attention_layer_ids=WINDOWED,
        full_attention_layer_ids=FULL,
        device="cpu",
        token_to_kv_pool_class=swa_class,
    )


def test_full_layers_are_read_and_written_by_the_slots_of_the_table() -> None:
    pool, layer = make_pool(), SimpleNamespace(layer_id=3, k_scale=None, v_scale=None)
    runtime.require_plain_pool(pool, torch.float32)
    keys, values = runtime.key_value_caches(pool, 3)
    assert keys.shape == values.shape == (pool.size + pool.page_size, HEADS, DIM)
    batch = SimpleNamespace(out_cache_loc=torch.tensor([63, 40]))
    k, v = torch.randn(2, 2, HEADS, DIM).unbind()
    runtime.write_kv(pool, layer, batch, k, v)
    assert torch.equal(keys[[63, 40]], k) and torch.equal(values[[63, 40]], v)
    with runtime.releasable(pool):
        pass


def test_another_pool_of_full_layers() -> None:
    class Other(MHATokenToKVPool):
        pass

    with pytest.raises(KascadeError, match="KV pool: expected SGLang's MHATokenToKVPool, got Oth"):
        runtime.require_plain_pool(make_pool(Other), torch.float32)


@pytest.fixture
def configured(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang sizes pools by, for a server that reserves memory of ours."""
    if version("sglang") not in VERIFIED_WITH_SINKS:
        pytest.skip("models with such pools are refused there")
    args = parse(make_model(make_plan()), "--max-running-requests", "4")
    monkeypatch.setattr(checks, "check", lambda facts: None)
    monkeypatch.setattr(memory, "reserved_memory", lambda facts, config: RESERVED)
    monkeypatch.setattr(kascade_patches, "_ran", set())
    one_rank = SimpleNamespace(attn_tp_size=1, dcp_size=1)
    monkeypatch.setattr(pool_configurator, "get_parallel", lambda: one_rank)
    heads = dict.fromkeys(("get_num_kv_heads", "get_swa_num_kv_heads"), lambda ranks: HEADS)
    dims = dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), DIM)
    layers = {"full_attention_layer_ids": FULL, "swa_attention_layer_ids": WINDOWED}
    no = SimpleNamespace(is_eagle=lambda: False, is_standalone=lambda: False)
    return SimpleNamespace(
        server_args=args,
        kv_cache_dtype=torch.bfloat16,
        kv_cache_dtype_str="auto",
        model_config=SimpleNamespace(**layers, **heads, **dims),
        layer_info=SimpleNamespace(**layers),
        sliding_window_size=7,
        page_size=1,
        spec_algorithm=no,
        is_draft_worker=False,
        ps=SimpleNamespace(attn_dp_size=1),
        attn_dp_size=1,
    )


CAPPED = [
    kind for kind in vars(pool_configurator).values()
    if isinstance(kind, type) and issubclass(kind, HybridSWAPoolConfigurator)
]  # fmt: skip


@pytest.mark.parametrize("kind", CAPPED, ids=lambda kind: kind.__name__)
def test_both_pools_leave_room(kind: type, configured: SimpleNamespace) -> None:
    """All that SGLang and Kascade allocate fits, and another token would not."""
    available = 50_000_000
    with pytest.raises(KascadeError, match="hooks window_pool: expected SGLang to call them"):
        kascade_patches.require_ran("window_pool")
    sizes = kind(configured).calculate_pool_sizes(available, 1)
    kascade_patches.require_ran("window_pool")
    full, windowed = sizes.full_max_total_num_tokens, sizes.swa_max_total_num_tokens
    taken = full * (2 * A_LAYER + RESERVED.per_token) + windowed * 2 * A_LAYER + RESERVED.scratch
    assert available - 2 * 4 * A_LAYER < taken <= available


def test_another_backends_pools_are_left_alone(configured: SimpleNamespace) -> None:
    model = Path(configured.server_args.model_path)
    configured.server_args = parse(model, "--attention-backend", "torch_native")
    sizes = HybridSWAPoolConfigurator(configured).calculate_pool_sizes(50_000_000, 1)
    windowed = int(sizes.full_max_total_num_tokens * 0.8)
    taken = (sizes.full_max_total_num_tokens + windowed) * 2 * A_LAYER
    assert 50_000_000 - 4 * 2 * A_LAYER < taken <= 50_000_000
