"""Write a file so that a full disk or a lost process leaves the old one, never half a new one."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content in one step, through a neighbouring ``.part`` file.

    Raises OSError, with the old file untouched and the draft removed.
    """
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
