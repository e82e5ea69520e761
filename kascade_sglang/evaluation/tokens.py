"""Counting tokens as the server does, with its tokenizer."""

import os
from collections.abc import Mapping
from typing import Any

from kascade_sglang.errors import EvaluationError
from kascade_sglang.text.reading import UnreadableError, one_line
from kascade_sglang.text.tokenizer import load_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Tokens:
    """A tokenizer, and what its chat template adds to a message.

    tokenizer: of transformers, or anything with its ``encode`` and ``decode``.
    template: what the chat template is given, besides messages.
    overhead: tokens that the chat template adds to one message, 0 where there is none.
    start: the token that texts without a template start with, if the model uses one.
    """

    def __init__(self, tokenizer: Any, template: Mapping[str, Any] | None = None) -> None:
        self._tokenizer, self._template = tokenizer, dict(template or {})
        self.overhead = self._template_tokens()
        first = tokenizer.encode("")[:1]
        bos = getattr(tokenizer, "bos_token_id", None)
        self.start = first if bos is not None and first == [bos] else []

    @classmethod
    def load(
        cls, path: str, template: Mapping[str, Any] | None = None, trust_remote_code: bool = False
    ) -> "Tokens":
        """Load a tokenizer from a folder or a Hugging Face id; raises EvaluationError.

        trust_remote_code: whether code that comes with it may run.
        """
        if os.path.isdir(path) and not any(os.path.isfile(f"{path}/{name}") for name in FILES):
            raise EvaluationError(
                f"--tokenizer {path}: a folder without a tokenizer; give that of the served model"
            )
        from transformers.utils import logging

        logging.set_verbosity_error()  # it warns of texts longer than the model's context
        try:
            tokenizer = load_tokenizer(path, trust_remote_code)
        except UnreadableError as error:
            raise EvaluationError(
                f"--tokenizer {path}: cannot be loaded ({error}); give that of the served model"
            ) from error
        return cls(tokenizer, template)

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
        # Templates are programs of their own: their errors are of any type.
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}],
                add_generation_prompt=True,
                tokenize=False,
                **self._template,
            )
        except Exception as error:
            raise EvaluationError(
                f"--tokenizer: its chat template refuses one message of a user "
                f"({one_line(error)}); --prompt completion needs no template"
            ) from error
        return self.count(text) - self.count("x")

    def cut_middle(self, text: str, limit: int) -> tuple[str, bool]:
        """Keep both ends of a text of more than ``limit`` tokens; also say whether it was cut."""
        ids = self.encode(text)
        if len(ids) <= limit:
            return text, False
        half = limit // 2
        return self.decode(ids[:half]) + self.decode(ids[len(ids) - half :]), True
