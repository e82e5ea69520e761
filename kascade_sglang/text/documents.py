"""Long documents with planted facts, and questions that only the document answers.

Real English text carries short invented facts; a question asks for one of them. Every document
is a function of its seed, so that runs can be compared. The training data are made by the same
code, with other books, other names and other values.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kascade_sglang.text.books import load_books
from kascade_sglang.text.words import (
    COUNTED,
    NUMBER_KINDS,
    PHRASE,
    PHRASE_KINDS,
    Draw,
    Name,
)

TASKS = ("single_key", "multi_key", "multi_hop", "which_document", "counting")
MAX_TOKENS = 48
"""Room for the longest right reply."""

FACT_FORMS = (
    "The {core}.",
    "Note that the {core}.",
    "Remember that the {core}.",
    "It is on record that the {core}.",
)
LOOKUP_QUESTIONS = (
    "What is the {kind} of the {name}?",
    "Tell me the {kind} of the {name}.",
    "Which {kind} does the {name} have?",
    "I need the {kind} of the {name}. What is it?",
)
HOP_QUESTIONS = (
    "In which room does the keeper of the {name} live?",
    "Where does the person live who keeps the {name}? Give the room.",
    "Who keeps the {name}, and in which room does that person live?",
)
MENTION_FORMS = (
    "The {name} appears in this document.",
    "This document mentions the {name}.",
    "Here we hear about the {name}.",
)
MENTION_QUESTIONS = (
    "Which document mentions the {name}?",
    "In which document does the {name} appear?",
    "Give the number of the document that mentions the {name}.",
)
COUNT_QUESTIONS = (
    "How many times does the text say that the {event}?",
    "Count how often the {event}.",
)


@dataclass(frozen=True)
class Question:
    """One question about a document, and the value that a right reply holds."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A long text with questions about it."""

    title: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Item:
    """A question with the full reply that the model is trained to give."""

    question: Question
    reply: str


@dataclass(frozen=True)
class DocumentDraft:
    """A document in pieces that are tokenised one by one, and what can be asked about it."""

    title: str
    pieces: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Ask:
    """A question whose answer may depend on where its fact comes to stand.

    ``answer`` is None where the answer is the number of the document that holds ``fact``.
    """

    task: str
    text: str
    reply: str
    fact: str
    answer: str | None = None

    def item(self, where: Mapping[str, int]) -> Item:
        """The finished question, given the document number of each fact."""
        answer = str(where[self.fact]) if self.answer is None else self.answer
        return Item(Question(self.task, self.text, answer), self.reply.format(answer=answer))


Planted = tuple[list[str], list[Ask]]


def _lookup(draw: Draw, task: str, kind: str, name: Name) -> tuple[str, Ask]:
    """A fact that gives ``name`` a value, and the question for it."""
    rng = draw.rng
    value = draw.phrase() if kind in PHRASE_KINDS else draw.number()
    core = f"{kind} of the {name} is {value}"
    fact = rng.choice(FACT_FORMS).format(core=core)
    text = rng.choice(LOOKUP_QUESTIONS).format(kind=kind, name=name)
    reply = f"The {kind} of the {name} is {{answer}}."
    return fact, Ask(task, text, reply, fact, value)


def _single_key(draw: Draw, count: int) -> Planted:
    """Facts that have nothing to do with one another."""
    kinds = NUMBER_KINDS + PHRASE_KINDS
    pairs = [_lookup(draw, "single_key", draw.rng.choice(kinds), draw.name()) for _ in range(count)]
    return [fact for fact, _ in pairs], [ask for _, ask in pairs]


