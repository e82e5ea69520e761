"""Code that comes with a model runs where the user says so, and nowhere else."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from kascade_sglang import cli
from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.servers.demo_model import MODEL

CODE = """
from pathlib import Path
from transformers import LlamaConfig, PreTrainedTokenizerFast
Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
HELP = "--trust-remote-code runs that, if you trust it"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose configuration and tokenizer are code that leaves a file behind."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name, change in (
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
            },
        ),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize("command", ["check", "calibrate"])
def test_commands_run_no_code_of_a_model(
    command: str, model: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(model / "kascade_plan.json")
    out = str(model.parent / "plan.json")
    given = {
        "check": ["plan", "check", plan, "--model", str(model)],
        "calibrate": ["calibrate", "--model", str(model), "--out", out],
    }[command]
    assert cli.main(given) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"kascade: model {model}: cannot read its configuration (")
    assert HELP in said
    assert not marker.exists()


def test_commands_run_it_where_they_are_told_to(model: Path, marker: Path) -> None:
    plan = str(model / "kascade_plan.json")
    assert cli.main(["plan", "check", plan, "--model", str(model), "--trust-remote-code"]) == 0
    assert marker.exists()


def test_tokenizers_of_an_evaluation(model: Path, marker: Path) -> None:
    with pytest.raises(EvaluationError, match=HELP):
        Tokens.load(str(model))
    assert not marker.exists()
    assert Tokens.load(str(model), trust_remote_code=True).count("one two") > 0
    assert marker.exists()


def test_the_cause_is_in_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EvaluationError) as refused:
        Tokens.load(str(tmp_path))
    assert type(refused.value.__cause__.__cause__) is not EvaluationError
    said = str(refused.value.__cause__)
    assert len(said) > 10 and f"cannot be loaded ({said})" in str(refused.value)
