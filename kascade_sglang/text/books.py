"""Books: the real English text that facts are planted in."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent / "data" / "books.txt.gz"


@lru_cache(maxsize=4)
def load_books(path: Path = SHIPPED) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read (title, sentences) of every text in a file of one sentence a line.

    A line that starts with ``# `` holds the title of the text that follows. The shipped file
    holds books that the model was not trained on.
    """
    texts: list[tuple[str, list[str]]] = []
    with gzip.open(path, "rt", encoding="ascii") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if line.startswith("# "):
                texts.append((line[2:], []))
            else:
                texts[-1][1].append(line)
    return tuple((title, tuple(found)) for title, found in texts)