def _multi_key(draw: Draw, count: int) -> Planted:
    """Groups of facts of one kind, whose names share words, so that both words matter."""
    facts: list[str] = []
    asks: list[Ask] = []
    for _ in range((count + 1) // 2):
        kind = draw.rng.choice(NUMBER_KINDS + PHRASE_KINDS)
        first = draw.name()
        names = [first, draw.name(first.adjective), draw.name(None, first.noun)]
        names.append(draw.name(names[1].adjective) if draw.rng.random() < 0.5 else draw.name())
        for name in names:
            fact, ask = _lookup(draw, "multi_key", kind, name)
            facts.append(fact)
            asks.append(ask)
    return facts, draw.rng.sample(asks, count)


def _multi_hop(draw: Draw, count: int) -> Planted:
    """Who keeps a thing, and where that person lives, said in two places."""
    facts: list[str] = []
    asks: list[Ask] = []
    for _ in range(count + 1):
        name, person, room = draw.name(), draw.person(), draw.number()
        facts += [f"The {name} is kept by {person}.", f"{person} lives in room {room}."]
        text = draw.rng.choice(HOP_QUESTIONS).format(name=name)
        reply = f"The {name} is kept by {person}. {person} lives in room {{answer}}."
        asks.append(Ask("multi_hop", text, reply, facts[-1], room))
    return facts, asks[:count]


def _which_document(draw: Draw, count: int) -> Planted:
    """Things that one of the numbered documents mentions."""
    facts: list[str] = []
    asks: list[Ask] = []
    for _ in range(count + 1):
        name = draw.name()
        facts.append(draw.rng.choice(MENTION_FORMS).format(name=name))
        text = draw.rng.choice(MENTION_QUESTIONS).format(name=name)
        reply = f"The {name} is mentioned in document {{answer}}."
        asks.append(Ask("which_document", text, reply, facts[-1]))
    return facts, asks[:count]


def _counting(draw: Draw, count: int) -> Planted:
    """Events that happen two to seven times."""
    facts: list[str] = []
    asks: list[Ask] = []
    for _ in range(count + 1):
        noun, verb = draw.rng.choice(COUNTED)
        event = f"{draw.name(None, noun)} {verb}"
        times = draw.rng.randint(2, 7)
        facts += [f"The {event}."] * times
        text = draw.rng.choice(COUNT_QUESTIONS).format(event=event)
        asks.append(Ask("counting", text, f"The {event} {{answer}} times.", facts[-1], str(times)))
    return facts, asks[:count]


PLANTERS: dict[str, Callable[[Draw, int], Planted]] = {
    "single_key": _single_key,
    "multi_key": _multi_key,
    "multi_hop": _multi_hop,
    "which_document": _which_document,
    "counting": _counting,
}


def _filler(
    rng: random.Random, sentences: Sequence[str], budget: int, count_tokens: Callable[[str], int]
) -> list[str]:
    """Consecutive sentences from a random place, at most ``budget`` tokens of them."""
    taken: list[str] = []
    place = rng.randrange(len(sentences))
    misses = 0
    while misses < 3:
        sentence = sentences[place % len(sentences)]
        place += 1
        size = count_tokens(" " + sentence)
        if size > budget:
            misses += 1
            continue
        budget -= size
        taken.append(sentence)
    return taken


def _mix(rng: random.Random, facts: list[str], filler: list[str]) -> list[str]:
    """Put the facts, in random order, at random places between the filler sentences."""
    rng.shuffle(facts)
    is_fact = [True] * len(facts) + [False] * len(filler)
    rng.shuffle(is_fact)
    left, right = iter(facts), iter(filler)
    return [next(left) if fact else next(right) for fact in is_fact]


def _number(
    rng: random.Random, sentences: list[str], parts: int
) -> tuple[list[str], dict[str, int]]:
    """Lay sentences out as numbered documents; also say which document each stands in.

    With no parts the text is one document without headings. Breaks between paragraphs are
    random, as a hint to nothing.
    """
    cuts = set(rng.sample(range(1, len(sentences)), parts - 1)) if parts else set()
    pieces: list[str] = ["Document 1:\n\n"] if parts else []
    where: dict[str, int] = {}
    number, glue = 1, ""
    for place, sentence in enumerate(sentences):
        if place in cuts:
            pieces += [f"\n\nEnd of document {number}.", f"\n\nDocument {number + 1}:\n\n"]
            number, glue = number + 1, ""
        pieces.append(glue + sentence)
        where[sentence] = number
        glue = "\n\n" if rng.random() < 0.15 else " "
    if parts:
        pieces.append(f"\n\nEnd of document {number}.")
    return pieces, where


def compose(
    rng: random.Random,
    split: str,
    counts: Mapping[str, int],
    target_tokens: int,
    count_tokens: Callable[[str], int],
    texts: Sequence[tuple[str, Sequence[str]]],
) -> DocumentDraft:
    """Plan a document of just under ``target_tokens`` with ``counts[task]`` questions a task."""
    draw = Draw(rng, split)
    facts: list[str] = []
    asks: list[Ask] = []
    for task, count in counts.items():
        if count:
            planted, asked = PLANTERS[task](draw, count)
            facts += planted
            asks += asked
    parts = 0
    if counts.get("which_document"):
        parts = min(40, max(2, target_tokens // rng.randint(160, 400)))
    # Paragraph breaks cost one token for about every sixth sentence, headings a fixed number.
    frame = count_tokens("\n\nEnd of document 10.") + count_tokens("\n\nDocument 10:\n\n")
    budget = target_tokens - 8 - parts * frame - sum(count_tokens(" " + f) for f in facts)
    budget -= len(facts) // 4 + max(budget, 0) // 100
    if budget < 0:
        raise ValueError(f"{target_tokens} tokens are too few for {len(facts)} facts")
    title, sentences = texts[rng.choices(range(len(texts)), [len(t[1]) for t in texts])[0]]
    mixed = _mix(rng, facts, _filler(rng, sentences, budget, count_tokens))
    pieces, where = _number(rng, mixed, min(parts, len(mixed)))
    return DocumentDraft(title, tuple(pieces), tuple(ask.item(where) for ask in asks))


def make_document(
    seed: int,
    target_tokens: int,
    count_tokens: Callable[[str], int],
    questions_per_task: int,
    tasks: Sequence[str] = TASKS,
    split: str = "test",
) -> Document:
    """Make the document of this seed, in filler text that the demo model never saw.

    ``count_tokens`` counts the tokens of a text without any special ones; the text has just
    under ``target_tokens`` of them. ``split`` says whether names and values are those held out
    from training.
    """
    rng = random.Random(f"{split}-{seed}")
    counts = dict.fromkeys(tasks, questions_per_task)
    draft = compose(rng, split, counts, target_tokens, count_tokens, load_books())
    questions = tuple(item.question for item in draft.items)
    return Document(draft.title, "".join(draft.pieces), questions)


def prompt(text: str, question: str) -> str:
    """The text of a user message: the document first, so that questions share a prefix."""
    return f"{text}\n\n{question}"


def messages(document: Document, question: Question) -> list[dict[str, str]]:
    """The chat that asks one question about a document."""
    return [{"role": "user", "content": prompt(document.text, question.text)}]


def is_correct(question: Question, reply: str) -> bool:
    """Whether the reply holds the right value and no other value of its kind."""
    if question.answer.isdigit():
        found = set(re.findall(r"\d+", reply))
    else:
        found = {" ".join(pair) for pair in PHRASE.findall(reply)}
    return found == {question.answer}
