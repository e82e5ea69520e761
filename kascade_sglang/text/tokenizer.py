"""Tokenizers of transformers."""

from typing import TYPE_CHECKING

from kascade_sglang.text.reading import UnreadableError, cause

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        raise UnreadableError(cause(error, path)) from error
