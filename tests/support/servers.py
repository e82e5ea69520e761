"""Real servers, each started once for all tests that want one like it.

A test says so by a mark, ``@served("--page-size", "1")``, and takes the fixture ``server``. The
mark also puts tests of one server next to each other, and into one process: see ``grouped``.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.bench_serving import server_arguments
from benchmarks.serving_model import make_model
from kascade_sglang.servers.demo_model import demo_arguments
from kascade_sglang.servers.process import Server
from tests.support.models import LLAMA, make_plan


def demo(folder: Path) -> list[str]:
    """Serve the shipped model."""
    return demo_arguments("kascade")


def tiny(folder: Path) -> list[str]:
    """Serve four layers of random weights, which know 1024 words of one token each."""
    config = {**LLAMA, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}
    flags = ["--max-total-tokens", "8192"]
    if not torch.cuda.is_available():
        flags += ["--dtype", "float32", "--mem-fraction-static", "0.5", "--sleep-on-idle"]
    model = make_model(config, make_plan(), folder / "model")
    return server_arguments(model, "kascade", Namespace(model_path=None, server_flags=flags))


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


def wanted_by(item: pytest.Item) -> Wanted | None:
    """The server that a test is marked with."""
    mark = item.get_closest_marker("served")
    return mark.args[0] if mark else None


LOADED = served(model=tiny, SGLANG_TEST_RETRACT="true")
"""What benchmarks ask: every third step takes a request of several out again."""


class Servers:
    """One server at a time: it ends when a test wants another, or at the end."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._wanted: Wanted | None = None
        self._server: Server | None = None

    def get(self, wanted: Wanted) -> Server:
        """Return the running server, or start it; its log's folder is its own."""
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
        return self._server

    def stop(self) -> None:
        """End what runs."""
        if self._server:
            self._server.stop()
        self._server = self._wanted = None


def group_of(item: pytest.Item) -> str:
    """What runs in one process: tests of a server, one that starts its own, or a file's others."""
    wanted = wanted_by(item)
    if wanted:
        return re.sub(r"\W+", "-", " ".join((wanted.model.__name__, *wanted.flags)))
    return item.name if item.get_closest_marker("e2e") else item.nodeid.split("::")[0]


def grouped(items: list[pytest.Item]) -> list[pytest.Item]:
    """Order tests by group, those that start servers first: they take longest.

    ``pytest -n 2 --dist loadgroup`` runs each group in one process.
    """
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        group = group_of(item)
        first.setdefault(group, index)
        item.add_marker(pytest.mark.xdist_group(group))
    return sorted(
        items, key=lambda item: (not item.get_closest_marker("e2e"), first[group_of(item)])
    )
