"""Hooks on SGLang symbols that have no supported extension point, one module each.

A module holds ``TARGET`` (the symbol), ``KIND`` (when it runs) and ``hook``; its docstring says
why, how, and when it can be removed. ``README.md`` beside this package is the register.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch

from kascade_patches import (
    forward_batch_init_new,
    get_last_loc,
    grammar_apply,
    grammar_apply_reasoning,
    grammar_bitmask,
    model_runner_forward,
    ngram_batch_get,
    pool_cell_size,
    pool_sizes,
    req_init,
    sampling_params_verify,
    scheduler_attach_storage,
    scheduler_internal_state,
    server_args_add_cli_args,
    server_args_backend_names,
    server_args_from_cli_args,
    server_args_resolve,
    support_triton,
    window_pool,
)
from kascade_sglang.errors import KascadeError
from kascade_sglang.host.release import serves_sinks

ARGUMENTS = (server_args_add_cli_args, server_args_from_cli_args, server_args_resolve)
EVERYWHERE = (
    *ARGUMENTS,
    forward_batch_init_new,
    pool_cell_size,
    pool_sizes,
    req_init,
    sampling_params_verify,
    window_pool,
)
INFORMING = (scheduler_internal_state, model_runner_forward)
"""Nothing depends on these, so no start is refused where SGLang has lost what they hook. They wait
until a backend is built: their modules take seconds to import, which others need not wait for."""
OF_SINKS = (server_args_backend_names,)
"""Only models with attention sinks depend on these; releases that serve none may lack them."""
OF_NGRAM = (ngram_batch_get,)
"""Only chains of n-grams depend on these; they wait until a backend is built, too."""
OF_HICACHE = (scheduler_attach_storage,)
"""Only servers with a host-memory tier depend on these; they wait as well."""
WITHOUT_GPU = (
    support_triton,
    get_last_loc,
    grammar_bitmask,
    grammar_apply,
    grammar_apply_reasoning,
)

_ran: set[str] = set()


@cache
def _modules() -> tuple[ModuleType, ...]:
    """Return what this process hooks, whatever it has imported so far."""
    # Of any kind: on other vendors' GPUs the hooks for a CPU would spoil SGLang's other backends.
    without_gpu = () if torch.accelerator.is_available() else WITHOUT_GPU
    return EVERYWHERE + without_gpu + (OF_SINKS if serves_sinks() else ())


def targets() -> list[str]:
    """Return the SGLang symbols that ``register_hooks`` hooks; each must be live."""
    return [module.TARGET for module in _modules()]


def register_hooks() -> None:
    """Register every hook this machine needs; SGLang applies them after loading its plugins."""
    _register(_modules())


def hook_informing() -> None:
    """Hook what only informs, in a process that builds a backend."""
    hook_now(INFORMING)


def hook_now(modules: Sequence[ModuleType]) -> list[str]:
    """Hook after SGLang has loaded its plugins, repeatable; return the SGLang symbols."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    _register(module for module in modules if module.TARGET not in HookRegistry._hooks)
    HookRegistry.apply_hooks()
    return [module.TARGET for module in modules]


def _register(modules: Iterable[ModuleType]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module in modules:
        HookRegistry.register(module.TARGET, _noted(module), HookType[module.KIND])


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def not_run(modules: Iterable[ModuleType]) -> list[str]:
    """Return the names of those hooks that have not run in this process."""
    return [name for name in map(_name, modules) if name not in _ran]


def _noted(module: ModuleType) -> Callable[..., Any]:
    """Return a module's hook, which notes that it ran."""
    name = _name(module)

    @wraps(module.hook)
    def hook(*args: Any, **kwargs: Any) -> Any:
        _ran.add(name)
        return module.hook(*args, **kwargs)

    return hook


def require_ran(*names: str) -> None:
    """Raise KascadeError unless these hooks have run in this process."""
    missing = [name for name in names if name not in _ran]
    if missing:
        raise KascadeError(
            f"hooks {', '.join(missing)}: expected SGLang to call them before attention is built, "
            "got no call; without them the KV pool leaves no memory for Kascade. Serve with a "
            "verified SGLang and its own KV pool"
        )
