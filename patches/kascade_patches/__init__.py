"""Hooks on SGLang symbols that have no supported extension point, one module each.

A module holds ``TARGET`` (the symbol), ``KIND`` (when it runs) and ``hook``; its docstring says
why, how, and when it can be removed. ``README.md`` beside this package is the register.
"""

from types import ModuleType

import torch

from kascade_patches import (
    get_last_loc,
    pool_cell_size,
    pool_sizes,
    server_args_add_cli_args,
    server_args_from_cli_args,
    server_args_post_init,
    support_triton,
)

EVERYWHERE = (
    server_args_add_cli_args,
    server_args_from_cli_args,
    server_args_post_init,
    pool_cell_size,
    pool_sizes,
)
WITHOUT_GPU = (support_triton, get_last_loc)


def _modules() -> tuple[ModuleType, ...]:
    return EVERYWHERE if torch.cuda.is_available() else EVERYWHERE + WITHOUT_GPU


def targets() -> list[str]:
    """Return the SGLang symbols that must be hooked on this machine."""
    return [module.TARGET for module in _modules()]


def register_hooks() -> None:
    """Register every hook this machine needs; SGLang applies them after loading its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for module in _modules():
        HookRegistry.register(module.TARGET, module.hook, HookType[module.KIND])
