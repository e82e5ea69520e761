"""What ``kascade eval`` refuses: one sentence on stderr, exit status 1, and nothing asked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kascade_sglang.evaluation.errors import EvaluationError
from kascade_sglang.evaluation.tokens import Tokens
from stub import serving

Eval = Callable[..., int]
AIME = ["--aime", "FILE"]
ROW = '{"problem": "1 + 1?", "answer": "2"}\n'
REFUSALS = {
    "unknown task": ("nonsense", [], None, "--tasks nonsense: unknown; expected some of ruler"),
    "task without its file": ("aime", [], None, "--tasks aime: needs its data; give --aime"),
    "missing file": ("aime", AIME, None, "FILE: cannot read (No such file or directory)"),
    "malformed line": ("aime", AIME, ROW + "{oops\n", "FILE, line 2: no JSON"),
    "not an object": ("aime", AIME, ROW + "\n[1]\n", "FILE, line 3: expected an object"),
    "missing field": ("aime", AIME, '{"problem": "x"}\n', "FILE, line 1: no field 'answer'"),
    "wrong answer": ("aime", AIME, '{"problem": "x", "answer": "two"}\n', "expected 0 to 999"),
    "empty file": ("aime", AIME, "", "FILE: empty; expected one JSON object a line"),
    "broken squad": ("qa", ["--squad", "FILE"], "{", "--squad FILE: no JSON (line 1)"),
    "no squad": ("qa", ["--squad", "FILE"], "{}", "--squad FILE: expected SQuAD's format"),
    "empty squad": ("qa", ["--squad", "FILE"], '{"data": []}', "holds no answerable question"),
    "no longbench": ("longbench", ["--longbench", "FILE"], None, "no such folder"),
    "empty text": ("perplexity", ["--text", "FILE"], " \n", "--text FILE: empty"),
    "short text": ("perplexity", ["--text", "FILE"], "a b c", "expected 32 to 3"),
    "too long": ("vt", ["--lengths", "8192"], None, "--lengths 8192: the server's context is 4096"),
    "too short": ("vt", ["--lengths", "100"], None, "--lengths: expected at least 256 tokens"),
    "no samples": ("vt", ["--samples", "0"], None, "--samples: expected a number above 0, got 0"),
    "no folder": ("vt", ["--out", "/no/a.csv"], None, "--out /no/a.csv: expected a folder that"),
    "out is a folder": ("vt", ["--out", "/tmp"], None, "--out /tmp: expected a file's name"),
    "out is a device": ("vt", ["--out", "/dev/null"], None, "--out /dev/null: not a file"),
    "foreign csv": ("vt", ["--out", "FILE"], "a,b\n1,2", "holds other columns; give a new file"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(
    case: tuple[str, list[str], str | None, str],
    kascade_eval: Eval,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, options, content, expected = case
    path = tmp_path / "given"
    if content is not None:
        path.write_text(content)
    with serving(lambda prompt: "", context=4096) as stub:
        given = [str(path) if option == "FILE" else option for option in options]
        assert kascade_eval(stub, task, *given) == 1
        assert stub.requests == []
    assert content is None or path.read_text() == content
    said = capsys.readouterr().err.strip()
    assert said.startswith("kascade: ") and "\n" not in said
    assert expected.replace("FILE", str(path)) in said


def test_no_server(kascade_eval: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9", "localhost", "http://"):
        assert kascade_eval(url, "vt") == 1
        assert "no OpenAI-compatible server answers" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "aime.jsonl"
    path.write_text('{"problem": "%s", "answer": 1}' % ("word " * 600))
    with serving(lambda prompt: "", context=512) as stub:
        assert kascade_eval(stub, "aime", "--aime", str(path)) == 1
        assert stub.requests == []
    assert "exceed the server's context of 512" in capsys.readouterr().err


def test_another_tokenizer_than_the_servers(
    kascade_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt: "", extra_tokens=200) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 1
    assert "give the tokenizer of the served model" in capsys.readouterr().err


def test_a_server_that_names_no_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    from kascade_sglang import cli

    with serving(lambda prompt: "") as stub:
        command = ["eval", "--url", stub.url, "--tasks", "vt", "--out", "results.csv"]
        assert cli.main(command) == 1
    assert "does not say which it uses" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="a folder without a tokenizer"):
        Tokens.load(str(tmp_path))
