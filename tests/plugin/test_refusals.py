"""Bad input meets one clear sentence while arguments are read, before any process starts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.server_args import ServerArgs

import kascade_patches
from kascade_sglang import checks
from kascade_sglang.errors import KascadeError
from kascade_sglang.host import runtime
from kascade_sglang.host.release import require_supported_host
from kascade_sglang.host.server import require_hooks, server_facts
from kascade_sglang.plan import library
from kascade_sglang.plan.library import PLAN_NAME
from kascade_sglang.plan.schema import MAX_BYTES, ModelShape
from tests.support.models import make_plan, parse, resolve

MakeModel = Callable[..., Path]


def refusal(model: Path, *flags: str) -> str:
    """Return the sentence that a command line is refused with."""
    (sentence,) = refusals(model, *flags)
    return sentence


def refusals(model: Path, *flags: str) -> list[str]:
    """Return all that a command line is refused with; the first begins with our name."""
    with pytest.raises(SystemExit) as stop:
        parse(model, *flags)
    said = stop.value.code
    assert isinstance(said, str), "a text makes the exit status 1"
    assert said.startswith("kascade: ")
    return said.split("\n")


def test_good_input_is_accepted(make_model: MakeModel) -> None:
    args = parse(make_model(), "--kascade-topk-ratio", "0.2", "--kascade-heads", "pooled")
    assert args.attention_backend == "kascade"
    assert checks.check(server_facts(args)).budget.ratio == 0.2


def test_engine_arguments_are_checked_too(make_model: MakeModel) -> None:
    with pytest.raises(KascadeError, match="no Kascade plan"):
        model = str(make_model(with_plan=False))
        resolve(ServerArgs(model_path=model, attention_backend="kascade"))


def test_other_backends_need_no_plan(make_model: MakeModel) -> None:
    model = make_model(with_plan=False)
    args = resolve(ServerArgs(model_path=str(model), attention_backend="torch_native"))
    assert args.attention_backend == "torch_native"


def test_missing_plan_says_how_to_calibrate(make_model: MakeModel) -> None:
    sentence = refusal(make_model(with_plan=False))
    assert "kascade calibrate --model" in sentence and "--kascade-plan" in sentence


def test_missing_plan_file(make_model: MakeModel) -> None:
    assert "cannot read the plan" in refusal(make_model(), "--kascade-plan", "/none/plan.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a Kascade plan"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=["corrupt", "foreign", "binary", "nested"],
)
def test_unreadable_plan(make_model: MakeModel, content: str | bytes, expected: str) -> None:
    model = make_model()
    data = content if isinstance(content, bytes) else content.encode()
    (model / PLAN_NAME).write_bytes(data)
    assert expected in refusal(model)


def test_huge_plan(make_model: MakeModel) -> None:
    model = make_model()
    with open(model / PLAN_NAME, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "more than" in refusal(model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, "plan.version: expected 1, got 2"),
        ({"tile": 64}, "plan.tile: expected 32, got 64"),
        ({"anchors": [0, 9]}, "expected layers below 4"),
        ({"anchors": [2, 0]}, "ascending layers from 0"),
        ({"anchors": [1, 2]}, "ascending layers from 0"),
        ({"topk_ratio": 1.5}, "(0, 1]"),
        ({"heads": "some"}, "plan.heads"),
        ({"similarity": {}}, "layer 1 is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_plan(make_model: MakeModel, changes: dict[str, Any], expected: str) -> None:
    model = make_model()
    (model / PLAN_NAME).write_text(json.dumps({**make_plan().to_json(), **changes}))
    assert expected in refusal(model)


def test_plan_of_another_model(make_model: MakeModel) -> None:
    shape = ModelShape(layers=4, q_heads=8, kv_heads=4, head_dim=128, hidden=64)
    sentence = refusal(make_model(plan=make_plan(shape=shape)))
    assert "head_dim is 16, the plan has 128" in sentence


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.01", "nan"])
def test_ratio_outside_its_range(make_model: MakeModel, ratio: str) -> None:
    assert "(0, 1]" in refusal(make_model(), "--kascade-topk-ratio", ratio)


def test_min_k_below_two_tiles(make_model: MakeModel) -> None:
    assert "at least 64" in refusal(make_model(), "--kascade-min-k", "32")


def test_all_reasons_are_said_at_once(make_model: MakeModel) -> None:
    flags = ("--enable-two-batch-overlap", "--enable-lmcache", "--kascade-min-k", "3")
    for line, word in zip(
        refusals(make_model(), *flags), ("two-batch", "lmcache", "min_k"), strict=True
    ):
        assert word in line and "expected" in line


def test_all_settings_that_are_wrong_are_said_at_once(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one source, of several, and with what the server is refused for."""
    flags = ("--kascade-topk-ratio", "7", "--kascade-min-k", "3", "--kascade-dense-backend", "no")
    flags += ("--kascade-prefill-min-k", "4", "--kascade-max-topk-ratio", "9", "--tp-size", "3")
    words = ["--tp-size", "topk_ratio", "min_k", "prefill_min_k", "max_topk_ratio", "dense_backend"]
    said = [line.removeprefix("kascade: ") for line in refusals(make_model(), *flags)]
    assert [line.split(":")[0] for line in said] == words
    # A value of another type is said with all else, and what the settings decide, too.
    said = refusals(make_model(), *flags, "--kascade-score-memory-mb", "much", "--pp-size", "4")
    beginnings = [line.removeprefix("kascade: ").split(": expected")[0] for line in said]
    assert beginnings[:2] == ["--tp-size", "command line: score_memory_mb"]
    assert beginnings[2:-1] == words[1:] and beginnings[-1].startswith("--pp-size: pipeline")
    nothing = refusals(make_model(with_plan=False), "--kascade-min-k", "many")
    assert "min_k" in nothing[0] and "no Kascade plan" in nothing[1]
    monkeypatch.setenv("KASCADE_EXACT", "maybe")
    model = make_model(kascade={"phases": "never"})
    said = refusals(model, "--enable-lmcache", "--tp-size", "3")
    assert [line.split(": expected")[0] for line in said] == [
        "kascade: --enable-lmcache",
        "--tp-size",
        'model config "kascade": phases',
        "environment KASCADE_*: exact",
    ]


