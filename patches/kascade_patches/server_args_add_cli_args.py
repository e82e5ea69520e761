"""Add the ``--kascade-*`` flags to SGLang's command line.

Why: a plugin cannot add fields to ServerArgs, which the parser is generated from.
How: after SGLang has filled its parser, add our group; every server command parses with it.
Remove when: SGLang offers plugins a way to declare arguments.
"""

import argparse
from typing import Any

from kascade_sglang.settings import add_flags

TARGET = "sglang.srt.server_args.ServerArgs.add_cli_args"
KIND = "AFTER"


def hook(result: Any, parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_flags(parser)
