"""Measurements of an unfinished run: a file a prompt, so that a stopped run loses at most one.

The folder stands beside the plan to be written, ``plan.json.parts``. Every number of the plan is
computed from these files' content, so a resumed run gives the same bits as one without a stop.
"""

import io
import json
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kascade_sglang.calibration.collect import MASS_RATIOS, PromptStats
from kascade_sglang.errors import CalibrationError
from kascade_sglang.files import write_atomically

_SETTINGS = "settings.json"
_MEASURED = "prompt-*.npz"
_COUNTS = ("tokens", "tiles")
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
)
"""What reading a file that is not ours raises; numpy reads a bare array as no archive."""


class Checkpoint:
    """The folder of one calibration's measured prompts."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Open the folder for the plan ``out``; it is created with the first measurements.

        settings: everything the measurements depend on, as JSON values.
        Raises CalibrationError where it holds measurements made with other settings, or is no
        folder.
        """
        self.folder = out.with_name(out.name + ".parts")
        # Through JSON, as the file's own values have gone.
        self._settings = json.loads(json.dumps(settings))
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise CalibrationError(
                f"{self.folder}: expected a folder of measurements, or none yet, got a file; "
                "move it away or give another --out"
            )
        if any(self.folder.glob(_MEASURED)):
            _check_same(self.folder, _read_settings(self.folder / _SETTINGS), self._settings)

    def load(self, index: int, layers: int, heads: int) -> PromptStats | None:
        """Return a prompt's measurements, None if there are none yet.

        layers, heads: how many were measured.
        Raises CalibrationError for a file that does not hold these.
        """
        path = self._path(index)
        shapes = _shapes(layers, heads)
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {name: _checked(name, file[name], shape) for name, shape in shapes.items()}
                counts = {name: int(file[name]) for name in _COUNTS}
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            raise CalibrationError(
                f"{path}: not a file of measurements ({error}); delete it to measure that prompt "
                "again"
            ) from error
        return PromptStats(**arrays, **counts)

    def store(self, index: int, stats: PromptStats) -> None:
        """Write a prompt's measurements in one step; raises CalibrationError on a full disk."""
        content = io.BytesIO()
        np.savez(content, **asdict(stats))
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / _SETTINGS, json.dumps(self._settings, indent=1).encode())
            write_atomically(self._path(index), content.getvalue())
        except OSError as error:
            raise CalibrationError(
                f"{self._path(index)}: cannot write ({error.strerror}); the prompts measured "
                "before are kept: free space and give the same command to go on"
            ) from error

    def remove(self) -> None:
        """Delete the measurements, for the plan has been written; no file of another's."""
        with suppress(OSError):
            for path in (*self.folder.glob(_MEASURED), self.folder / _SETTINGS):
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"prompt-{index:05d}.npz"


def _shapes(layers: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays in a file, see ``PromptStats``."""
    pairs = (layers, layers)
    return {
        "similarity": (*pairs, heads, heads),
        "pooled": pairs,
        "mass": (len(MASS_RATIOS), layers, heads),
        "importance": (layers,),
    }


def _checked(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} is not {list(shape)} finite numbers")
    return array


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"{path}: cannot read ({error}); delete the folder to start anew"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CalibrationError(
                f"{folder}: holds measurements of an unfinished run with {name} "
                f"{found.get(name)!r}, now {value!r}; give the options of that run to go on, or "
                "delete the folder to start anew"
            )
