"""Kascade sparse attention as a plugin for SGLang."""

from kascade_sglang.settings import set_tile

__version__ = "0.2.0"

set_tile()
