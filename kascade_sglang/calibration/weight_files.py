"""Which files a model's weights are read from: those of its own folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from kascade_sglang.errors import CalibrationError


def refuse_files_elsewhere(model: str) -> None:
    """Refuse a folder whose index of weights names files outside it; raises CalibrationError.

    transformers follows such names. Of a hub id the Hub knows the files.
    """
    if not os.path.isdir(model):
        return
    for path in sorted(Path(model).glob("*.index.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            named = found.get("weight_map")
        except (OSError, ValueError, RecursionError, AttributeError):
            continue  # loading says what is wrong
        for name in named.values() if isinstance(named, Mapping) else ():
            if not isinstance(name, str) or os.path.basename(name) != name:
                raise CalibrationError(
                    f"model {model}: expected {path.name} to name files beside it, got {name!r}; "
                    "mend it, or get the model again from who made it"
                )
