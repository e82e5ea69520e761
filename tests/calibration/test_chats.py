"""Chats that calibration makes: what is asked stands in the document, and replies are told."""

import pytest
from transformers import AutoTokenizer

from kascade_sglang.calibration.chats import QUESTIONS, make_chats
from kascade_sglang.calibration.prompts import PLAIN, chat_prompt
from kascade_sglang.servers.demo_model import MODEL


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("length", [300, 4000])
def test_a_document_and_what_it_answers(length: int) -> None:
    chats = list(make_chats(3, length, 0, words))
    assert chats == list(make_chats(3, length, 0, words))
    assert chats != list(make_chats(3, length, 1, words))
    for chat in chats:
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert len(chat) == 2 * QUESTIONS or length == 300
        document = chat[0]["content"]
        for reply in chat[1::2]:
            found = reply["content"].removesuffix(".").split(" ")[-1]
            assert found in document, reply
        if length == 4000:
            assert 0.7 * length < sum(words(turn["content"]) for turn in chat) < length


def test_without_a_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = None
    chat = next(make_chats(1, 1000, 0, words))
    prompt = chat_prompt(chat, tokenizer, PLAIN)
    replies = [tokenizer.decode(prompt.ids[begin:end]).strip() for begin, end in prompt.replies]
    assert len(replies) == len(chat) // 2
    for reply, turn in zip(replies, chat[1::2], strict=True):
        assert reply.split()[-1][-3:] == turn["content"].split()[-1][-3:]
