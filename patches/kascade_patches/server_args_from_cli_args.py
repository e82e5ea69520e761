"""Carry the ``--kascade-*`` flags to every process, and refuse bad input in one sentence.

Why: ServerArgs drops namespace entries it does not know, and a traceback hides our sentence.
How: around the conversion, put the flags into the environment, which spawned processes inherit.
Remove when: SGLang offers plugins a way to declare arguments.
"""

import argparse
from collections.abc import Callable
from typing import Any

from kascade_sglang.errors import KascadeError, lines
from kascade_sglang.host.release import resolves_late
from kascade_sglang.settings import carry_flags

TARGET = "sglang.srt.server_args.ServerArgs.from_cli_args"
KIND = "AROUND"
FROM_COMMAND_LINE = "_kascade_from_command_line"
"""Attribute of ServerArgs that a command line made and that are not resolved yet."""


def hook(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Return ServerArgs; exits with status 1 and the sentence where Kascade refuses."""
    try:
        carry_flags(vars(args))
        server_args = original(cls, args)
    except KascadeError as error:
        raise SystemExit(f"kascade: {lines(error)}") from None
    if resolves_late():
        setattr(server_args, FROM_COMMAND_LINE, True)
    return server_args
