"""Which releases of SGLang are verified, and how they differ in what happens when.

Imports nothing of SGLang: its platform loader runs this while SGLang itself is being imported.
"""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from kascade_sglang.errors import KascadeError

VERIFIED = ("0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
"""Releases that the tests have run on."""


VERIFIED_WITH_SINKS = ("0.5.17",)
"""Those of them on which models with attention sinks were served."""

VERIFIED_WITH_HICACHE = ("0.5.17",)
"""Those of them whose host-memory tier was read, and is tested on a GPU."""

VERIFIED_WITH_SPECULATION = {"0.5.17": ("NGRAM", "STANDALONE", "EAGLE")}
"""Those of them that verify chains of drafts, and by which algorithms a GPU has served them:
``tests/e2e/test_speculation.py`` passes there."""


def require_supported_host(found: str | None = None) -> None:
    """Raise KascadeError unless SGLang is a release that this package is verified against."""
    found = found or version("sglang")
    if found not in VERIFIED:
        raise KascadeError(
            f"sglang: expected one of {', '.join(VERIFIED)}, got {found}; "
            f"pip install sglang=={VERIFIED[-1]}"
        )


def serves_sinks() -> bool:
    """Whether models with attention sinks were served on the installed release."""
    return version("sglang") in VERIFIED_WITH_SINKS


@cache
def resolves_late() -> bool:
    """Whether launchers resolve ServerArgs by a call, not the constructor (from 0.5.19 on)."""
    return find_spec("sglang.srt.arg_groups.pipeline") is not None
