"""A server that sends something else than it was asked for: one sentence, not a traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.stub import serving

Eval = Callable[..., int]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NO_REPLY = "expected a reply as OpenAI's or SGLang's, got another ("
NO_LOSSES = {"meta_info": {"input_token_logprobs": [[1]]}}
ODD_USAGE = {"choices": [{"text": "x"}], "usage": {"prompt_tokens": "many"}}
ENDLESS_USAGE = '{"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1e999}}'
TEXT_CONTEXT = {"data": [{"id": "m", "max_model_len": "8192"}]}
LIST_PARENT = {"data": [{"id": "m", "parent": ["m"]}]}
MALFORMED = {
    "models is a list": ("vt", "/v1/models", [], "no OpenAI-compatible server answers"),
    "models holds texts": ("vt", "/v1/models", {"data": ["a"]}, "/v1/models names no model"),
    "model is a list": ("vt", "/v1/models", {"data": [["a"]]}, "/v1/models names no model"),
    "models without end": ("vt", "/v1/models", "[" * 100_000, "server answers"),
    "context is a text": ("vt", "/v1/models", TEXT_CONTEXT, "max_model_len: expected a whole"),
    "parent is a list": ("vt", "/v1/models", LIST_PARENT, "/v1/models names no model"),
    "chat without end": ("vt", CHAT, "[" * 100_000, NO_REPLY),
    "infinite usage": ("vt", TEXT, ENDLESS_USAGE, NO_REPLY),
    "no metrics": ("vt", "/metrics/", "<html>not { metrics", "expected Prometheus's text format"),
    "chat without choices": ("vt", CHAT, {"choices": []}, NO_REPLY),
    "chat with null choices": ("vt", CHAT, {"choices": None}, NO_REPLY),
    "chat with an error": ("vt", CHAT, {"error": {"message": "no"}}, NO_REPLY),
    "chat that is no JSON": ("vt", CHAT, "<html>", NO_REPLY),
    "chat without a message": ("vt", CHAT, {"choices": [{}]}, NO_REPLY),
    "text without choices": ("vt", TEXT, {"choices": []}, NO_REPLY),
    "text that is null": ("vt", TEXT, {"choices": [{"text": None}]}, NO_REPLY),
    "text with odd usage": ("vt", TEXT, ODD_USAGE, NO_REPLY),
    "losses without meta_info": ("perplexity", "/generate", {"text": "x"}, NO_REPLY),
    "losses that are a list": ("perplexity", "/generate", [1], NO_REPLY),
    "too few losses": ("perplexity", "/generate", NO_LOSSES, "expected 256 log probabilities"),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_replies(
    case: tuple[str, str, Any, str], kascade_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    task, path, body, expected = case
    prompt = "completion" if path == TEXT else "chat"
    with serving(lambda prompt: "", instead={path: body}) as stub:
        options = ["--lengths", "1024", "--prompt", prompt, "--concurrency", "1"]
        assert kascade_eval(stub, task, *options) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("kascade: ") and expected in said


def test_server_info_of_another_shape_is_no_sglang(kascade_eval: Eval, tmp_path: Path) -> None:
    with serving(lambda prompt: "", instead={"/server_info": [1]}) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert "\nserver,stub,vt," in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_server_of_this_machine_is_asked_without_a_proxy(
    proxy: str, kascade_eval: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    growth = {("prefill", kind): 100 for kind in ("attended", "dense")}
    with serving(lambda prompt: "", growth=growth) as stub:
        assert kascade_eval(stub, "vt,perplexity", "--lengths", "1024") == 0
    assert ",1.0000," in (tmp_path / "results.csv").read_text(), "counters are read, too"


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense"])
def test_a_proxy_that_does_not_work_is_one_sentence(
    proxy: str,
    kascade_eval: Eval,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    assert kascade_eval("http://192.0.2.1", "vt", "--lengths", "1024") == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("kascade: --url: no OpenAI-compatible server answers")


def test_what_a_server_says_of_itself_is_text_or_nothing(
    kascade_eval: Eval, tmp_path: Path
) -> None:
    odd = {"/server_info": {"attention_backend": {}}, "/model_info": {"tokenizer_path": 5}}
    with serving(lambda prompt: "", instead=odd) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert "\nserver,stub,vt," in (tmp_path / "results.csv").read_text()


def test_certificates_that_are_not_there(
    kascade_eval: Eval, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/c.pem")
    assert kascade_eval("https://localhost.invalid", "vt") == 1
    assert "no OpenAI-compatible server answers" in capsys.readouterr().err
