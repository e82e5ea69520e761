"""A server's command line, read as ``sglang serve`` reads it, without starting anything."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from sglang.srt import plugins
from sglang.srt.server_args import prepare_server_args

from kascade_sglang.host.release import resolves_late
from kascade_sglang.host.server import NAME

GROUPS = (plugins.GENERAL_PLUGINS_GROUP, plugins.PLATFORM_PLUGINS_GROUP)
"""Entry points by which SGLang finds plugins."""


def missing_entry_points() -> list[str]:
    """Return the groups of entry points in which SGLang finds nothing of ours."""
    return [
        group for group in GROUPS if NAME not in {each.name for each in entry_points(group=group)}
    ]


def load_plugins() -> None:
    """Load SGLang's plugins, as each of its processes does; once a process."""
    plugins.load_plugins()


def read_command_line(model: str, flags: Sequence[str]) -> Any:
    """Return the resolved ServerArgs of a server with the kascade backend.

    Raises SystemExit with the sentences of what Kascade refuses, and whatever SGLang raises.
    """
    command = ["--model-path", model, "--attention-backend", NAME, *flags]
    server_args = prepare_server_args(command)
    if resolves_late():
        server_args.resolve_once()
    return server_args
