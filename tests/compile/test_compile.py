"""Every kernel compiles for GPUs that are not there: Ampere, Hopper and Blackwell."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

# First, because it replaces functions of Triton that kernels might call.
import sglang.srt.utils.common  # noqa: F401
import torch
import triton

from kascade_kernels import tuning
from kascade_kernels.arena import empty_on
from kascade_kernels.budget import Budget
from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from kascade_kernels.copy_row_slots import allocate_row_slots, copy_row_slots
from kascade_kernels.decode_attention import decode_attention
from kascade_kernels.decode_scores import ScoreScratch
from kascade_kernels.merge_parts import Parts
from kascade_kernels.select_slots import count_high, select_slots
from kascade_kernels.structs import Rows
from kascade_kernels.tile_attention import tile_attention
from kascade_kernels.tile_lse import tile_lse
from kascade_kernels.tile_scores import tile_scores
from tests.support.capture import compiled_launches
from tests.support.decode_case import DecodeCase, PoolCase

CONTEXT = 131072
HEADS = 2
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHAPES = [(torch.bfloat16, 128, 4), (torch.float16, 64, 7), (torch.bfloat16, 256, 2)]


def made(
    dtype: torch.dtype, dim: int, group: int, stored: torch.dtype | None, sinks: bool
) -> DecodeCase:
    """Two requests; sinks are bfloat16, as SGLang's gpt-oss has them."""
    case = DecodeCase.make([65, 9], HEADS, group, dim, dtype=dtype, stored=stored)
    return replace(case, sinks=torch.zeros(HEADS * group).bfloat16() if sinks else None)


def launch_decode(
    dtype: torch.dtype,
    dim: int,
    group: int,
    stored: torch.dtype | None = None,
    *,
    sinks: bool = False,
) -> None:
    """Launch what a decode step launches, all ways of scoring."""
    case, budget, v_scale = made(dtype, dim, group, stored, sinks), Budget(), stored and 0.5
    q_heads, spans = HEADS * group, case.spans(budget)
    lists = case.lists(case.counts(HEADS, budget), append_own=True)
    parts = Parts.allocate(spans, q_heads, dim)
    scratch = ScoreScratch.allocate(2, q_heads, HEADS, CONTEXT, empty_on("cpu"))
    copy = allocate_key_copy(len(case.k), HEADS, dim, "cpu")
    if stored is None:
        copy_keys(case.k, torch.arange(2), copy)
    copy_row_slots(case.req_to_token, case.rows, allocate_row_slots(2, CONTEXT, "cpu"))
    pool = PoolCase.make(case, 1, HEADS)
    for keys in (case.k, copy):
        case.score(keys, spans, lists, scratch, parts, pool=pool)
    select_slots(
        scratch.codes, case.req_to_token, pool.rows, lists, append_own=True, pool=pool.keys
    )
    for keys, values in ((case.k, None), (copy, None), (case.k, case.v)):
        case.score(keys, spans, lists, scratch, parts, values, v_scale=v_scale)
    select_slots(scratch.codes, case.req_to_token, case.rows, lists, append_own=True)
    head_map = torch.zeros(HEADS, dtype=torch.int32)
    where = (lists, spans, head_map, case.scale, parts)
    decode_attention(case.q, case.k, case.v, *where, v_scale=v_scale, sinks=case.sinks)


def launch_prefill(
    dtype: torch.dtype,
    dim: int,
    group: int,
    stored: torch.dtype | None = None,
    *,
    sinks: bool = False,
) -> None:
    """Launch what a prefill step launches, all ways of scoring, per head and pooled."""
    case, budget, v_scale = made(dtype, dim, group, stored, sinks), Budget(), stored and 0.5
    one = torch.ones(2, dtype=torch.int32)
    ends = case.rows.ends.to(torch.int32)
    rows = Rows(case.rows.requests, ends, one, one)
    table, scale = case.req_to_token, case.scale
    copy = allocate_key_copy(len(case.k), HEADS, dim, "cpu")
    scratch = ScoreScratch.allocate(2, HEADS * group, HEADS, CONTEXT, empty_on("cpu")).codes
    lists, one = (case.lists(case.counts(n, budget), append_own=False) for n in (HEADS, 1))
    more = {"sinks": case.sinks}
    lse = tile_lse(case.q, case.k, table, rows, lists, scale, max_end=CONTEXT, **more)
    for keys in (case.k, copy):
        tile_scores(case.q, keys, table, rows, lists, lse, scale, out=scratch.codes)
        pooled = scratch.codes[:, :1]
        tile_scores(case.q, keys, table, rows, one, lse, scale, pooled=True, out=pooled)
    count_high(scratch, rows, lists)
    select_slots(scratch, table, rows, lists, append_own=False)
    head_map = torch.zeros(HEADS, dtype=torch.int32)
    where = (table, rows, lists, head_map, scale)
    tile_attention(case.q, case.k, case.v, *where, v_scale=v_scale, **more)


