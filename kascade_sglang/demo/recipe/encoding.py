"""Tokenise pieces of training text fast, with the same result as the tokenizer itself.

BPE never merges across the pieces that the pre-tokeniser cuts, so each distinct piece is
tokenised once and kept. That makes training rows in plain Python faster than the GPU uses
them.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

# The pre-tokeniser's pattern, in the syntax that Python and the tokenizers library share.
PIECE = r" ?[^\W\d_]+| ?\d{1,2}| ?[^\s\w]+| ?_+|\s*\n+|\s+"


class Encoder:
    """Encodes text without special tokens; remembers pieces, and sentences on request."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.pattern = re.compile(PIECE)
        self.pieces: dict[str, tuple[int, ...]] = {}
        self.sentences: dict[str, tuple[int, ...]] = {}

    def special(self, token: str) -> int:
        """The id of a special token."""
        return self.tokenizer.token_to_id(token)

    def _piece(self, piece: str) -> tuple[int, ...]:
        """The ids of one pre-tokeniser piece."""
        ids = self.pieces.get(piece)
        if ids is None:
            ids = self.pieces[piece] = tuple(self.tokenizer.encode(piece).ids)
        return ids

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of any text that starts and ends at a piece boundary."""
        ids = self.sentences.get(text)
        if ids is None:
            ids = tuple(chain.from_iterable(map(self._piece, self.pattern.findall(text))))
        return ids

    def remember(self, text: str) -> None:
        """Keep the ids of a text that will come again."""
        self.sentences[text] = self.encode(text)

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode(text))
