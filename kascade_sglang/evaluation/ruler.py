"""RULER's tasks (arXiv 2404.06654), made offline to a length in tokens.

Prompts, starts of replies, reply lengths and scores are RULER's; so are the parameters of every
task. Three things differ. The essays are the bundled books, from a random place for every sample;
the word lists come from them too. The shuffles that RULER repeats in every sample depend on the
sample. And keys are never drawn twice.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import haystack
from kascade_sglang.evaluation.fitting import Draft, fitted_sample
from kascade_sglang.evaluation.ruler_words import common_words, frequent_words, variable_tracking
from kascade_sglang.evaluation.samples import Order, Sample, Task
from kascade_sglang.evaluation.scorers import string_match_all

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
SEVERAL_PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
ONE_PREFIX = "The special magic {kind} for {query} mentioned in the provided text is"
DEPTHS = 40
"""Evenly spaced places of a text, both ends included, that needles are put at."""
DRAW = {"words": haystack.name, "numbers": haystack.number, "uuids": haystack.uuid}

Builder = Callable[[random.Random, int, Order], Draft]
"""(source of chance, size, order) -> prompt; size counts what is repeated to make it long."""


@dataclass(frozen=True)
class Needles:
    """One needle task: what hides the needles, what they are made of, and how many there are."""

    hay: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    values_per_key: int = 1
    queries: int = 1


NEEDLE_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("book"),
    "niah_single_3": Needles("book", values="uuids"),
    "niah_multikey_1": Needles("book", key_count=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("book", values_per_key=4),
    "niah_multiquery": Needles("book", key_count=4, queries=4),
}


def _distinct(rng: random.Random, kind: str, count: int, used: set[str]) -> list[str]:
    """Draw keys or values that are not in ``used``, and note them there."""
    drawn: list[str] = []
    for _ in range(100 * count + 1000):
        if len(drawn) == count:
            return drawn
        text = DRAW[kind](rng)
        if text not in used:
            used.add(text)
            drawn.append(text)
    raise EvaluationError(f"--lengths: too long, no {count} different {kind} are left for needles")


def _hide(rng: random.Random, hay: list[str], needles: list[str], glue: str) -> str:
    """Put needles between the pieces of a text: anywhere, or in books at one of 40 depths."""
    if glue == " ":
        depths = rng.sample(range(DEPTHS), len(needles))
        places = sorted(len(hay) * depth // (DEPTHS - 1) for depth in depths)
    else:
        places = sorted(rng.sample(range(len(hay)), len(needles)))
    pieces, done = [], 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*hay[done:place], needle]
        done = place
    return glue.join([*pieces, *hay[done:]])


def needle_draft(kind: Needles, rng: random.Random, size: int, order: Order) -> Draft:
    """A prompt of ``size`` pieces of hay: sentences, or lines of noise or false needles."""
    used: set[str] = set()
    keys = _distinct(rng, kind.keys, kind.key_count, used)
    values = {key: _distinct(rng, kind.values, kind.values_per_key, used) for key in keys}
    needle = partial(NEEDLE.format, kind=kind.values)
    needles = [needle(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    queries = rng.sample(keys, kind.queries)
    if kind.hay == "book":
        context = _hide(rng, haystack.sentences(rng, size), needles, " ")
    elif kind.hay == "noise":
        context = _hide(rng, [haystack.NOISE] * size, needles, "\n")
    else:
        false_keys = _distinct(rng, kind.keys, size, used)
        false_values = _distinct(rng, kind.values, size, used)
        pairs = zip(false_keys, false_values, strict=True)
        hay = [needle(key=key, value=value) for key, value in pairs]
        context = _hide(rng, hay, needles, "\n")
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    answers = tuple(value for key in queries for value in values[key])
    several = len(answers) > 1
    words = {"kind": kind.values if several else kind.values.removesuffix("s"), "query": query}
    return Draft(
        (SEVERAL if several else ONE).format(context=context, **words),
        (SEVERAL_PREFIX if several else ONE_PREFIX).format(**words),
        answers,
    )


def make_samples(
    name: str, build: Builder, max_tokens: int, smallest: int, order: Order
) -> list[Sample]:
    """Samples whose prompt, chat template and longest reply have just under ``order.length``."""
    samples = []
    for index in order.numbers():
        seed = f"{name}-{order.length}-{order.seed}-{index}"

        def draft(size: int, seed: str = seed) -> Draft:
            return build(random.Random(seed), size, order)

        made = fitted_sample(name, draft, string_match_all, max_tokens, smallest, order)
        samples.append(made)
    return samples


def ruler_tasks() -> list[Task]:
    """All of RULER's tasks but its question answering, under its names."""
    builders: list[tuple[str, Builder, int, int]] = [
        (name, partial(needle_draft, kind), 128, 5) for name, kind in NEEDLE_TASKS.items()
    ]
    builders += [
        ("vt", variable_tracking, 30, 5),
        ("cwe", common_words, 120, 20),
        ("fwe", frequent_words, 50, 100),
    ]
    return [
        Task(name, partial(make_samples, name, build, max_tokens, smallest), True, "string_match")
        for name, build, max_tokens, smallest in builders
    ]
