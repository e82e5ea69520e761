"""Reading files of others: text of any size that fits, and what to say where that fails."""

import gzip
import os
import stat
import zlib
from pathlib import Path

from kascade_sglang.errors import KascadeError
from kascade_sglang.files import expand

LONGEST = 300
MOST_BYTES = 2**31
"""Of a text, unpacked; more is no prompt file but a data set, or a bomb."""


class UnreadableError(KascadeError):
    """Files that cannot be read; the message is the cause, a part of a sentence."""


def one_line(error: BaseException) -> str:
    """Return a library's message, which may run over many lines, as a part of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def cause(error: BaseException, name: str) -> str:
    """Return why a library cannot read a model's files, and what would help.

    name: what the user has named, a folder or a Hugging Face id. Libraries take a folder that does
    not exist for an id, and what they say of that misleads.
    """
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; --trust-remote-code runs that, if you trust it"
    if os.path.isdir(expand(name)):
        return one_line(error)
    if not is_hub_id(name):
        return "expected a Hugging Face id or a folder that exists, got neither; mend the name"
    return f"no such folder here, and as a Hugging Face id: {one_line(error)}"


def why_no_model(error: BaseException, name: str) -> str:
    """Return why a library finds no model in a folder or under a Hugging Face id; see cause."""
    folder = expand(name)
    if os.path.isdir(folder) and not os.path.exists(folder / "config.json"):
        return "expected a folder with config.json, got one without; name the model's own folder"
    return cause(error, name)


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the Hub: ``name`` or ``owner/name``."""
    return bool(name) and name[0] not in "./~" and name.count("/") <= 1


def read_text(path: Path) -> str:
    """Read a UTF-8 file, packed by gzip or not, without the mark that some editors begin it with.

    Raises UnreadableError, for what is no regular file, too: reading a device may never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError("expected a file, got a folder or device")
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(getattr(error, "strerror", None) or one_line(error)) from error
    if len(data) > MOST_BYTES:
        raise UnreadableError(f"more than {MOST_BYTES >> 20} MiB of text; take a part of it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text, at byte {error.start}") from error
    if "\0" in text:
        raise UnreadableError(f"no text: a byte of zero, at {data.index(0)}")
    return text
