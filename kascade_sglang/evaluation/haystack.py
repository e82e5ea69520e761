"""Text that needles are hidden in: the bundled books, RULER's noise, and word lists."""

import random
import re
from functools import lru_cache

from kascade_sglang.text.books import load_books
from kascade_sglang.text.words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@lru_cache(maxsize=1)
def book() -> tuple[str, ...]:
    """Sentences of the bundled books, about 70,000 words."""
    return tuple(sentence for _, sentences in load_books() for sentence in sentences)


def sentences(rng: random.Random, count: int) -> list[str]:
    """Consecutive sentences from a random place of the bundled books, which repeat if need be."""
    lines = book()
    place = rng.randrange(len(lines))
    return [lines[(place + step) % len(lines)] for step in range(count)]


@lru_cache(maxsize=1)
def plain_words() -> tuple[str, ...]:
    """Lower-case English words of 4 to 10 letters: about 8,000, those of the bundled books."""
    found = {word for line in book() for word in re.findall(r"\b[a-z]{4,10}\b", line)}
    return tuple(sorted(found))


def name(rng: random.Random) -> str:
    """An adjective and a noun: one of 26,000 keys."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(1_000_000, 9_999_999))


def uuid(rng: random.Random) -> str:
    """A random UUID of version 4."""
    bits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(bits[16], 16) % 4]
    return f"{bits[:8]}-{bits[8:12]}-4{bits[13:16]}-{variant}{bits[17:20]}-{bits[20:]}"
