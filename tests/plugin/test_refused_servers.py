"""Everything that a server's flags, model or plan are refused for, through SGLang's own parser.

One table, a row for each refusal in the code: the tests below count that none is missing.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from sglang.srt.server_args import ServerArgs

from kascade_sglang import checks
from kascade_sglang.host import release, server, speculation
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.host.release import VERIFIED_WITH_HICACHE, VERIFIED_WITH_SINKS
from kascade_sglang.host.server import SUPPORTED_VALUES, SUPPORTED_VALUES_LATER
from tests.support.models import GEMMA_3, POOL_PLAN, SHAPE, WINDOWED_PLAN, make_plan, parse
from tests.support.refused import CHAIN, EAGLE, EAGLE3, FLAGS, HICACHE, NGRAM, TREE, Refused

MakeModel = Callable[..., Path]


MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 2,
}
SINKS = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "add_swa_attention_sink_bias": True,
    "hybrid_layer_pattern": [1, 0, 1, 0],
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def of_gpt_oss(words: str, flags: str = "", **changes: Any) -> Refused:
    """A row of a model that only some releases serve."""
    return Refused(words, flags, model=GPT_OSS, plan=WINDOWED_PLAN, **changes)


ONE_LIST = "makes one list for all heads, which works with --tp-size 1 alone"
OTHERS = (
    Refused("model: multi-head latent attention (MLA) has no KV heads to select for", model=MLA),
    Refused(
        "model: encoder-decoder and cross attention are not supported",
        model={"architectures": ["WhisperForConditionalGeneration"]},
    ),
    Refused(
        "model: encoder-decoder and cross attention are not supported",
        model={"add_cross_attention": True},
    ),
    Refused(
        "model: expected a generative decoder, got an embedding or reward model", "--is-embedding"
    ),
    Refused(
        "model: multimodal models are not supported",
        model={
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "vision_config": {},
        },
    ),
    Refused(
        "model: sliding-window layers with a KV pool of their own are not supported",
        model={"is_hybrid_swa": True},
    ),
    Refused(
        "model: every layer has a sliding window, so none is left to make sparse",
        model={**GEMMA_3, "layer_types": ["sliding_attention"] * 4},
    ),
    Refused("model: attention sinks are not supported, but for gpt-oss", model=SINKS),
    Refused(
        "model: attention sinks are supported on SGLang 0.5.17 alone",
        model=GPT_OSS,
        release="0.5.23",
    ),
    of_gpt_oss("--kascade-dense-backend: expected fa3 or triton, which know attention sinks, got "),
    of_gpt_oss("--disable-hybrid-swa-memory: expected on a CPU, whose layers share one KV pool"),
    of_gpt_oss(
        "--pp-size: expected 1 where layers with a window have a KV pool of their own, got 2",
        "--pp-size 2",
    ),
    of_gpt_oss(
        "selection: expected topk for a model with attention sinks, got random",
        environ={"KASCADE_SELECTION": "random"},
    ),
    Refused(
        "model: every layer caps its logits at 50.0, so none is left to make sparse",
        model={"attn_logit_softcapping": 50.0},
    ),
    Refused("model: expected one head_dim for K and V", model={"v_head_dim": 8}),
    Refused(
        "plan.windowed: expected [], the layers that SGLang serves with a sliding window, got [0, ",
        plan=WINDOWED_PLAN,
    ),
    Refused("plan.windowed: expected [0, 2], the layers that SGLang serves with", model=GEMMA_3),
    Refused(
        "--pp-size: pipeline stages start at layers [3], whose anchor sits on another rank",
        "--pp-size 2",
        model=GEMMA_3,
        plan=WINDOWED_PLAN,
    ),
    Refused(
        "--pp-size: anchors [2] score a pool whose maker sits on another rank",
        "--pp-size 2",
        plan=POOL_PLAN,
    ),
    Refused(
        "--speculative-algorithm: expected one of None, NGRAM, EAGLE, EAGLE3, STANDALONE with the",
        "--speculative-algorithm FROZEN_KV_MTP --speculative-draft-model-path MODEL "
        "--speculative-draft-attention-backend triton " + CHAIN,
    ),
    Refused(
        "--speculative-algorithm: expected NGRAM or STANDALONE or EAGLE, which a GPU has served, "
        "with the kascade backend, got EAGLE3",
        f"{EAGLE3} {CHAIN} --speculative-draft-attention-backend triton",
        speculation="0.5.17",
    ),
    Refused(
        "--speculative-algorithm: expected SGLang 0.5.17 with the kascade backend, got 0.5.23",
        NGRAM,
        speculation="0.5.23",
    ),
    Refused(
        "--speculative-ngram-max-bfs-breadth: expected 1, a chain of drafts, with the kascade "
        "backend, got 10, a tree; add the flag with 1",
        "--speculative-algorithm NGRAM",
    ),
    *(
        Refused(
            "--speculative-eagle-topk: expected 1, a chain of drafts, with the kascade backend, "
            "got 4, a tree; add it with 1",
            f"--speculative-algorithm {name} --speculative-draft-model-path MODEL {TREE}",
        )
        for name in ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
    ),
    Refused(
        "--speculative-draft-attention-backend: expected fa3 or flashinfer or triton with the "
        "kascade backend, got None; add it with fa3: drafts are made densely",
        f"{EAGLE} {CHAIN}",
    ),
    Refused("--speculative-algorithm: expected none without a GPU, got NGRAM", NGRAM),
    Refused(
        "selection: expected topk with speculative decoding, whose drafts the kernels verify, got",
        NGRAM,
        environ={"KASCADE_SELECTION": "random"},
    ),
    Refused(
        "--attention-backend: expected kascade in both phases with speculative decoding, got it "
        "in decode alone",
        f"{NGRAM} --prefill-attention-backend triton",
    ),
    Refused(
        "--speculative-algorithm: expected none for a model with a sliding window in layers [0, 2]",
        NGRAM,
        model=GEMMA_3,
        plan=WINDOWED_PLAN,
    ),
    Refused("--enable-hierarchical-cache: expected a GPU, whose KV pool host memory", HICACHE),
    Refused(
        "--enable-hierarchical-cache: expected no 8-bit copies of keys beside the KV pool",
        HICACHE,
        gpu=True,
    ),
    Refused(
        "--enable-hierarchical-cache: expected no speculative decoding beside it, got NGRAM",
        f"{HICACHE} --kascade-exact {NGRAM}",
        gpu=True,
    ),
    Refused(
        "--enable-hierarchical-cache: expected SGLang 0.5.17 with the kascade backend, got 0.5.23",
        f"{HICACHE} --kascade-exact",
        hicache="0.5.23",
    ),
    Refused(
        "--hicache-storage-backend: expected None with the kascade backend, got 'file'",
        f"{HICACHE} --kascade-exact --hicache-storage-backend file",
        gpu=True,
    ),
    of_gpt_oss(
        "--enable-hierarchical-cache: expected one KV pool for all layers, got one of their own",
        f"{HICACHE} --kascade-exact",
        gpu=True,
    ),
    Refused("--tp-size: expected a divisor of the model's 4 KV heads, got 3", "--tp-size 3"),
    Refused("--tp-size: expected a divisor of the model's 4 KV heads, got 8", "--tp-size 8"),
    Refused(
        "--kascade-heads: expected per_head with --tp-size above 1, got pooled",
        "--kascade-heads pooled --tp-size 2",
    ),
    *(
        Refused(f"selection: {name} {ONE_LIST}", "--tp-size 2", environ={"KASCADE_SELECTION": name})
        for name in ("omnikv", "lessismore")
    ),
    Refused(
        "--pp-size: pipeline stages start at layers [1, 3], whose anchor sits on", "--pp-size 4"
    ),
    Refused(
        "--dtype: expected bfloat16 or float16 on a GPU, got float32", "--dtype float32", gpu=True
    ),
    Refused("model: expected a head_dim of (64, 128, 256), got 16", gpu=True),
    Refused(
        "--kascade-dense-backend: expected fa3 or triton with --enable-deterministic-inference",
        "--kascade-dense-backend flashinfer --enable-deterministic-inference",
        gpu=True,
    ),
    Refused(
        "--kv-cache-dtype: expected fp8_e4m3 with fa3 as the dense backend",
        "--kv-cache-dtype fp8_e5m2 --kascade-dense-backend fa3",
        gpu=True,
    ),
    Refused(
        "--kv-cache-dtype: expected a GPU of compute capability 8.9 at least for fp8_e4m3, got 0.0",
        "--kv-cache-dtype fp8_e4m3",
        gpu=True,
    ),
    Refused(
        "--prefill-attention-backend: expected kascade, which keeps 8-bit copies of keys",
        "--prefill-attention-backend triton",
        gpu=True,
    ),
)


@pytest.mark.parametrize("row", FLAGS + OTHERS, ids=lambda row: row.flag or row.words[:40])
def test_a_refused_server(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    row: Refused,
) -> None:
    if row.model is GPT_OSS:
        found = row.release or version("sglang")
        if row.release is None and found not in VERIFIED_WITH_SINKS:
            pytest.skip("this release does not serve it")
        monkeypatch.setattr(release, "version", lambda name: found)
    if row.speculation:
        monkeypatch.setattr(speculation, "version", lambda name: row.speculation)
    if row.hicache:
        monkeypatch.setattr(server, "version", lambda name: row.hicache)
    monkeypatch.setattr(server, "has_gpu", lambda: row.gpu)
    monkeypatch.setattr(torch.version, "hip", row.hip)
    for name, value in row.environ.items():
        monkeypatch.setenv(name, value)
    model = make_model(make_plan(**row.plan), **row.model)
    with pytest.raises(SystemExit) as stop:
        parse(model, *row.flags.replace("MODEL", str(model)).split())
    if row.flag in SUPPORTED_VALUES_LATER and not hasattr(ServerArgs, row.flag):
        assert "unrecognized arguments: " + row.flags.split()[0] in capfd.readouterr().err
        return
    said = stop.value.code
    assert isinstance(said, str), "a text makes the exit status 1"
    lines = said.removeprefix("kascade: ").split("\n")
    assert (
        said.startswith("kascade: ") and sum(line.startswith(row.words) for line in lines) == 1
    ), said


def test_the_same_server_without_what_is_refused(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no row is refused for what all of them have."""
    assert checks.check(server.server_facts(parse(make_model())))
    assert checks.check(server.server_facts(parse(make_model(), "--tp-size", "2")))
    assert checks.check(server.server_facts(parse(make_model(), "--pp-size", "2")))
    for name in FP8_TYPES:
        facts = server.server_facts(parse(make_model(), "--kv-cache-dtype", name))
        assert checks.check(facts).kv_cache_dtype == name
    windowed = make_model(make_plan(**WINDOWED_PLAN), **GEMMA_3)
    assert checks.check(server.server_facts(parse(windowed))).window_of(2) == 8
    if version("sglang") in VERIFIED_WITH_SINKS:
        gpt_oss = make_model(make_plan(**WINDOWED_PLAN), **GPT_OSS)
        flags = ("--disable-hybrid-swa-memory", "--kascade-dense-backend", "triton")
        facts = server.server_facts(parse(gpt_oss, *flags))
        assert checks.check(facts).window_of(2) == 8 and facts.model.sinks