def test_other_sglang_release() -> None:
    for release in ("0.5.16", "0.6.0", "0.5.17rc1"):
        with pytest.raises(KascadeError, match=rf"sglang: expected one of .*got {release}; pip"):
            require_supported_host(release)


def test_hook_that_is_not_live() -> None:
    with pytest.raises(KascadeError, match="nothing.there"):
        require_hooks(["nothing.there"])


def test_hook_that_was_registered_and_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kascade_patches, "_ran", {"pool_sizes"})
    with pytest.raises(KascadeError, match="hooks pool_cell_size: expected SGLang to call them"):
        kascade_patches.require_ran("pool_cell_size", "pool_sizes")


@pytest.mark.parametrize("name", ["fa4", "trtllm_mha", "kascade", "none"])
def test_dense_backend_that_needs_other_pages(make_model: MakeModel, name: str) -> None:
    sentence = refusal(make_model(), "--kascade-dense-backend", name)
    assert f"fa3, flashinfer, triton, torch_native, got {name!r}" in sentence


def test_flashinfer_where_bits_must_not_depend_on_the_cache(make_model: MakeModel) -> None:
    facts = server_facts(parse(make_model()))
    config = replace(checks.check(facts), dense_backend="flashinfer")
    model = replace(facts.model, dtype="bfloat16")
    facts = replace(facts, gpu=True, deterministic=True, model=model)
    sentences = checks.reasons(facts, config)
    assert any("expected fa3 or triton with --enable-det" in each for each in sentences)
    sentences = checks.reasons(facts, replace(config, dense_backend="triton"))
    assert sentences and not any("enable-det" in each for each in sentences)


