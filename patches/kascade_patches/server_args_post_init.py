"""Check plan and flags before any process starts, and turn off what cannot run yet.

Why: a refusal in a worker comes a minute later, under other output; and SGLang turns CUDA graphs
    off only for backend names that it knows.
How: around the resolution of ServerArgs: graphs off before it, our checks after it.
Remove when: SGLang has a validation hook (graphs: when the kernels can be captured).
"""

import logging
from collections.abc import Callable
from typing import Any

TARGET = "sglang.srt.server_args.ServerArgs.__post_init__"
KIND = "AROUND"

logger = logging.getLogger(__name__)


def hook(original: Callable[..., None], server_args: Any) -> None:
    """Resolve ServerArgs; raises KascadeError where this server would not be right."""
    from kascade_sglang.checks import check_server_args
    from kascade_sglang.compat import uses_kascade

    if not uses_kascade(server_args):
        return original(server_args)
    if not server_args.disable_cuda_graph:
        logger.warning("kascade: CUDA graphs are off, this release computes attention eagerly")
        server_args.disable_cuda_graph = True
    original(server_args)
    check_server_args(server_args)
