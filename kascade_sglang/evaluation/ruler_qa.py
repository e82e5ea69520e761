"""RULER's question answering: the passage that answers a question, among many others.

Passages come from a file in SQuAD's format, as in RULER, or are invented: buildings with a
builder, a year, a town and a treasure, told apart by their names, between sentences of the
bundled books.
"""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import haystack
from kascade_sglang.evaluation.data_files import parse_json, read_text
from kascade_sglang.evaluation.fitting import Draft, fitted_sample
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.scorers import string_match_part
from kascade_sglang.text.words import ADJECTIVES, FIRST_NAMES, LAST_NAMES, NOUNS

MAX_TOKENS = 32
ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question}"
)
PREFIX = "Answer:"
BUILDINGS = (
    "Abbey Academy Arcade Archive Barn Brewery Bridge Castle Chapel College Court Customs-House "
    "Dairy Exchange Foundry Gallery Granary Hall Hospital Inn Library Lighthouse Manor Market Mill "
    "Museum Observatory Palace Pavilion School Station Theatre Tower Viaduct Windmill Works"
).split()
TOWN_ENDINGS = "bury dale field ford ham haven mouth stead ton wick".split()
TALE_SENTENCES = 5


@dataclass(frozen=True)
class Asked:
    """A question, its answers, the passage that holds them, and passages of the same article."""

    question: str
    answers: tuple[str, ...]
    passage: int
    related: tuple[int, ...]


@dataclass(frozen=True)
class Collection:
    """Passages and questions about them."""

    passages: tuple[str, ...]
    questions: tuple[Asked, ...]


def _invented_passage(rng: random.Random, name: str) -> tuple[str, list[tuple[str, str]]]:
    """A passage about a building, and (question, answer) pairs."""
    builder = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    year = str(rng.randint(1500, 1899))
    town = rng.choice(LAST_NAMES) + rng.choice(TOWN_ENDINGS)
    treasure = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    tale = " ".join(haystack.sentences(rng, TALE_SENTENCES))
    text = (
        f"The {name} was built by {builder} in {year}. It stands in the town of {town}. {tale} "
        f"Visitors come to the {name} to see its {treasure}."
    )
    asked = [
        (f"Who built the {name}?", builder),
        (f"In which year was the {name} built?", year),
        (f"In which town does the {name} stand?", town),
        (f"What do visitors come to see at the {name}?", treasure),
    ]
    return text, asked


def invented() -> Collection:
    """All 2,160 invented passages and their questions; always the same."""
    rng = random.Random("passages")
    names = [f"{first} {kind}" for first in LAST_NAMES for kind in BUILDINGS]
    rng.shuffle(names)
    passages, questions = [], []
    for place, name in enumerate(names):
        text, pairs = _invented_passage(rng, name)
        passages.append(text)
        questions += [Asked(question, (answer,), place, ()) for question, answer in pairs]
    return Collection(tuple(passages), tuple(questions))


def read_squad(path: Path) -> Collection:
    """Read a file in SQuAD's format (1.1 or 2.0), without its unanswerable questions.

    Raises EvaluationError where the file is missing, malformed or holds no question.
    """
    where = f"--squad {path}"
    content = parse_json(read_text(path, where), where)
    try:
        passages: dict[str, int] = {}
        questions = []
        for article in content["data"]:
            texts = [_text(paragraph["context"]) for paragraph in article["paragraphs"]]
            places = [passages.setdefault(text, len(passages)) for text in texts]
            for paragraph, place in zip(article["paragraphs"], places, strict=True):
                related = tuple(sorted(set(places) - {place}))
                questions += [
                    Asked(_text(qa["question"]), _texts(qa["answers"]), place, related)
                    for qa in paragraph["qas"]
                    if not qa.get("is_impossible") and qa["answers"]
                ]
    except (KeyError, TypeError, AttributeError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else f"another ({error})"
        raise EvaluationError(
            f"{where}: expected SQuAD's format (data, paragraphs, context, qas, question, "
            f"answers, text), got {got}"
        ) from error
    if not questions:
        raise EvaluationError(f"{where}: holds no answerable question")
    return Collection(tuple(passages), tuple(questions))


def _texts(answers: list[dict[str, object]]) -> tuple[str, ...]:
    return tuple(_text(answer["text"]) for answer in answers)


def _text(value: object) -> str:
    """The text; raises TypeError for anything else and for "", which every reply would hold."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} where a text should be")
    return value


def _draft(collection: Collection, asked: Asked, seed: str, size: int) -> Draft:
    """The question over ``size`` passages; those of its article come first, as in RULER."""
    rng = random.Random(seed)
    related = rng.sample(asked.related, min(size - 1, len(asked.related)))
    taken = {asked.passage, *asked.related}
    others = [place for place in range(len(collection.passages)) if place not in taken]
    wanted = size - 1 - len(related)
    if wanted > len(others):
        raise EvaluationError(
            f"{len(collection.passages)} passages are too few; give a larger --squad file"
        )
    chosen = [asked.passage, *related, *rng.sample(others, wanted)]
    rng.shuffle(chosen)
    context = "\n\n".join(
        f"Document {number}:\n{collection.passages[place]}"
        for number, place in enumerate(chosen, 1)
    )
    return Draft(ASK.format(context=context, question=asked.question), PREFIX, asked.answers)


def _make(load: partial[Collection], order: Order) -> list[Sample]:
    collection = load()
    rng = random.Random(f"qa-{order.seed}")
    count = min(order.count, len(collection.questions))
    samples = []
    chosen = rng.sample(collection.questions, count)
    for index, asked in zip(order.numbers(count), chosen, strict=True):
        seed = f"qa-{order.length}-{order.seed}-{index}"
        build = partial(_draft, collection, asked, seed)
        samples.append(fitted_sample("qa", build, string_match_part, MAX_TOKENS, 1, order))
    return samples


def qa_task(squad: Path | None) -> Task:
    """RULER's ``qa_1``, over a SQuAD file or the invented passages."""
    load = partial(read_squad, squad) if squad else partial(invented)
    data = squad.name if squad else "generated"
    return Task("qa", partial(_make, load), True, "string_match", data)
