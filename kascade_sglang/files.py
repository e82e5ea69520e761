"""Write files that a full disk or a lost process leaves readable."""

import csv
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST_NAME = 235
"""Bytes of a file's name: of the 255 that file systems take, less what stands beside it adds."""


def expand(name: str) -> Path:
    """Return the path that a user has named, ``~`` read as a shell reads it.

    What is asked of a path is asked of ``os.path``, which answers no for names that no system
    takes, too long or in circles, where ``Path`` raises.
    """
    return Path(os.path.expanduser(name))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one step, through a neighbouring ``.part`` file.

    Of a link, what it points to. Raises OSError, with the old file untouched and the draft removed.
    """
    path = Path(os.path.realpath(path))
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            # Some file systems report a full disk no earlier than here.
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def why_unwritable(path: Path, others: Mapping[str, Path | None] | None = None) -> str | None:
    """Say why no file can be written at a path and how to fix it; None where it can.

    others: files that it may not replace, by the names that the user knows them by.
    """
    for name, other in (others or {}).items():
        if other is not None and os.path.realpath(other) == os.path.realpath(path):
            return f"expected a file of its own, got that of {name}; name another"
    if os.path.islink(path):
        path = Path(os.path.realpath(path))
    if os.path.isdir(path):
        return "expected a file's name, got a folder; add a name"
    if os.path.exists(path) and not os.path.isfile(path):
        return "expected a file, got a device or pipe, which would be replaced; name another"
    if not os.path.isdir(path.parent):
        return f"expected a folder that exists, got {path.parent}; make it first"
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        return f"expected a name of at most {LONGEST_NAME} bytes, got a longer one; shorten it"
    try:
        # What may be written is not always what can be: read-only and full disks, ``/proc``.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError:
        return f"expected a folder that can be written, got {path.parent}; name another"
    return None


def why_undrawable(
    path: Path, kinds: Sequence[str], others: Mapping[str, Path | None] | None = None
) -> str | None:
    """Say why no picture can be drawn to a path and how to fix it; None where it can.

    kinds: suffixes that it may have. others: see ``why_unwritable``.
    """
    if why := why_unwritable(path, others):
        return why
    if path.suffix not in kinds:
        return (
            f"expected a name that ends in {', '.join(kinds)}, got {path.suffix or 'none'}; "
            "give it one of these"
        )
    if importlib.util.find_spec("matplotlib") is None:
        return "needs the matplotlib package; pip install matplotlib"
    return None


def append_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV, newest last; a new file starts with the columns' names."""
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
