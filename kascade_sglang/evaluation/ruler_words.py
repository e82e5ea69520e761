"""RULER's variable tracking, common words and frequent words, as builders of prompts."""

import math
import random
import string

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation import haystack
from kascade_sglang.evaluation.fitting import Draft, longest
from kascade_sglang.evaluation.samples import Order

TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
TRACK_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
COMMON_COUNT = 10

FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = (
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
CODED_LETTERS = 6
ALPHA = 2.0
ZETA = math.pi**2 / 6
"""Riemann's zeta function at ALPHA."""
SHORT = 4096
"""Tokens below which RULER repeats words less often."""


def _letters(rng: random.Random, alphabet: str, length: int, count: int) -> list[str]:
    """``count`` different random words."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(alphabet, k=length))] = None
    return list(drawn)


def _chain(rng: random.Random, size: int, letters: int) -> Draft:
    """One chain of assignments, in order, between ``size`` lines of noise."""
    names = _letters(rng, string.ascii_uppercase, letters, HOPS + 1)
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:], strict=False)]
    lines = [haystack.NOISE] * size
    for step, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
        lines.insert(place + step, chain[step])
    prompt = TRACK.format(context="\n".join(lines), value=value)
    return Draft(prompt, TRACK_PREFIX.format(count=HOPS + 1, value=value), tuple(names))


def variable_tracking(rng: random.Random, size: int, order: Order) -> Draft:
    """One solved example of at most 500 tokens, then the question over ``size`` lines of noise."""
    seed = rng.getrandbits(64)
    example, _ = longest(
        lambda lines: _chain(random.Random(seed), lines, letters=3),
        order.tokens.count,
        min(EXAMPLE_TOKENS, order.length // 2),
        HOPS + 1,
    )
    solved = f"{example.prompt} {example.prefix} {' '.join(example.answers)}\n\n"
    asked = _chain(rng, size, letters=5)
    return Draft(solved + asked.prompt, asked.prefix, asked.answers)


def _word_list(
    rng: random.Random, size: int, common_repeats: int, other_repeats: int
) -> tuple[str, list[str]]:
    """A numbered, shuffled list of ``size`` different words, ten of which are repeated more."""
    pool = haystack.plain_words()
    if size > len(pool):
        raise EvaluationError(
            f"the bundled word list has {len(pool)} words, {size} would be needed; ask for less"
        )
    words = rng.sample(pool, size)
    common = words[:COMMON_COUNT]
    listed = common * common_repeats + words[COMMON_COUNT:] * other_repeats
    rng.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def common_words(rng: random.Random, size: int, order: Order) -> Draft:
    """One solved example, then the question over a list of ``size`` different words."""
    short = order.length < SHORT
    example, example_answer = _word_list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    context, common = _word_list(rng, size, *((6, 1) if short else (30, 3)))
    solved = f"{COMMON.format(context=example)} {COMMON_PREFIX} {_numbered(example_answer)}\n"
    return Draft(solved + COMMON.format(context=context), COMMON_PREFIX, tuple(common))


def frequent_words(rng: random.Random, size: int, order: Order) -> Draft:
    """About ``size`` coded words whose counts fall with the square of their rank.

    The most frequent one is a row of dots, to be ignored.
    """
    # RULER sizes the vocabulary by the tokens that are left for the prompt.
    vocabulary = max(10, (order.length - order.tokens.overhead - 50) // 50)
    words = ["...", *_letters(rng, string.ascii_lowercase, CODED_LETTERS, vocabulary - 1)]
    coded = [
        word for rank, word in enumerate(words, 1) for _ in range(int(size * rank**-ALPHA / ZETA))
    ]
    rng.shuffle(coded)
    return Draft(FREQUENT.format(context=" ".join(coded)), FREQUENT_PREFIX, tuple(words[1:4]))
