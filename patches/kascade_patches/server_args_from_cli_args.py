"""Carry the ``--kascade-*`` flags to every process, and refuse bad input in one sentence.

Why: ServerArgs drops namespace entries it does not know, and a traceback hides our sentence.
How: around the conversion, put the flags into the environment, which spawned processes inherit.
    With our backend their values are judged as ServerArgs are resolved, with all else.
Remove when: SGLang offers plugins a way to declare arguments.
"""

import argparse
from collections.abc import Callable
from typing import Any

from kascade_sglang.errors import KascadeError, lines
from kascade_sglang.host.release import resolves_late
from kascade_sglang.settings import carry_flags, require_flags

TARGET = "sglang.srt.server_args.ServerArgs.from_cli_args"
KIND = "AROUND"
FROM_COMMAND_LINE = "_kascade_from_command_line"
"""Attribute of ServerArgs that a command line made and that are not resolved yet."""


def hook(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Return ServerArgs; exits with status 1 and the sentence where Kascade refuses."""
    from kascade_sglang.host.server import phases_on_kascade

    carry_flags(vars(args))
    try:
        server_args = original(cls, args)
        if not phases_on_kascade(server_args):
            require_flags()
    except KascadeError as error:
        raise SystemExit(f"kascade: {lines(error)}") from None
    if resolves_late():
        setattr(server_args, FROM_COMMAND_LINE, True)
    return server_args
