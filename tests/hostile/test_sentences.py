"""What is said of wrong names and options tells the reader what was expected, and what to do."""

import importlib
import sys
from pathlib import Path

import pytest

from kascade_sglang.servers import process
from kascade_sglang.servers.process import Server, run_command
from tests.hostile.conftest import Refused

CALIBRATE = ("calibrate", "--out", "plan.json", "--model")
EVAL = ("eval", "--tasks", "vt", "--out", "results.csv", "--url")
NEITHER = "expected a Hugging Face id or a folder that exists, got neither; mend the name"
SAID = {
    (*CALIBRATE, "/nowhere/model"): NEITHER,
    (*CALIBRATE, "a/b/c"): NEITHER,
    (*CALIBRATE, "."): "expected a folder with config.json, got one without; name the model's own",
    (*CALIBRATE, "M", "--anchors", "x"): "expected layers with commas between them, such as 0,2,8",
    (*CALIBRATE, "M", "--anchors", "1,x"): "got '1,x'",
    (*CALIBRATE, "M", "--banana", "1"): "unrecognized arguments: --banana 1",
    ("calibrate", "--model", "M", "--out", "/proc/plan.json"): "a folder that can be written",
    (*EVAL, "127.0.0.1:30000"): "begins with http:// or https://, got 127.0.0.1:30000; write it",
    ("doctor", "--page-size", "32"): "arguments: --page-size; flags of the server go after --",
}


@pytest.mark.parametrize("command", SAID, ids=" ".join)
def test_kascade(command: tuple[str, ...], refused: Refused) -> None:
    assert SAID[command] in refused(*command)


def test_a_name_that_may_be_on_the_hub(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from kascade_sglang.calibration import hf_model

    def absent(*_: object, **__: object) -> None:
        raise OSError("nobody has\nsuch a model")

    monkeypatch.setattr(hf_model.AutoConfig, "from_pretrained", absent)
    said = refused(*CALIBRATE, "owner/model")
    assert "(no such folder here, and as a Hugging Face id: nobody has such a model)" in said


MAKE = {
    ("demo", "--page", "page.png"): "--page page.png: expected a name that ends in .html",
    ("demo", "--record", "missing"): "--record missing: expected a folder that exists, got missing",
    ("evaluation", "--samples", "0"): "--samples: expected 1 or more, got 0",
    ("evaluation", "--parallel", "-1"): "--parallel: expected 1 or more, got -1",
    ("evaluation", "--lengths", "-5"): "--lengths: expected at least 256 tokens, got -5",
    ("evaluation", "--ratios", "2"): "--ratios: expected numbers above 0, at most 1, got 2.0",
    ("evaluation", "--ratios", "nan"): "--ratios: expected numbers above 0, at most 1, got nan",
    ("evaluation", "--out", "missing/x.csv"): "--out missing/x.csv: expected a folder that exists",
    ("evaluation", "--out", "x.png"): "--out x.png: expected a file of its own",
}


@pytest.mark.parametrize("command", MAKE, ids=" ".join)
def test_commands_that_start_servers(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`make demo` and `make eval` refuse before a server is started."""

    def start(self: Server) -> None:
        raise AssertionError("a server was started")

    name, *arguments = command
    module = importlib.import_module(f"kascade_sglang.{name}.__main__")
    monkeypatch.setattr(process.Server, "__enter__", start)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert run_command(module.main) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said.startswith("kascade: ") and MAKE[command] in said
