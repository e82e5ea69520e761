"""Gemma 2 end to end: only its full-attention layers enter the plan, and what then refuses it."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from kascade_sglang.cli import main
from kascade_sglang.plan.schema import LayerRole, load_plan


@pytest.fixture(scope="module")
def gemma(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.4,
        max_position_embeddings=512, sliding_window=40, query_pre_attn_scalar=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    words = torch.randint(0, 60, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    path = tmp_path / "dev.txt"
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


def calibrate(gemma: Path, prompts: Path, out: Path, anchors: str) -> int:
    return main(
        ["calibrate", "--model", str(gemma), "--prompts", str(prompts), "--out", str(out),
         "--anchors", anchors, "--min-k", "64", "--device", "cpu"]
    )  # fmt: skip


@pytest.mark.parametrize("anchors", ["2", "1,5"])
def test_only_full_layers_have_a_part(
    gemma: Path, prompts: Path, tmp_path: Path, anchors: str
) -> None:
    out = tmp_path / "plan.json"
    assert calibrate(gemma, prompts, out, anchors) == 0
    plan = load_plan(out)
    assert plan.windowed == (0, 2, 4) and plan.full_layers == [1, 3, 5]
    assert plan.anchors[0] == 1 and set(plan.anchors) <= {1, 3, 5}
    assert len(plan.reuse_layers) == 1 and list(plan.similarity) == plan.reuse_layers
    assert [plan.role(layer) for layer in (0, 1)] == [LayerRole.WINDOW, LayerRole.DENSE]
    assert plan.provenance["importance"][::2] == [None] * 3
    assert main(["plan", "show", str(out)]) == 0
    assert main(["plan", "report", str(out), "--out", str(tmp_path / "page.png")]) == 0


@pytest.mark.parametrize(
    "anchors, sentence",
    [
        ("0,3", "--anchors: expected ascending layers from 1 to at most 5, got 0,3"),
        ("1,4", "--anchors: expected layers with full attention, of 1,3,5, got 1,4"),
        ("4", "--anchors: expected 1 to 3, its layers with full attention, got 4"),
    ],
)
def test_refuses_windowed_anchors(
    gemma: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    anchors: str,
    sentence: str,
) -> None:
    assert calibrate(gemma, prompts, tmp_path / "plan.json", anchors) == 1
    assert sentence in capsys.readouterr().err
