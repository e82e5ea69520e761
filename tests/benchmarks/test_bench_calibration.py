"""The calibration benchmark on a tiny model: prompts of exact length, a plan, its figures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import bench_calibration as bench
from benchmarks.serving_model import make_model
from tests.support.models import LLAMA, make_plan


def test_measures_a_whole_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(LLAMA, make_plan(), tmp_path / "tiny")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    prompts = tmp_path / "prompts.jsonl"
    bench.write_prompts(prompts, 2, 300)
    texts = [json.loads(line)["text"] for line in prompts.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert [len(tokenizer.encode(text)) for text in texts] == [300, 300]

    monkeypatch.setitem(bench.ANCHORS, "tiny", (0, 2))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 0)
    figures = bench.measure(model, "kl", prompts, device_map=None)
    assert set(figures) < set(bench.COLUMNS)
    assert figures["gpus"] == 1
    assert figures["seconds"] > 0
    assert json.loads((model / "kl.json").read_text())["provenance"]["prompts"] == 2
