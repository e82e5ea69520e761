"""The project's Markdown: files, blocks of code, links and headings."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
"""Stands before an example that a test cannot run, and says why."""


def documents() -> list[Path]:
    """Every Markdown file that is the project's own."""

    def ours(path: Path) -> bool:
        folders = path.relative_to(ROOT).parts[:-1]
        return not any(
            (name.startswith(".") and name != ".github") or name in ("build", "dist")
            for name in folders
        )

    return sorted(path for path in ROOT.rglob("*.md") if ours(path))


class Block(NamedTuple):
    """A fenced block of code. before: the text that stands between it and the block before."""

    language: str
    text: str
    line: int
    before: str


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a document."""
    end = 0
    for fence in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        indent, language, code = fence.groups()
        lines = [line.removeprefix(indent) for line in code.splitlines(keepends=True)]
        line = text.count("\n", 0, fence.start()) + 2
        yield Block(language, "".join(lines), line, text[end : fence.start()])
        end = fence.end()


def without_blocks(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def prose(text: str) -> str:
    """A document without fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def links(text: str) -> list[str]:
    """Targets of links and images, as they stand in the text."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """Anchors that GitHub makes of a document's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_blocks(text), re.M):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return set(found)
