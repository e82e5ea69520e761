"""Shared setup: deterministic torch, and outputs that nobody wrote show up as NaN."""

import logging
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from kascade_kernels.arena import Arena, Empty
from kascade_sglang.servers.process import Server
from tests.support.interpreter import compute_as_on_gpus, leave_out_programs
from tests.support.servers import Servers, scope_of, wanted_by
from tests.support.shapes import INTERPRETED

# Log handlers that libraries made in one test hold its closed stderr in the next.
logging.raiseExceptions = False


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    running = Servers(tmp_path_factory.mktemp)
    yield running
    running.stop()


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Servers) -> Server:
    """The running server that the test's mark ``served`` asks for."""
    return servers.get(wanted_by(request.node), request.node.path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Let ``--dist loadfile`` keep together what ``scope_of`` says."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None
    scheduling = LoadFileScheduling(config, log)
    scheduling._split_scope = lambda nodeid: scope_of(nodeid.partition("::")[0])
    return scheduling


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves unwritten, so that an unwritten output fails: NaN, or -1."""

    def poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(*args: object, **kwargs: object) -> torch.Tensor:
            out = empty(*args, **kwargs)
            if out.dtype == torch.bool:  # Both values are good ones.
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(-1 if out.dtype.is_signed else torch.iinfo(out.dtype).max)

        return fill

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill an arena with bytes of 255 before every use: NaN as floats, -1 as whole numbers."""
    cut = Arena.cut

    def poisoned(arena: Arena) -> Empty:
        arena._memory.fill_(255)
        return cut(arena)

    monkeypatch.setattr(Arena, "cut", poisoned)


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        compute_as_on_gpus(monkeypatch)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        leave_out_programs(monkeypatch)
