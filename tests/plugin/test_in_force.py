"""What a server serves with is said in its log, and only where it serves with Kascade."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kascade_patches import (
    IN_SCHEDULERS,
    INFORMING,
    OF_SINKS,
    register_hooks,
    scheduler_internal_state,
    server_args_resolve,
    targets,
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


@pytest.mark.parametrize("with_sinks", [True, False])
def test_hooks_that_inform_are_registered_in_a_scheduler_and_never_required(
    with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: registered.append(target))
    monkeypatch.setattr("kascade_patches.SCHEDULER", "no.such.module")
    monkeypatch.setattr("kascade_patches.serves_sinks", lambda: with_sinks)
    register_hooks()
    of_sinks = [module.TARGET for module in OF_SINKS if with_sinks]
    assert registered == [*targets(), *of_sinks]
    registered.clear()
    monkeypatch.setattr("kascade_patches.SCHEDULER", "sys")
    register_hooks()
    assert {module.TARGET for module in IN_SCHEDULERS} <= set(targets())
    assert registered == [*targets(), *of_sinks, *(module.TARGET for module in INFORMING)]


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
