"""Build the filler texts from Debian packages: training books, and other books held out.

Run as ``python -m kascade_sglang.demo.recipe.corpus --work DIR`` on a Debian system with
``apt-get``, ``dpkg`` and network access. Writes ``DIR/train.txt.gz`` (stays out of the
repository) and ``text/data/books.txt.gz`` (public-domain text only, shipped). Each file has
one sentence a line; a line starting with ``#`` names the text that follows.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import re
import subprocess
import tarfile
from pathlib import Path

from kascade_sglang.text.books import SHIPPED

TRAIN_PACKAGES = (
    "bible-kjv",
    "bible-kjv-text",
    "dict-jargon",
    "golang-1.19-src",
    "anarchism",
)
HELD_OUT_PACKAGE = "dict-devil"
HELD_OUT_SOURCE = "snappy"
SUITE = "deb-src http://deb.debian.org/debian bookworm main"

ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": " - ",
        "\u2026": "...",
        "\u00a0": " ",
        "`": "'",
        "_": "",
        "{": "",
        "}": "",
    }
)
SENTENCE_END = re.compile(r"(?<=[.!?;:])[\"')]*\s+(?=[\"'(]?[A-Z])")
ORDINARY = re.compile(r"[A-Z\"'(][A-Za-z0-9 ,.;:!?'\"()-]*[.!?\"')]")


class _TextOfHtml(html.parser.HTMLParser):
    """Collects the running text of paragraphs, leaving out code and headings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.depth = 0
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.depth += 1
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self.depth:
            self.depth -= 1

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.parts.append(data)


def text_of_html(page: str) -> str:
    """The paragraphs of an HTML page."""
    parser = _TextOfHtml()
    parser.feed(page)
    return "".join(parser.parts)


def sentences(text: str) -> list[str]:
    """Split plain text into ordinary English sentences, dropping whatever looks odd.

    Sentences with long numbers go too: a four-digit number is what the planted facts hold.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text.translate(ASCII)):
        for piece in SENTENCE_END.split(" ".join(paragraph.split())):
            ordinary = piece.isascii() and ORDINARY.fullmatch(piece)
            if ordinary and 25 <= len(piece) <= 320 and not re.search(r"\d{3,}", piece):
                found.append(piece)
    return found


def unpack(package: str, work: Path) -> Path:
    """Download a binary package and unpack it under ``work``."""
    target = work / package
    if not target.exists():
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        deb = next(work.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)
    return target


def unpack_source(package: str, work: Path) -> Path:
    """Download a source package (its original tarball) and unpack it under ``work``."""
    target = work / f"{package}-source"
    if not target.exists():
        (work / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (work / "source.list").write_text(SUITE + "\n")
        apt = ["apt-get", "-o", f"Dir::Etc::sourcelist={work / 'source.list'}"]
        apt += ["-o", "Dir::Etc::sourceparts=-", "-o", f"Dir::State::Lists={work / 'lists'}"]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "source", "--download-only", package], cwd=work, check=True)
        with tarfile.open(next(work.glob(f"{package}_*.orig.tar.*"))) as archive:
            archive.extractall(target, filter="data")
    return target


def bible(work: Path) -> str:
    """The King James Bible, printed by the package's own reader, without verse numbers."""
    data = unpack("bible-kjv-text", work) / "usr/lib"
    reader = unpack("bible-kjv", work) / "usr/bin/bible"
    command = [str(reader), "-f", "-p", str(data), "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    verses = re.sub(r"^\S*\d+:\d+ ", "", printed.decode("latin-1"), flags=re.M)
    return verses.replace("[", "").replace("]", "")


def dictionary(root: Path, name: str) -> str:
    """The text of a dictd dictionary (dictzip is gzip)."""
    packed = (root / f"usr/share/dictd/{name}.dict.dz").read_bytes()
    return gzip.decompress(packed).decode("utf-8", "replace")


def pages(root: Path, pattern: str) -> str:
    """The text of every HTML page below ``root`` that matches ``pattern``."""
    found = sorted(root.glob(pattern))
    return "\n\n".join(text_of_html(page.read_text("utf-8", "replace")) for page in found)


def write(path: Path, texts: dict[str, str]) -> None:
    """Write titled sentences, gzip-compressed without a time stamp."""
    lines = []
    for title, text in texts.items():
        kept = sentences(text)
        lines += [f"# {title}", *kept]
        print(f"{title}: {len(kept)} sentences, {sum(map(len, kept))} characters")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode("ascii"), 9, mtime=0))


def main() -> None:
    """Fetch the packages and write both filler files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    root = {name: unpack(name, work) for name in (*TRAIN_PACKAGES, HELD_OUT_PACKAGE)}
    opticks = root["golang-1.19-src"] / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
    train = {
        "King James Bible": bible(work),
        "Opticks": opticks.read_text("utf-8"),
        "Jargon File": dictionary(root["dict-jargon"], "jargon"),
        "Anarchist FAQ": pages(root["anarchism"], "**/*.html"),
    }
    write(work / "train.txt.gz", train)
    alice = next(unpack_source(HELD_OUT_SOURCE, work).glob("*/testdata/alice29.txt"))
    held_out = {
        "Alice's Adventures in Wonderland": alice.read_text("latin-1"),
        "The Devil's Dictionary": dictionary(root[HELD_OUT_PACKAGE], "devil"),
    }
    write(SHIPPED, held_out)


if __name__ == "__main__":
    main()
