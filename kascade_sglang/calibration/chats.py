"""Chats to calibrate on where nobody gives any: a long document, then questions that it answers.

What selection loses shows where a model must find something: a model that reads on in a novel
guesses most words from the last few. So between pieces of the bundled books stand records of names
and random values, which no model can guess, and most questions are for one of them.
"""

import random
import string
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kascade_sglang.text.books import load_books
from kascade_sglang.text.words import ADJECTIVES, NOUNS

QUESTIONS = 8
"""Of a chat."""
PROSE = 0.4
"""Share of the sections that are from books; the others are records."""
_ANSWERS = 0.12
"""Share of a chat's tokens that is left for questions and replies."""


class _Section(NamedTuple):
    """A part of a document, and what it can be asked: (question, answer)."""

    text: str
    asked: list[tuple[str, str]]


def make_chats(
    count: int, length: int, seed: int, tokens: Callable[[str], int]
) -> Iterator[list[dict[str, str]]]:
    """Yield chats of about ``length`` tokens, the same for the same seed.

    tokens: counts those of a text.
    """
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        sections, left = [], length * (1 - _ANSWERS)
        while left > 0:
            section = _prose(rng) if rng.random() < PROSE else _records(rng)
            left -= tokens(section.text)
            sections.append(section)
        sections = sections[:-1] or sections
        text = "\n\n".join(["Read this.", *(section.text for section in sections)])
        yield chat_about(rng, text, [pair for section in sections for pair in section.asked])


def chat_about(rng: random.Random, text: str, asked: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return a chat that begins with a text and asks up to QUESTIONS that it answers.

    asked: (question, answer) to draw from.
    """
    messages: list[dict[str, str]] = []
    for question, answer in rng.sample(asked, min(QUESTIONS, len(asked))):
        content = question if messages else f"{text}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _prose(rng: random.Random) -> _Section:
    """Some sentences of a book in their order; asked for what follows one of them."""
    title, sentences = rng.choice(load_books())
    first = rng.randrange(max(1, len(sentences) - 12))
    piece = sentences[first : first + rng.randint(6, 12)]
    asked = [
        (f"In {title}, which sentence follows this one: {one}", other)
        for one, other in zip(piece, piece[1:], strict=False)
        if len(one) < 300 and len(other) < 300
    ]
    return _Section(" ".join(piece), rng.sample(asked, min(2, len(asked))))


def _records(rng: random.Random) -> _Section:
    """Lines of names and values of one kind; asked for the values of one name or of two."""
    form, question = rng.choice(_FORMS)
    kind = rng.choice(("code", "key", "password", "number", "label", "address"))
    make_name, make_value = rng.choice(_NAMES), rng.choice(_VALUES)
    made = {make_name(rng): make_value(rng) for _ in range(rng.randint(8, 24))}
    text = "\n".join(form.format(kind=kind, name=name, value=made[name]) for name in made)
    asked = []
    for name in rng.sample(list(made), 3):
        reply = rng.choice(("{value}", "The {kind} of {name} is {value}."))
        answer = reply.format(kind=kind, name=name, value=made[name])
        asked.append((question.format(kind=kind, name=name), answer))
    one, other = rng.sample(list(made), 2)
    both = f"{one}: {made[one]}, {other}: {made[other]}"
    asked.append((f"What are the {kind}s of {one} and of {other}?", both))
    return _Section(text, asked)


_FORMS = (
    ("The {kind} of {name} is {value}.", "What is the {kind} of {name}?"),
    ("{name}: {value}", "Which {kind} stands beside {name}?"),
    ('{{"name": "{name}", "{kind}": "{value}"}}', 'Which "{kind}" has the record named {name}?'),
    ("{name} = {value}", "What is {name} set to?"),
    ("| {name} | {value} |", "Which value has the row of {name}?"),
    ("Remember that {name} has the {kind} {value}.", "Which {kind} has {name}?"),
)
"""Of a line, and of the question for its value."""


def _words(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _slug(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(1000)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(4, 9)))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(5, 14)))


_NAMES = (_words, _slug, _uuid, _letters)
_VALUES = (_words, _number, _uuid, _letters)