def launch_as_on(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose launch parameters as on a GPU of this capability."""
    monkeypatch.setattr(tuning, "capability_of", lambda device: capability // 10)


ON_GPUS = [(90, *shape) for shape in SHAPES] + [(80, *SHAPES[0]), (80, *SHAPES[2])]
ON_GPUS += [(100, *SHAPES[0])]
"""Every shape where most is served; on Ampere also the one that needs most shared memory."""


@pytest.mark.parametrize("launch", [launch_decode, launch_prefill], ids=["decode", "prefill"])
@pytest.mark.parametrize(("capability", "dtype", "dim", "group"), ON_GPUS, ids=str)
def test_compiles(
    capability: int,
    launch: Callable[..., None],
    dtype: torch.dtype,
    dim: int,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch_as_on(capability, monkeypatch)
    with compiled_launches(capability) as compiled:
        launch(dtype, dim, group)
    assert len(compiled) >= 9
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], kernel.metadata.name


@pytest.mark.parametrize(
    ("capability", "stored", "shapes"),
    [
        (80, torch.float8_e5m2, SHAPES),
        (90, torch.float8_e4m3fn, SHAPES),
        (90, torch.float8_e5m2, SHAPES[:1]),  # It differs in how values are converted alone.
    ],
    ids=["80-e5m2", "90-e4m3", "90-e5m2"],
)
@pytest.mark.parametrize("launch", [launch_decode, launch_prefill], ids=["decode", "prefill"])
def test_compiles_with_keys_in_fp8(
    launch: Callable[..., None],
    capability: int,
    stored: torch.dtype,
    shapes: list[tuple[torch.dtype, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch_as_on(capability, monkeypatch)
    with compiled_launches(capability) as compiled:
        for dtype, dim, group in shapes:
            launch(dtype, dim, group, stored)
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], kernel.metadata.name
        # To bfloat16 one value at a time.
        assert "cvt.bf16.f16" not in kernel.asm["ptx"], kernel.metadata.name


@pytest.mark.parametrize(("dtype", "dim", "group"), SHAPES, ids=str)
def test_hopper_spills_little(
    dtype: torch.dtype, dim: int, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention of tiles fills all registers: a little more code is much slower there."""
    launch_as_on(90, monkeypatch)
    with compiled_launches(90) as compiled:
        launch_prefill(dtype, dim, group)
    [kernel] = [one for one in compiled if one.metadata.name == "tile_attention_kernel"]
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", tmp_path / "out"]
    said = subprocess.run([*ptxas, source], capture_output=True, text=True, check=True).stderr
    [spilled] = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 128


@pytest.mark.parametrize("launch", [launch_decode, launch_prefill], ids=["decode", "prefill"])
def test_compiles_with_sinks(launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the heads of gpt-oss: 8 of 64 dimensions share a KV head."""
    launch_as_on(90, monkeypatch)
    with compiled_launches(90) as compiled:
        launch(torch.bfloat16, 64, 8, sinks=True)
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY[90], kernel.metadata.name


def test_hopper_pipelines_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of gathered keys overlap with products, and prefill uses Hopper's wide products."""
    launch_as_on(90, monkeypatch)
    with compiled_launches(90) as compiled:
        launch_decode(torch.bfloat16, 128, 4)
        launch_prefill(torch.bfloat16, 128, 4)
    text = {kernel.metadata.name: kernel.asm["ptx"] for kernel in compiled}
    layouts = {kernel.metadata.name: kernel.asm["ttgir"] for kernel in compiled}
    # Tensors that are flattened in any order may each get another one: values and their mask.
    assert all(text.count("allow_reorder") <= 1 for text in layouts.values())
    for name in ("decode_scores_kernel", "decode_attention_kernel", "tile_attention_kernel"):
        assert "cp.async" in text[name]
    for name in ("tile_attention_kernel", "tile_scores_kernel"):
        assert "wgmma" in text[name]
