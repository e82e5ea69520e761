"""The exceptions for input that Kascade refuses: what the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class KascadeError(ValueError):
    """Refused input; the message is one sentence: name, expected, got, how to fix."""


@contextmanager
def noted(refused: list[str]) -> Iterator[None]:
    """Note what a block refuses, instead of raising it: what follows may be refused, too."""
    try:
        yield
    except KascadeError as error:
        refused.append(str(error))


MOST_CHARACTERS = 700
"""Of a sentence on a terminal: what was refused may itself be of any length."""


def sentence(error: BaseException | str) -> str:
    """Return an error's message as people are shown it: one line, printable, its middle cut out."""
    text = " ".join(str(error).split())
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def lines(error: BaseException) -> str:
    """Return the message of an error that holds a sentence a line."""
    return "\n".join(map(sentence, str(error).split("\n")))


class CalibrationError(KascadeError):
    """A model, prompt file or option that cannot be calibrated with; the message says why."""


class EvaluationError(KascadeError):
    """A task, file, option or server that cannot be evaluated with; the message says why."""
