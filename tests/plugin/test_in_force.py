"""What a server serves with is said in its log, and only where it serves with Kascade."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sglang.srt.plugins.hook_registry import HookRegistry

import kascade_patches
from kascade_patches import (
    INFORMING,
    OF_HICACHE,
    OF_SINKS,
    forward_batch_init_new,
    model_runner_forward,
    req_init,
    scheduler_internal_state,
    server_args_resolve,
)
from kascade_sglang import checks
from kascade_sglang.backend import in_force, published
from kascade_sglang.host.server import server_facts
from tests.support.models import parse

MakeModel = Callable[..., Path]
SERVES = {
    "plan": "test",
    "anchors": "0,2",
    "heads": "pooled",
    "topk_ratio": "0.1",
    "min_k": "3584",
    "prefill_topk_ratio": "0.1",
    "prefill_min_k": "512",
    "phases": "both",
    "selection": "topk",
    "exact": "False",
    "kv_cache_dtype": "fp8_e4m3",
    "dense_backend": "triton",
}
FLAGS = ("--kascade-heads", "pooled", "--kascade-prefill-min-k", "512")
FLAGS += ("--kascade-dense-backend", "triton", "--kv-cache-dtype", "fp8_e4m3")

SCHEDULER = "sglang.srt.managers.scheduler"


def test_a_start_logs_what_is_in_force(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    logger = server_args_resolve.logger
    monkeypatch.setattr(logger, "info", lambda text, *parts: said.append(text % parts))
    args = parse(make_model(), *FLAGS)
    assert in_force.in_force(checks.check(server_facts(args))) == SERVES
    line = "kascade: serves with " + " ".join(f"{name}={value}" for name, value in SERVES.items())
    assert said == [line]


def test_a_scheduler_tells_it(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_published", {})
    output = SimpleNamespace(internal_state={"max_running_requests": 1})
    scheduler_internal_state.hook(output, None, None)
    assert output.internal_state == {"max_running_requests": 1}, "another backend's server"
    config = checks.check(server_facts(parse(make_model(), *FLAGS)))
    published.publish(config, metrics=False, requests=False)
    scheduler_internal_state.hook(output, None, None)
    assert output.internal_state == {"max_running_requests": 1, "kascade": SERVES}


@pytest.fixture
def chosen_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kascade_patches._modules.cache_clear()
    yield
    monkeypatch.undo()
    kascade_patches._modules.cache_clear()


@pytest.mark.parametrize("with_sinks", [True, False])
def test_what_is_registered_must_be_live_and_depends_on_no_import(
    with_sinks: bool, chosen_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: registered.append(target))
    monkeypatch.setattr("kascade_patches.serves_sinks", lambda: with_sinks)
    with monkeypatch.context() as without:
        without.delitem(sys.modules, SCHEDULER, raising=False)
        kascade_patches.register_hooks()
    monkeypatch.setitem(sys.modules, SCHEDULER, ModuleType("scheduler"))
    assert registered == kascade_patches.targets()
    of_requests = {req_init.TARGET, forward_batch_init_new.TARGET}
    of_sinks = {module.TARGET for module in OF_SINKS}
    assert of_requests <= set(registered)
    assert of_sinks & set(registered) == (of_sinks if with_sinks else set())


def test_hooks_that_inform_are_live_where_a_backend_is_built_and_never_required() -> None:
    """``tests/e2e/test_monitoring.py`` asks a server, whose backend is built by ``plugin.py``."""
    kascade_patches.hook_informing()
    kascade_patches.hook_informing()
    informing = {module.TARGET for module in INFORMING}
    assert informing and informing <= HookRegistry._patched
    assert not informing & set(kascade_patches.targets())


def test_no_storage_is_attached_to_host_memory_while_a_server_runs() -> None:
    """``tests/e2e/test_gpu_hicache.py`` asks a server."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqInput
    from sglang.srt.managers.scheduler import Scheduler

    assert set(kascade_patches.hook_now(OF_HICACHE)) <= HookRegistry._patched
    request = AttachHiCacheStorageReqInput(hicache_storage_backend="file")
    answer = Scheduler.attach_hicache_storage_wrapped(None, request)
    assert not answer.success
    assert answer.message.startswith("--hicache-storage-backend: expected none with the kascade")


def test_a_step_without_memory_says_what_to_change() -> None:
    """``tests/e2e/test_gpu_memory.py`` takes a server's memory."""
    batch = SimpleNamespace(input_ids=torch.zeros(7))
    assert model_runner_forward.hook(lambda *given: given, "runner", batch, 3) == (
        "runner",
        batch,
        3,
    )

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        model_runner_forward.hook(fail, "runner", batch)
    assert str(raised.value).startswith("kascade: GPU memory: expected room for a step of 7 new")
    assert str(raised.value).endswith("torch says: CUDA out of memory. Tried")


LAUNCHER = """
import sys
from kascade_sglang.host.command_line import load_plugins, read_command_line
load_plugins()
read_command_line(sys.argv[1], [])
imported = [name for name in sys.modules if name.startswith("kascade_")]
assert "kascade_patches.server_args_resolve" in imported
sys.exit("kascade_sglang.backend.published" in imported or "prometheus_client" in sys.modules)
"""


def test_a_launcher_imports_no_metrics(make_model: MakeModel) -> None:
    """They would be those of one process, and SGLang's of this process missing from /metrics."""
    command = [sys.executable, "-c", LAUNCHER, str(make_model())]
    assert subprocess.run(command, check=False).returncode == 0
