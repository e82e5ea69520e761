"""Replies that are empty, thoughts or cut off, and which of a server's models is asked."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.endpoint import Endpoint
from kascade_sglang.evaluation.tokens import Tokens
from kascade_sglang.servers.demo_model import MODEL
from tests.support.stub import serving

Eval = Callable[..., int]
CHAT = "/v1/chat/completions"
LISTED = [
    {"id": "base", "max_model_len": 65536},
    {"id": "tuned", "parent": "base", "max_model_len": None},
]


def note(tmp_path: Path) -> str:
    with open(tmp_path / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return row["note"]


def chat(message: dict[str, Any], finish: str = "stop") -> dict[str, Any]:
    """What a server sends; without usage, prompts are of any length."""
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "1", "model": "stub", "choices": [choice]}


def answers(sample: str) -> str:
    """Every number of a prompt, one of which is the answer."""
    return " ".join(word for word in sample.replace(".", " ").split() if word.isdigit())


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_reply_called_a_thought_is_scored_and_said(
    name: str,
    kascade_eval: Eval,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(answers) as stub:
        monkeypatch.setattr(stub, "as_thought", name)
        assert kascade_eval(stub, "niah_single_1", "--lengths", "1024", "--prompt", "chat") == 0
    said = "3 of 3 replies called thoughts by the server's reasoning parser"
    assert said in note(tmp_path)
    assert said in capsys.readouterr().err
    assert ",100.00," in (tmp_path / "results.csv").read_text()


def test_the_answer_after_a_thought_is_what_is_scored(kascade_eval: Eval, tmp_path: Path) -> None:
    split = chat({"content": "It is 7.", "reasoning_content": "Is it 8?"})
    with serving(lambda prompt: "", instead={CHAT: split}) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024", "--prompt", "chat") == 0
    replies = (tmp_path / "results.replies.jsonl").read_text()
    assert '"text": "It is 7."' in replies and '"thought": false' in replies
    assert "thoughts" not in note(tmp_path)


def test_an_answer_that_is_gone_on_with_is_no_thought(kascade_eval: Eval) -> None:
    with serving(lambda prompt: "x") as stub:
        kascade_eval(stub, "vt", "--lengths", "1024")
        kascade_eval(stub, "vt", "--lengths", "1024", "--prompt", "chat")
    assert stub.requests[0]["separate_reasoning"] is False
    assert "separate_reasoning" not in stub.requests[-1]


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_empty_replies_are_warned_of(
    content: str | None,
    kascade_eval: Eval,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(lambda prompt: "", instead={CHAT: chat({"content": content})}) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert note(tmp_path).endswith("3 of 3 replies empty")
    assert "warning: vt 1024: " in capsys.readouterr().err


def test_replies_that_were_cut_off_are_counted(kascade_eval: Eval, tmp_path: Path) -> None:
    cut = chat({"content": "It is"}, "length")
    with serving(lambda prompt: "", instead={CHAT: cut}) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
    assert "3 of 3 replies cut off at the most tokens that were asked for" in note(tmp_path)


def test_settings_of_the_template_are_sent_and_told_apart(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--chat-template-kwargs", '{"enable_thinking": false}']
    with serving(lambda prompt: "x") as stub:
        kascade_eval(stub, "vt", "--lengths", "1024")
        kascade_eval(stub, "vt", "--lengths", "1024", *given)
        assert len(stub.requests) == 6, "another template is another measurement"
        assert stub.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
        assert "chat_template_kwargs" not in stub.requests[0]
        assert kascade_eval(stub, "vt", "--prompt", "completion", *given) == 1
    assert "uses no template" in capsys.readouterr().err
    assert 'template: {""enable_thinking"": false}' in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 100_000])
def test_settings_of_the_template_are_an_object(
    text: str, kascade_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        kascade_eval("http://127.0.0.1:1", "vt", "--chat-template-kwargs", text)
    assert ended.value.code == 2
    assert "expected a JSON object" in capsys.readouterr().err


def test_templates_count_their_tokens_with_their_settings(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if think %} one two three{% endif %}"
    tokenizer = Tokens.load(str(MODEL))._tokenizer
    tokenizer.chat_template = template
    assert Tokens(tokenizer).overhead == 0
    assert Tokens(tokenizer, {"think": True}).overhead == len(
        tokenizer.encode(" one two three", add_special_tokens=False)
    )


def test_a_template_that_refuses_is_one_sentence() -> None:
    tokenizer = Tokens.load(str(MODEL))._tokenizer
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    with pytest.raises(EvaluationError, match=r"refuses .*\(a system message must come first\)"):
        Tokens(tokenizer)


def test_the_base_model_is_asked_and_others_named(
    kascade_eval: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {"/v1/models": {"data": LISTED[::-1]}}
    with serving(lambda prompt: "x", instead=listed) as stub:
        assert kascade_eval(stub, "vt", "--lengths", "1024") == 0
        assert stub.requests[0]["model"] == "base"
    assert "asking base; --served-model names another of tuned" in capsys.readouterr().err
    assert "\nkascade,base,vt," in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize("sglang", [True, False])
def test_an_adapter_is_asked_as_the_server_wants_it(
    sglang: bool, kascade_eval: Eval, tmp_path: Path
) -> None:
    """By its name alone SGLang answers with the base model, and says nothing."""
    listed = {"/v1/models": {"data": LISTED}}
    with serving(lambda prompt: "x", instead=listed, sglang=sglang) as stub:
        chosen = ["--served-model", "tuned", "--lengths", "1024"]
        assert kascade_eval(stub, "vt", *chosen) == 0
        assert stub.requests[0]["model"] == ("base:tuned" if sglang else "tuned")
        assert Endpoint.probe(stub.url, "tuned").context == 65536
        if sglang:
            assert kascade_eval(stub, "perplexity", *chosen) == 0
            assert stub.requests[-1]["lora_path"] == "tuned"
    assert ",tuned,vt," in (tmp_path / "results.csv").read_text()


def test_a_model_that_is_not_served_is_refused(
    kascade_eval: Eval, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda prompt: "x", instead={"/v1/models": {"data": LISTED}}) as stub:
        assert kascade_eval(stub, "vt", "--served-model", "other") == 1
    said = capsys.readouterr().err
    assert "--served-model: expected one that the server lists, base, tuned, got other" in said
