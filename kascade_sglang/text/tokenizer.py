"""Tokenizers of transformers, and what to say where a library cannot read a model's files."""

from typing import TYPE_CHECKING

from kascade_sglang.errors import KascadeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 300


class UnreadableError(KascadeError):
    """Files that a library cannot read; the message is the cause, a part of a sentence."""


def one_line(error: BaseException) -> str:
    """Return a library's message, which may run over many lines, as a part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def cause(error: BaseException) -> str:
    """Return why a library cannot read files, and the flag that would help, if one does."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; --trust-remote-code runs that, if you trust it"
    return one_line(error)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or a Hugging Face id.

    trust_remote_code: whether code that comes with it may run; never asked for on a terminal.
    Raises UnreadableError.
    """
    from transformers import AutoTokenizer

    # Files of others, and their code where it is trusted, raise errors of any type.
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UnreadableError(cause(error)) from error
