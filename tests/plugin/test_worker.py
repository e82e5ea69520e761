"""What a worker refuses when its arguments were made before the plugin was loaded."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.plugins.hook_registry import HookRegistry

import kascade_patches
from kascade_sglang import plugin
from kascade_sglang.backend import paths
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError
from kascade_sglang.host import server
from kascade_sglang.host.runtime import largest_key_bias, warn_of_key_bias
from kascade_sglang.host.steps import Rank
from tests.support.harness import FakePool
from tests.support.models import SHAPE, make_plan, overwrite, parse

MakeModel = Callable[..., Path]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kascade_patches, "_ran", {"pool_cell_size", "pool_sizes"})
    assert set(kascade_patches.targets()) <= HookRegistry._patched


def test_graphs_of_an_eager_selection(
    worker: None, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent would have turned them off."""
    plan = make_plan(shape=replace(SHAPE, head_dim=64))
    args = parse(make_model(plan, head_dim=64), "--dtype", "float16")
    monkeypatch.setenv("KASCADE_SELECTION", "quest")
    monkeypatch.setattr(server, "has_gpu", lambda: True)
    monkeypatch.setattr(server, "largest_decodes", lambda args: (32, 0))
    with pytest.raises(KascadeError, match=r"load_plugins\(\) before ServerArgs"):
        plugin.create_backend(SimpleNamespace(server_args=args, kv_cache_dtype=torch.float16))


@pytest.mark.parametrize(
    ("field", "value"), [("enable_mis", True), ("kv_cache_dtype", "nvfp4"), ("device", "xpu")]
)
def test_flags_that_the_parent_would_refuse(
    field: str, value: object, worker: None, make_model: MakeModel
) -> None:
    args = parse(make_model())
    overwrite(args, field, value)
    with pytest.raises(KascadeError, match=f"--{field.replace('_', '-')}: expected"):
        plugin.create_backend(SimpleNamespace(server_args=args, kv_cache_dtype=torch.float16))


def test_what_lives_with_the_pool_is_released_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of keys and the arena come from the memory saver's region of the KV cache."""
    regions: list[str] = []
    made: dict[str, list[str]] = {}

    @contextmanager
    def region(tag: str) -> Iterator[None]:
        regions.append(tag)
        yield
        regions.pop()

    def noted(name: str) -> Callable[..., object]:
        make = getattr(paths, name)

        def noting(*args: object) -> object:
            made.setdefault(name, []).extend(regions)
            return make(*args)

        return noting

    for name in ("KeyValues", "Arena"):
        monkeypatch.setattr(paths, name, noted(name))
    pool = FakePool(SHAPE.layers, 4096, SHAPE.kv_heads, torch.float16)
    pool.memory_saver_adapter = SimpleNamespace(region=region)
    monkeypatch.setattr(paths, "runs_kernels", lambda device, config: True)
    plan = make_plan()
    config = KascadeConfig(plan, plan.budget, "per_head", score_memory=2**22)
    rank = Rank(
        device="cpu",
        table=torch.zeros(2, 4096, dtype=torch.int32),
        slots=4096,
        heads=range(SHAPE.kv_heads),
        layers=range(SHAPE.layers),
        reports_metrics=False,
    )
    built = paths.build_paths(rank, pool, config)
    assert len(built.kv._copies) == len(plan.anchors)
    in_fp8 = replace(config, kv_cache_dtype="fp8_e4m3")
    assert paths.build_paths(rank, pool, in_fp8).kv._copies == {}
    assert made == {"KeyValues": ["kv_cache"] * 2, "Arena": ["kv_cache"] * 2}
    assert regions == []


def linear(bias: bool) -> torch.nn.Module:
    """SGLang's layer that makes queries, keys and values, of 4 and 2 heads of 16.

    Releases make it from other arguments; what is read of it they have alike.
    """
    made = QKVParallelLinear.__new__(QKVParallelLinear)
    torch.nn.Module.__init__(made)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16}
    code = inspect.getsource(QKVParallelLinear.__init__)
    assert all(f"self.{name} = " in code for name in sizes)
    vars(made).update(sizes)
    made.bias = torch.nn.Parameter(torch.arange(128.0)) if bias else None
    return made


@pytest.mark.parametrize("large", [False, True])
def test_keys_that_fp8_does_not_bear(large: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of a layer's bias the part of keys alone counts, which lies behind that of queries."""
    model = torch.nn.ModuleList([linear(bias=False), linear(bias=True), torch.nn.Linear(2, 2)])
    assert largest_key_bias(model[:1]) == 0.0
    assert (largest := largest_key_bias(model)) == 95.0
    warn_of_key_bias(largest if large else 31.0, "fp8_e4m3")
    said = "--kv-cache-dtype fp8_e4m3: this model adds up to 95 to its keys"
    assert [said in message for message in caplog.messages] == [True] * large
