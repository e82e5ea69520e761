"""Counting tokens as the server does, with its tokenizer."""

from pathlib import Path
from typing import Any

from kascade_sglang.errors import EvaluationError

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Tokens:
    """A tokenizer, and what its chat template adds to a message.

    tokenizer: of transformers, or anything with its ``encode`` and ``decode``.
    overhead: tokens that the chat template adds to one message, 0 where there is none.
    start: the token that texts without a template start with, if the model uses one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.overhead = self._template_tokens()
        first = tokenizer.encode("")[:1]
        bos = getattr(tokenizer, "bos_token_id", None)
        self.start = first if bos is not None and first == [bos] else []

    @classmethod
    def load(cls, path: str) -> "Tokens":
        """Load a tokenizer from a folder or a Hugging Face id; raises EvaluationError."""
        if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in FILES):
            raise EvaluationError(
                f"--tokenizer {path}: a folder without a tokenizer; give that of the served model"
            )
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of texts longer than the model's context
        try:
            return cls(AutoTokenizer.from_pretrained(path))
        except (OSError, ValueError, KeyError) as error:
            raise EvaluationError(
                f"--tokenizer {path}: cannot be loaded; give the folder of the served model"
            ) from error

    def count(self, text: str) -> int:
        """Tokens of a text without special ones."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special ones."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _template_tokens(self) -> int:
        if not getattr(self._tokenizer, "chat_template", None):
            return 0
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
        )
        return self.count(text) - self.count("x")

    def cut_middle(self, text: str, limit: int) -> tuple[str, bool]:
        """Keep both ends of a text of more than ``limit`` tokens; also say whether it was cut."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return text, False
        half = limit // 2
        return self.decode(ids[:half]) + self.decode(ids[len(ids) - half :]), True