def test_what_only_kernels_refuse(make_model: MakeModel) -> None:
    facts = server_facts(parse(make_model(), "--dtype", "float32"))
    config = checks.check(facts)
    assert not checks.reasons(facts, config)
    decodes = replace(facts, gpu=True, phases=frozenset({"decode"}), prefill_backend="triton")
    sentences = checks.reasons(decodes, config)
    expected = ("--dtype: expected bfloat16", "expected a head_dim of", "--prefill-attention-back")
    for words in expected:
        assert sum(words in each for each in sentences) == 1
    assert len(sentences) == len(expected)


def make_pool(dtype: torch.dtype) -> MHATokenToKVPool:
    return MHATokenToKVPool(
        size=32,
        page_size=16,
        dtype=dtype,
        head_num=2,
        head_dim=32,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )


def test_kv_pool_of_another_kind() -> None:
    with pytest.raises(KascadeError, match="got SimpleNamespace"):
        runtime.require_plain_pool(SimpleNamespace(), torch.bfloat16)


def test_kv_pool_of_another_dtype() -> None:
    """--kv-cache-dtype bf16 of a float16 model, say."""
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        runtime.require_plain_pool(make_pool(dtype), dtype)
    with pytest.raises(KascadeError, match=r"expected torch.float16, got torch.bfloat16; set --kv"):
        runtime.require_plain_pool(make_pool(torch.bfloat16), torch.float16)


def test_a_checkpoint_may_ask_for_fp8_by_itself(make_model: MakeModel) -> None:
    """Under --kv-cache-dtype auto the worker knows, and says so."""
    args = parse(make_model())
    assert server_facts(args).kv_cache_dtype == "auto"
    assert server_facts(args, torch.bfloat16).kv_cache_dtype == "auto"
    facts = replace(server_facts(args, torch.float8_e4m3fn), gpu=True, capability=(8, 0))
    assert facts.kv_cache_dtype == "fp8_e4m3"
    sentences = checks.reasons(facts, checks.check(server_facts(args)))
    assert sum("capability 8.9 at least for fp8_e4m3, got 8.0" in each for each in sentences) == 1


@pytest.mark.parametrize("scales", [(None, None), (1.0, 1.0), (0.5, 1.0)], ids=str)
def test_scales_that_a_dense_backend_does_not_apply(
    scales: tuple[float | None, float | None],
) -> None:
    layer = RadixAttention(4, 16, 0.25, num_kv_heads=2, layer_id=3)
    layer.k_scale_float, layer.v_scale_float = scales
    model = torch.nn.Sequential(layer)
    for name in ("fa3", "triton"):
        runtime.require_scales(model, name)
    for name in ("flashinfer", "torch_native", None):
        if scales[0] == 0.5:
            with pytest.raises(KascadeError, match=r"layer 3: expected no k_scale .*got \(0.5, 1"):
                runtime.require_scales(model, name)
        else:
            runtime.require_scales(model, name)


def test_kv_pool_whose_size_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of keys, and what is reserved for graphs, are sized with the pool."""
    pool = make_pool(torch.bfloat16)
    monkeypatch.setattr(pool, "post_capture_active", True)
    with pytest.raises(KascadeError, match="unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        runtime.require_plain_pool(pool, torch.bfloat16)


def test_kv_pool_of_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(KascadeError, match=r"expected \[48, KV heads, .*SGLANG_USE_HND_KVCACHE"):
        runtime.require_plain_pool(make_pool(torch.bfloat16), torch.bfloat16)


def test_preset_is_announced_at_the_start(
    make_model: MakeModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_warned", set())
    shape = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    folder = make_model(with_plan=False, hidden_size=4096, head_dim=128, **shape)
    model = folder.rename(folder.with_name("Qwen3-8B"))
    config = checks.check(server_facts(parse(model)))
    assert config.plan.anchors == (0, 2, 7, 14, 23)
    # Read from stderr: reading the arguments gives logging SGLang's own handlers.
    assert capfd.readouterr().err.count("identity head map that nobody has measured") == 1
