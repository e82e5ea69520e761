"""Real servers, each started once for all tests that want one like it.

A test says so by a mark, ``@served("--page-size", "1")``, and takes the fixture ``server``. Tests
of one server belong into one file: a file's tests run one after the other, in one process. Files
that want the ``everyday`` server run in one process, too; its prefix cache is empty when a file
begins.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest

from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server

TESTS = Path(__file__).parents[1]


def demo(folder: Path) -> list[str]:
    """Serve the shipped model."""
    return demo_arguments("kascade")


@dataclass(frozen=True)
class Wanted:
    """A server, by what it is started with; equal ones are started once.

    model: makes what it needs in the server's own folder, and returns the first arguments.
    environment: pairs of name and value.
    """

    flags: tuple[str, ...]
    model: Callable[[Path], list[str]]
    environment: tuple[tuple[str, str], ...]
    command: tuple[str, ...]


def served(
    *flags: str,
    model: Callable[[Path], list[str]] = demo,
    command: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
    **environment: str,
) -> pytest.MarkDecorator:
    """Mark tests whose ``server`` has these flags and variables."""
    wanted = Wanted(flags, model, tuple(sorted(environment.items())), tuple(command))
    return pytest.mark.served(wanted)


everyday = served(
    *("--chunked-prefill-size", "512", "--kascade-max-topk-ratio", "0.5"),
    *("--tool-call-parser", "pythonic"),
)
"""The demo model in chunks, for whoever asks for nothing else."""


def wanted_by(item: pytest.Item) -> Wanted | None:
    """The server that a test is marked with."""
    mark = item.get_closest_marker("served")
    return mark.args[0] if mark else None


@cache
def scope_of(file: str) -> str:
    """What pytest-xdist keeps in one process: a file, or all that want the everyday server."""
    return "everyday" if "import everyday" in (TESTS.parent / file).read_text() else file


def flush(server: Server) -> None:
    """Empty the prefix cache, once no request is in flight."""
    url = f"{server.url}/flush_cache"
    httpx.post(url, params={"timeout": 30}, timeout=60, trust_env=False).raise_for_status()


class Servers:
    """One server at a time: it ends when a test wants another, or at the end."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._wanted: Wanted | None = None
        self._server: Server | None = None
        self._asked_by: Path | None = None

    def get(self, wanted: Wanted, file: Path) -> Server:
        """Return the running server, or start it, for a test of a file; its log's folder is its
        own."""
        if wanted != self._wanted:
            self.stop()
            folder = self._folder("server")
            arguments = [*wanted.model(folder), *wanted.flags]
            server = Server(
                arguments,
                folder / "log",
                environment=dict(wanted.environment),
                command=wanted.command,
            )
            self._server, self._wanted = server.__enter__(), wanted
        elif file != self._asked_by:
            flush(self._server)
        self._asked_by = file
        return self._server

    def stop(self) -> None:
        """End what runs."""
        if self._server:
            self._server.stop()
        self._server = self._wanted = None
