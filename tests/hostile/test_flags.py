"""Absurd values of flags: one sentence, no traceback, no wait, no write."""

import json
from pathlib import Path

import pytest

from tests.hostile.conftest import Refused
from tests.hostile.files import PLAN
from tests.support.stub import serving

HUGE = "9" * 400
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e999", "x", "", HUGE + "x")
EVAL = {
    "--lengths": ("0", "-5", "255", "x", "1.5", "1e3"),
    "--samples": ("0", "-1", "x"),
    "--concurrency": ("0", "-3", "nan"),
    "--timeout": ("0", "-1", "nan", "inf", "x"),
    "--temperature": ("-0.1", "nan", "inf", "x"),
    "--max-tokens": ("0", "-1", "x"),
    "--tasks": ("", ",", "banana", "vt,banana", "\x1b[2J", "x" * 5000),
    "--prompt": ("banana", ""),
    "--served-model": ("banana", ""),
    "--chat-template-kwargs": ("", "x", "[]", "NaN", "[" * 100_000),
    "--out": (".", "missing/x.csv", "x" * 300 + ".csv", "/dev/full/x.csv"),
    "--plot": ("x.banana", ".", "missing/x.png", "results.csv"),
    "--squad": ("missing.json", ".", "/dev/zero"),
    "--aime": ("missing.jsonl", ".", "/dev/zero"),
    "--longbench": ("missing", "/dev/zero"),
    "--text": ("missing.txt", ".", "/dev/zero"),
    "--tokenizer": ("missing/folder", ".", "--bad--", "x" * 300, "a/b/c/d"),
    "--url": (
        "",
        "x",
        "http://",
        "http://[",
        "file:///etc/passwd",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:1",
        "http://user:pw@127.0.0.1:1",
        "javascript:alert(1)",
        "http://" + "x" * 5000,
        "http://\x1b[2J",
    ),
}
CALIBRATE = {
    "--anchors": ("0", "-1", "99", "x", "1,2", "0,0", "0,99", "2,0", ",", "0,x", HUGE),
    "--tiles": ("0", "-1", "x"),
    "--seed": ("-1", "x"),
    "--max-tokens": ("0", "-1", "x", HUGE),
    "--limit": ("0", "-1", "x"),
    "--topk-ratio": ("2", *NUMBERS),
    "--min-k": ("63", HUGE, *NUMBERS),
    "--heads": ("banana", ""),
    "--criterion": ("banana", ""),
    "--device": ("banana", "meta", "cuda:99", "", "cpu:x"),
    "--device-map": ("banana", ""),
    "--dtype": ("banana", "int8", ""),
    "--report": ("page", "page.banana", ".", "missing/page.html"),
    "--out": (".", "missing/plan.json", "/dev/full/plan.json"),
    "--dataset": ("", "missing/folder"),
    "--model": ("", "missing/folder", ".", "a/b/c/d", "--bad--", "x" * 300, "\x1b[2J"),
}
PLANS = {
    "show": (["missing"], ["preset:banana"], ["preset:"], ["p.json", "--anchors", "0"], [""]),
    "check": (["p.json", "--model", "missing/folder"], ["p.json", "--model", ""], ["."]),
    "diff": (["p.json"], ["p.json", "missing"], ["p.json", "preset:\x1b[2J"]),
    "report": (["p.json"], ["p.json", "--out", "p.json"], ["p.json", "--out", "x.banana"]),
    "import": (["p.json", "--model", "x", "--out", "y.json"], ["p.npy"]),
    "banana": ([],),
}


def cases(table: dict[str, tuple]) -> list:
    return [
        pytest.param(flag, value, id=f"{flag}-{number}")
        for flag, values in table.items()
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(("flag", "value"), cases(EVAL))
def test_eval(flag: str, value: str, refused: Refused, tmp_path: Path, small_model: Path) -> None:
    tasks = {"--squad": "qa", "--aime": "aime", "--longbench": "longbench", "--text": "perplexity"}
    with serving(lambda prompt: "") as stub:
        given = {
            "--url": stub.url,
            "--tasks": tasks.get(flag, "vt"),
            "--lengths": "512",
            "--samples": "1",
            "--tokenizer": str(small_model),
            "--out": "results.csv",
        }
        given[flag] = value
        said = refused("eval", *(f"{name}={text}" for name, text in given.items()))
        assert stub.requests == [], "nothing is asked"
    assert said


@pytest.mark.parametrize(("flag", "value"), cases(CALIBRATE))
def test_calibrate(
    flag: str, value: str, refused: Refused, tmp_path: Path, small_model: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "red door " * 300}))
    given = {
        "--model": str(small_model),
        "--out": "plan.json",
        "--device": "cpu",
        "--anchors": "2",
        "--criterion": "mass",
    }
    given |= {} if flag == "--dataset" else {"--prompts": "p.jsonl"}
    given |= {"--device": "auto"} if flag == "--device-map" else {}
    given[flag] = value
    assert refused("calibrate", *(f"{name}={text}" for name, text in given.items()))


@pytest.mark.parametrize(("command", "arguments"), cases(PLANS))
def test_plan(command: str, arguments: list[str], refused: Refused, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p.json")
    assert refused("plan", command, *arguments)


SETTINGS = {
    "KASCADE_PRESET": ("banana", "\x1b[2J"),
    "KASCADE_TOPK_RATIO": ("x", "1,5"),
    "KASCADE_MIN_K": ("x", "1.5", HUGE + "x"),
    "KASCADE_EXACT": ("perhaps",),
    "KASCADE_PHASES": ("prefill",),
    "KASCADE_SCORE_MEMORY_MB": ("0", "-1", "x"),
    "KASCADE_SELECTION": ("banana",),
    "KASCADE_TILE": ("0", "x"),
    "KASCADE_HEADS": ("banana" * 1000,),
}


@pytest.mark.parametrize(("variable", "value"), cases(SETTINGS))
def test_settings(
    variable: str, value: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLAN.save(tmp_path / "p.json")
    monkeypatch.setenv(variable, value)
    name = variable.removeprefix("KASCADE_").lower()
    assert refused("plan", "show", "p.json").startswith(f"environment KASCADE_*: {name}: expected")
