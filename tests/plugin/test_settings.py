"""What follows from the declaration of a setting: flag, variable, sentence, warning and log."""

import argparse
import ast
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import prepare_server_args

from kascade_sglang import checks, settings
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.server import server_facts
from kascade_sglang.plan import library
from kascade_sglang.settings import FLAGS_VARIABLE, SETTINGS, read_settings
from tests.support.models import make_plan, parse, resolve

ROOT = Path(__file__).resolve().parents[2]
MakeModel = Callable[..., Path]
GOOD = {
    "plan": "plan.json",
    "preset": "careful",
    "topk_ratio": "0.25",
    "min_k": "256",
    "prefill_topk_ratio": "0.5",
    "max_topk_ratio": "0.5",
    "prefill_min_k": "512",
    "heads": "pooled",
    "dense_backend": "triton",
    "exact": "1",
    "phases": "decode",
    "score_memory_mb": "100",
    "selection": "window",
    "tile": "16",
}
"""Of every setting a value that is not its default, as text."""
BAD = {
    "preset": "expected one of 'fast', 'balanced', 'careful', got '?'",
    "topk_ratio": "expected a number in (0, 1], got '?'; 0.1 attends to a tenth",
    "min_k": "expected a whole number, got '?'; give a count of keys, like 128",
    "prefill_topk_ratio": "expected a number in (0, 1], got '?'; 0.1 attends to a tenth",
    "max_topk_ratio": "expected a number in (0, 1], got '?'; 0.1 attends to a tenth",
    "prefill_min_k": "expected a whole number, got '?'; give a count of keys, like 128",
    "heads": "expected one of 'per_head', 'pooled', got '?'",
    "exact": "expected 1 or 0, got '?'",
    "phases": "expected one of 'both', 'decode', got '?'",
    "score_memory_mb": "expected at least 1, got '?'; default 768",
    "tile": "expected a whole number of at least 1, got '?'; kernels know 32 alone",
}
"""The sentence for a value that is none; any text is a plan's or a backend's name."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    settings.add_flags(made)
    return made


def of_flags(*words: str) -> settings.Settings:
    """Read a command line as servers do, in the processes that they start."""
    settings.carry_flags(vars(parser().parse_args(words)))
    return read_settings(None, {FLAGS_VARIABLE: os.environ[FLAGS_VARIABLE]})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_by_variable_and_by_flag(name: str) -> None:
    found = read_settings(None, {SETTINGS[name].variable: GOOD[name]})
    assert str(getattr(found, name)) in (GOOD[name], "True")
    assert getattr(found, name) != getattr(settings.Settings(), name)
    flag = f"--kascade-{name.replace('_', '-')}"
    if SETTINGS[name].about.flag:
        assert of_flags(flag, *([] if name == "exact" else [GOOD[name]])) == found
    else:
        assert flag not in parser().format_help()


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"plan", "dense_backend", "selection"}))
def test_a_bad_value_is_one_sentence(name: str) -> None:
    sentence = f"{name}: {BAD[name]}"
    with pytest.raises(KascadeError) as refused:
        read_settings(None, {SETTINGS[name].variable: "?"})
    assert str(refused.value) == f"environment KASCADE_*: {sentence}"
    if SETTINGS[name].about.flag and name != "exact":
        with pytest.raises(KascadeError) as refused:
            of_flags(f"--kascade-{name.replace('_', '-')}", "?")
        assert str(refused.value) == f"command line: {sentence}"
    if SETTINGS[name].about.model:
        with pytest.raises(KascadeError) as refused:
            read_settings({name: "?"}, {})
        assert str(refused.value) == f'model config "kascade": {sentence}'


def test_a_bad_flag_ends_any_server_command(make_model: MakeModel) -> None:
    command = ["--model-path", str(make_model()), "--attention-backend", "torch_native"]
    with pytest.raises(SystemExit) as stop:
        prepare_server_args([*command, "--kascade-min-k", "many"])
    assert str(stop.value).startswith("kascade: command line: min_k: expected a whole number, got")


def test_silence_is_no_value() -> None:
    assert read_settings({"exact": None}, {"KASCADE_HEADS": ""}) == settings.Settings()


def test_the_tile_is_set_in_the_environment_alone() -> None:
    with pytest.raises(KascadeError, match="tile: expected it in the environment alone.*KASCADE_T"):
        read_settings({"tile": 16}, {})


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tile_must_come_before_what_copies_it() -> None:
    """A tile that only some modules have would be wrong answers."""
    read = "import kascade_kernels.reference as r; import kascade_sglang; print(r.TILE)"
    assert python(read, KASCADE_TILE="32").stdout == "32\n"
    late = python(read, KASCADE_TILE="16")
    assert late.returncode and "expected kascade_sglang to be imported before" in late.stderr
    swapped = "import kascade_sglang, kascade_kernels.reference as r; print(r.TILE)"
    assert python(swapped, KASCADE_TILE="16").stdout == "16\n"


def test_commands_refuse_a_tile_that_is_none() -> None:
    code = "from kascade_sglang.cli import main; main(['plan', 'show', 'none.json'])"
    assert (
        "tile: expected a whole number of at least 1, got 'x'"
        in python(code, KASCADE_TILE="x").stderr
    )


def test_unknown_variables_are_named_with_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    known = {setting.variable: "1" for setting in SETTINGS.values()}
    others = {"KASCADE_TOPK_RATO": "0.1", "KASCADE_HEAD": "pooled", "SGLANG_X": "1"}
    settings.announce({}, {**known, FLAGS_VARIABLE: "{}", **others})
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [sentence.split(": ", 2)[1] for sentence in said] == [
        "KASCADE_HEAD",
        "KASCADE_TOPK_RATO",
    ]
    assert said[0].endswith("did you mean KASCADE_HEADS?")
    assert said[1].endswith("did you mean KASCADE_TOPK_RATIO?")


def test_a_start_logs_what_differs_from_the_defaults(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(settings.logger, "info", lambda text, *parts: said.append(text % parts))
    monkeypatch.setattr(settings.logger, "warning", lambda text, *parts: said.append(text % parts))
    monkeypatch.setenv("KASCADE_PHASES", "decode")
    monkeypatch.setenv("KASCADE_HEADS", "per_head")
    monkeypatch.setenv("KASCADE_EXAKT", "1")
    # The plan says 0.1 and per_head, the release 3584.
    flags = ("--kascade-topk-ratio", "0.2", "--kascade-min-k", "3584")
    args = parse(make_model(kascade={"score_memory_mb": 7}), *flags)
    warning, line = said
    assert warning.startswith("kascade: KASCADE_EXAKT: expected")
    prefix, values = line.rsplit(": ", 1)
    assert prefix == "kascade: settings that differ from their defaults"
    assert set(values.split(", ")) == {"topk_ratio=0.2", "phases=decode", "score_memory_mb=7"}
    checks.check(server_facts(args))
    assert len(said) == 2, "workers check, and say nothing"


def test_a_start_without_settings_says_so(
    make_model: MakeModel, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("kascade_sglang").setLevel(logging.NOTSET)
    parse(make_model())
    assert "settings that differ from their defaults: none" in capfd.readouterr().err


def test_a_plan_is_loaded_once_as_long_as_it_stays(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = library.load_plan

    def counted(path: Path) -> Any:
        loads.append(path)
        return load(path)

    monkeypatch.setattr(library, "load_plan", counted)
    model = make_model()
    args = parse(model)
    for _ in range(3):
        assert checks.check(server_facts(args)).heads == "per_head"
    assert loads == [model / library.PLAN_NAME]
    make_plan(heads="pooled").save(loads[0])
    assert checks.check(server_facts(resolve(args))).heads == "pooled"
    assert len(loads) == 2


def reads_of_the_environment(tree: ast.AST) -> set[str]:
    """Names of ours that are looked up in ``environ`` or by ``getenv``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript | ast.Call):
            text = ast.unparse(node.value if isinstance(node, ast.Subscript) else node.func)
            inside = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if "environ" in text or "getenv" in text:
                found |= {each for each in inside if str(each).startswith("KASCADE_")}
    return found


def test_one_module_reads_our_variables() -> None:
    assert reads_of_the_environment(ast.parse("os.environ.get('KASCADE_X')")) == {"KASCADE_X"}
    for folder in ("kascade_sglang", "kernels", "patches"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not reads_of_the_environment(ast.parse(path.read_text())), path
