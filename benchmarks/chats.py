"""Long chats to calibrate on: documents of this machine, then questions whose answers they hold.

The documents are Python's own source files and the prose that Debian packages bring, so nothing of
them is in a benchmark's haystack. ``python -m benchmarks.chats --tokenizer M --out chats.jsonl``.
"""

import argparse
import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kascade_sglang.calibration.chats import chat_about

DOC_FOLDERS = (Path("/usr/share/doc"), Path("/usr/share/perl"))
LENGTHS = (8192, 8192, 12288, 16384)
"""Tokens of the chats that are made where nobody says otherwise."""
PIECE_CHARACTERS = 6000
"""Most of one document; a chat has many."""


@dataclass(frozen=True)
class Document:
    """A titled text, and the questions that it answers: (question, answer)."""

    title: str
    text: str
    asked: tuple[tuple[str, str], ...]


def python_documents(rng: random.Random) -> Iterator[Document]:
    """Pieces of the standard library, with questions about their functions; without end."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        path = rng.choice(files)
        text = path.read_text(errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines()
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        if not functions:
            continue
        first = rng.choice(functions).lineno - 1
        last = first
        while last < len(lines) and len("\n".join(lines[first:last])) < PIECE_CHARACTERS:
            last += 1
        mine = [f for f in functions if first < f.lineno and (f.end_lineno or 0) <= last]
        asked = tuple(pair for node in mine for pair in _about(node, lines, path.name))
        if asked:
            yield Document(path.name, "\n".join(lines[first:last]), asked)


def _about(node: ast.FunctionDef, lines: list[str], title: str) -> Iterator[tuple[str, str]]:
    where = f"`{node.name}` in {title}"
    yield f"What is the line that begins the definition of {where}?", lines[node.lineno - 1].strip()
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"How does the docstring of {where} begin?", docstring.splitlines()[0]
    end = min(node.end_lineno or node.lineno, node.lineno + 8)
    yield f"Quote the definition of {where}.", "\n".join(lines[node.lineno - 1 : end])


def prose_documents(rng: random.Random) -> Iterator[Document]:
    """Pieces of packages' documents, with questions about what follows a sentence; may be empty."""
    files = sorted(
        path
        for folder in DOC_FOLDERS
        for path in folder.rglob("*")
        if path.suffix in (".gz", ".txt", ".md", ".pod") or path.name in ("README", "copyright")
    )
    while files:
        path = rng.choice(files)
        try:
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", errors="replace") as file:
                text = file.read(40 * PIECE_CHARACTERS)
        except OSError:
            files.remove(path)
            continue
        first = rng.randrange(max(1, len(text) - PIECE_CHARACTERS))
        piece = text[first : first + PIECE_CHARACTERS]
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", piece) if 40 < len(s) < 300]
        if len(sentences) < 4 or len(set(piece)) > 200:
            files.remove(path)
            continue
        title = f"{path.parent.name}/{path.name}"
        asked = tuple(
            (f"In {title}, what does the text say right after: {a!r}?", b)
            for a, b in zip(sentences, sentences[1:], strict=False)
        )
        yield Document(title, piece, asked)


def make_chat(rng: random.Random, length: int, count: Callable[[str], int]) -> list[dict[str, str]]:
    """Messages of about ``length`` tokens: documents and a question, then more questions."""
    code, prose = python_documents(rng), prose_documents(rng)
    documents, tokens = [], 0
    while tokens < length - 1500:
        document = next(prose if rng.random() < 0.4 else code, None) or next(code)
        documents.append(document)
        tokens += count(document.text) + 12
    text = "\n\n".join(f"### {document.title}\n{document.text}" for document in documents)
    return chat_about(rng, text, [pair for document in documents for pair in document.asked])


def write_chats(tokenizer: str, lengths: tuple[int, ...], out: Path, seed: int = 0) -> None:
    """Write one chat a line, as ``kascade calibrate --prompts`` reads them."""
    from kascade_sglang.calibration.hf_model import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    rng = random.Random(seed)
    with open(out, "w") as file:
        for length in lengths:
            messages = make_chat(rng, length, lambda text: len(loaded.encode(text)))
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Write chats to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder or Hugging Face id of the model")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_chats(options.tokenizer, tuple(options.lengths), options.out, options.seed)


if __name__ == "__main__":
    main()
