"""Hooks on SGLang symbols that have no supported extension point, one module each.

A module holds ``TARGET`` (the symbol), ``KIND`` (when it runs) and ``hook``; its docstring says
why, how, and when it can be removed. ``README.md`` beside this package is the register.
"""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from kascade_patches import (
    forward_batch_init_new,
    get_last_loc,
    grammar_apply,
    grammar_apply_reasoning,
    grammar_bitmask,
    ngram_batch_get,
    pool_cell_size,
    pool_sizes,
    req_init,
    sampling_params_verify,
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
    pool_cell_size,
    pool_sizes,
    sampling_params_verify,
    window_pool,
)
IN_SCHEDULERS = (req_init, forward_batch_init_new)
"""Importing their modules would slow down processes that serve no requests."""
INFORMING = (scheduler_internal_state,)
"""Nothing depends on these, so no start is refused where SGLang has lost what they hook."""
OF_SINKS = (server_args_backend_names,)
"""Only models with attention sinks depend on these; releases that serve none may lack them."""
OF_NGRAM = (ngram_batch_get,)
"""Only chains of n-grams depend on these, in processes that have loaded what they hook."""
WITHOUT_GPU = (
    support_triton,
    get_last_loc,
    grammar_bitmask,
    grammar_apply,
    grammar_apply_reasoning,
)

SCHEDULER = scheduler_internal_state.TARGET.rpartition(".Scheduler")[0]

_ran: set[str] = set()


def _modules() -> tuple[ModuleType, ...]:
    # Of any kind: on other vendors' GPUs the hooks for a CPU would spoil SGLang's other backends.
    without_gpu = () if torch.accelerator.is_available() else WITHOUT_GPU
    return EVERYWHERE + without_gpu + (IN_SCHEDULERS if SCHEDULER in sys.modules else ())


def targets() -> list[str]:
    """Return the SGLang symbols that must be hooked on this machine."""
    return [module.TARGET for module in _modules()]


def register_hooks() -> None:
    """Register every hook this machine needs; SGLang applies them after loading its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Like IN_SCHEDULERS, but nothing depends on them.
    informing = INFORMING if SCHEDULER in sys.modules else ()
    of_sinks = OF_SINKS if serves_sinks() else ()
    for module in (*_modules(), *of_sinks, *informing):
        HookRegistry.register(module.TARGET, _noted(module), HookType[module.KIND])


def hook_ngram() -> list[str]:
    """Hook what only chains of n-grams depend on; return the SGLang symbols."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module in OF_NGRAM:
        if module.TARGET not in HookRegistry._hooks:
            HookRegistry.register(module.TARGET, _noted(module), HookType[module.KIND])
    HookRegistry.apply_hooks()
    return [module.TARGET for module in OF_NGRAM]


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
