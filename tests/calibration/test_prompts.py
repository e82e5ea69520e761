"""Reading prompts: formats, cutting, and every refusal."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from kascade_sglang.calibration.prompts import Prompt, file_digest, read_prompts
from kascade_sglang.errors import CalibrationError


def write(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_jsonl_text_and_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", {"text": "w0 w1"}, {"prompt": "w2"})
    assert read_prompts(path, tokenizer, context=8) == [Prompt([0, 4, 5]), Prompt([0, 6])]


def test_line_separators_inside_json_strings(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "w0\u2028w1"}\n\n{"text": "w2"}')
    assert read_prompts(path, tokenizer, context=8) == [Prompt([0, 4, 5]), Prompt([0, 6])]


def test_chat_is_rendered_with_the_template(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "<s>{% for m in messages %} w9 {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} w8{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    question = {"role": "user", "content": "w1"}
    answer = {"role": "assistant", "content": "w2"}
    path = write(tmp_path, "p.jsonl", {"messages": [question]}, {"messages": [question, answer]})
    asked, answered = read_prompts(path, tokenizer, context=16)
    assert asked == Prompt([0, 13, 5, 12])
    assert answered.ids == [0, 13, 5, 13, 6]


def test_a_chat_goes_before_the_text_beside_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in UltraChat, whose ``prompt`` is the first message."""
    template = "<s>{% for m in messages %} {{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    records = [{"prompt": "w1", "prompt_id": "1", "messages": chat}, {"text": "", "messages": chat}]
    records.append({"text": "w3", "messages": []})
    found = read_prompts(write(tmp_path, "p.jsonl", *records), tokenizer, context=16)
    assert [prompt.ids for prompt in found] == [[0, 5, 6], [0, 5, 6], [0, 7]]


def test_of_several_templates_the_default_is_taken(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "p.jsonl", {"messages": [{"role": "user", "content": "w1"}]})
    plain = "<s>{% for m in messages %} {{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", {"default": plain, "tool_use": "w9"})
    assert read_prompts(path, tokenizer, context=16)[0].ids == [0, 5]
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": plain, "tool_use": "w9"})
    with pytest.raises(CalibrationError, match="named default, got rag, tool_use"):
        read_prompts(path, tokenizer, context=16)


TURNS = (
    "<s>{% for m in messages %} {{ 'w9' if m.role == 'user' else 'w8' }} {{ m.content }} </s>"
    "{% endfor %}{% if add_generation_prompt %} w8{% endif %}"
)
THINKING = TURNS.replace(" w8{% endif %}", " w8 w6{% endif %}")
FORGETFUL = TURNS.replace("m.content", "m.content if loop.last or m.role == 'user' else 'w7'")


@pytest.mark.parametrize(
    "template, max_tokens, replies",
    [
        (TURNS, None, ((5, 8), (12, 14))),
        (TURNS, 13, ((5, 8), (12, 13))),
        (TURNS, 12, ((5, 8),)),
        (THINKING, None, ((5, 8), (12, 14))),
        (FORGETFUL, None, ((11, 13),)),
    ],
    ids=["whole", "cut", "cut before", "a thought that is left out", "otherwise later"],
)
def test_replies_of_a_chat_are_told(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    max_tokens: int | None,
    replies: tuple[tuple[int, int], ...],
) -> None:
    """Of each the words and the end of turn, not what the template writes before them."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path = write(tmp_path, "p.jsonl", {"messages": messages})
    (prompt,) = read_prompts(path, tokenizer, context=16, max_tokens=max_tokens)
    assert prompt.replies == replies
    told = [prompt.ids[begin:end] for begin, end in replies]
    words = [[9, 1]] if template is FORGETFUL else [[6, 7, 1], [9, 1]]
    assert told == [one[: len(ids)] for one, ids in zip(words, told, strict=False)]


@pytest.mark.parametrize(
    "context, max_tokens, lengths",
    [(100, 4, [4, 4, 4, 2]), (6, None, [6, 6]), (None, None, [11])],
    ids=["max_tokens", "context", "default"],
)
def test_text_is_cut_into_led_pieces(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    context: int | None,
    max_tokens: int | None,
    lengths: list[int],
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("w0 w1 w2 w3 w4\nw5 w6 w7 w8 w9")
    prompts = read_prompts(path, tokenizer, context, max_tokens)
    assert [len(prompt.ids) for prompt in prompts] == lengths
    assert all(prompt.ids[0] == 0 for prompt in prompts)
    assert [token for prompt in prompts for token in prompt.ids[1:]] == list(range(4, 14))


def test_max_tokens_cuts_lines(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", {"text": "w0 w1 w2"})
    assert read_prompts(path, tokenizer, context=3, max_tokens=3) == [Prompt([0, 4, 5])]


def test_limit_draws_by_seed_in_file_order(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path, "p.jsonl", *({"text": f"w{index}"} for index in range(20)))
    drawn = read_prompts(path, tokenizer, 8, limit=5, seed=1)
    assert len(drawn) == 5 and drawn == sorted(drawn)
    assert drawn == read_prompts(path, tokenizer, 8, limit=5, seed=1)
    assert drawn != read_prompts(path, tokenizer, 8, limit=5, seed=2)
    assert len(read_prompts(path, tokenizer, 8, limit=99)) == 20


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ('{"text": "w0"}\n{"text"\n', ":2: not JSON"),
        ("[" * 100_000, ":1: not JSON"),
        ("9" * 5000, ":1: not JSON"),
        ('{"text": "\\ud800"}', ":1: .*surrogates not allowed"),
        ("\0" * 99, "a byte of zero"),
        ('["w0"]\n', ':1: expected an object with "text"'),
        ('{"text": 5}\n', ':1: expected an object with "text"'),
        ('{"messages": [{"role": "user", "content": "w0"}]}\n', ":1: .*chat template"),
        ('{"text": "w0 w1 w2 w3"}\n', "a prompt of 5 tokens, more than the model's context of 4"),
    ],
    ids=[
        "empty",
        "blank",
        "json",
        "deep",
        "long-number",
        "surrogate",
        "zeros",
        "list",
        "number",
        "no-template",
        "too-long",
    ],
)
def test_refuses_bad_lines(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str, sentence: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=sentence):
        read_prompts(path, tokenizer, context=4)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"max_tokens": 5}, "more than the model's context of 4"),
        ({"max_tokens": 0}, "--max-tokens"),
        ({"limit": 0}, "--limit"),
    ],
    ids=str,
)
def test_refuses_bad_options(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, int], sentence: str
) -> None:
    path = write(tmp_path, "p.jsonl", {"text": "w0"})
    with pytest.raises(CalibrationError, match=sentence):
        read_prompts(path, tokenizer, context=4, **options)


@pytest.mark.parametrize(
    "messages",
    [[], ["hello"], [{"content": "no role"}], [{"role": "user"}]],
    ids=["empty", "string", "no-role", "template-error"],
)
def test_refuses_bad_chats(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: list,
) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ raise_exception('content needed') if true }}"
    )
    with pytest.raises(CalibrationError, match=":1: "):
        read_prompts(write(tmp_path, "p.jsonl", {"messages": messages}), tokenizer, 8)


def test_refuses_missing_and_binary_files(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.txt", tokenizer, 8)
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_prompts(binary, tokenizer, 8)


def test_digest(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_digest(path).startswith("ba7816bf8f01cfea")