@pytest.mark.skipif(version("sglang") not in VERIFIED_WITH_HICACHE, reason="refused there")
@pytest.mark.parametrize("keys", ["--kascade-exact", "--kv-cache-dtype fp8_e5m2"])
def test_host_memory_holds_what_a_server_without_copies_needs(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    shape = replace(SHAPE, head_dim=64)
    model = make_model(make_plan(shape=shape), head_dim=64)
    flags = ("--dtype", "bfloat16", "--kascade-dense-backend", "triton", *keys.split())
    facts = server.server_facts(parse(model, HICACHE, *flags))
    assert facts.hicache and checks.check(facts)


def sentences(function: FunctionType) -> Iterator[str]:
    """The text that each sentence of a function begins with; empty where it is made elsewhere."""
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        if isinstance(node, ast.Yield):
            texts = (each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant))
            yield next((text for text in texts if isinstance(text, str)), "")


def test_every_checked_flag_has_a_row() -> None:
    checked = {*SUPPORTED_VALUES, *SUPPORTED_VALUES_LATER, "cuda_graph_backend_prefill", "device"}
    assert {row.flag for row in FLAGS} == checked
    assert len(list(sentences(server.refused_flags))) == 3, "fields of a table, devices, graphs"
    assert speculation.refused_speculation.__name__ in REFUSING


REFUSING = {
    function.__name__: function
    for module in (checks, server, speculation)
    for function in vars(module).values()
    if inspect.isgeneratorfunction(function) and function.__module__ == module.__name__
}
OF_FLAGS = {server.refused_flags.__name__, checks.flag_reasons.__name__}


@pytest.mark.parametrize("name", sorted(set(REFUSING) - OF_FLAGS))
def test_every_sentence_in_the_code_has_a_row(name: str) -> None:
    words = {text for row in OTHERS for text in (row.words, row.words.removeprefix("model: "))}
    for begin in sentences(REFUSING[name]):
        assert begin, "no text to know a sentence by"
        assert any(text.startswith(begin) or begin.startswith(text) for text in words), begin
