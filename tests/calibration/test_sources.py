"""Prompts from data sets and from the package, and what is said without the optional packages."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kascade_sglang.calibration import hf_model
from kascade_sglang.calibration.sources import BUNDLED, DEFAULT_LIMIT, PromptSource
from kascade_sglang.errors import CalibrationError
from kascade_sglang.servers.demo_model import MODEL


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A data set as a folder, which ``load_dataset`` takes like a name on the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"w{index}", "body": f"w{index} w9"} for index in range(40)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_rows_are_drawn_with_the_seed(tokenizer: PreTrainedTokenizerFast, dataset: str) -> None:
    one = PromptSource(dataset=dataset).read(tokenizer, 8)
    assert len(one.prompts) == DEFAULT_LIMIT and one.name == "set:train"
    assert one == PromptSource(dataset=dataset).read(tokenizer, 8)
    assert one.digest != PromptSource(dataset=dataset, seed=1).read(tokenizer, 8).digest
    whole = PromptSource(dataset=dataset, limit=99).read(tokenizer, 8).prompts
    assert [prompt.ids for prompt in whole] == [[0, index + 4] for index in range(40)]


def test_a_column_by_name(tokenizer: PreTrainedTokenizerFast, dataset: str) -> None:
    found = PromptSource(dataset=dataset, field="body", limit=40).read(tokenizer, 8)
    assert found.prompts[3].ids == [0, 7, 13]


def test_chats_are_made_to_length() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = PromptSource(max_tokens=2048, limit=3).read(tokenizer, 8192)
    assert found.name == BUNDLED and len(found.prompts) == 3
    assert all(1500 < len(prompt.ids) <= 2048 and prompt.replies for prompt in found.prompts)
    assert found == PromptSource(max_tokens=2048, limit=3).read(tokenizer, 8192)
    assert found != PromptSource(max_tokens=2048, limit=3, seed=1).read(tokenizer, 8192)
    assert max(len(prompt.ids) for prompt in PromptSource().read(tokenizer, 1024).prompts) <= 1024


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"split": "dev"}, "cannot load its 'dev' split"),
        ({"field": "story"}, "--field story: data set .* has the columns text, body"),
        ({"limit": 0}, "--limit: expected 1 or more"),
        ({"dataset": ""}, "--dataset: expected a name, got none"),
        ({"max_tokens": 9}, "--max-tokens 9: more than the model's context of 2"),
        ({"field": "body", "limit": 40}, "row 0: a prompt of 3 tokens, more than .* of 2"),
    ],
    ids=["split", "field", "limit", "no-name", "max-tokens", "context"],
)
def test_refusals(
    tokenizer: PreTrainedTokenizerFast, dataset: str, options: dict, sentence: str
) -> None:
    with pytest.raises(CalibrationError, match=sentence):
        PromptSource(**{"dataset": dataset, **options}).read(tokenizer, 2)


def test_an_unknown_data_set(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot load its 'train' split"):
        PromptSource(dataset=str(tmp_path / "none")).read(tokenizer, 8)


def test_without_the_optional_packages(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="--dataset x: needs the datasets package; pip"):
        PromptSource(dataset="x").read(tokenizer, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match="--device-map auto: needs the accelerate package"):
        hf_model.check_device_map("auto")
