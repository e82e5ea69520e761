"""Links between the documents: the file exists, and the heading in it, too. Offline."""

from pathlib import Path

import pytest

from tests.support.documents import ROOT, anchors, documents, links


def broken(path: Path) -> list[str]:
    """Return the links of a document that lead nowhere in this repository."""
    found = []
    for link in links(path.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# It's `one` thing\n\n## Twice\n\n## Twice\n\n```\n# no\n```\n")
    right = ("b.md", "b.md#its-one-thing", "b.md#twice-1", "#here", "https://x.org/none")
    wrong = ("c.md", "b.md#no", "b.md#twice-2", "#there")
    page = tmp_path / "a.md"
    text = "\n".join(f"[text]({link})" for link in (*right, *wrong))
    page.write_text(f"# Here\n\n`[code](none.md)`\n\n{text}\n")
    assert broken(page) == list(wrong)


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = set(links((ROOT / "README.md").read_text()))
    guides = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert guides <= linked and len(guides) >= 9
