"""Check plan and flags before any process starts, and turn off what cannot be captured.

Why: a refusal in a worker comes a minute later, under other output; and SGLang turns CUDA graphs
    off only for backend names that it knows.
How: around the resolution of ServerArgs: graphs off before it where attention runs eagerly, our
    checks after it.
Remove when: SGLang has a validation hook.
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
    from kascade_sglang.compat import has_gpu, uses_kascade
    from kascade_sglang.config import read_settings

    if not uses_kascade(server_args):
        return original(server_args)
    compares = read_settings(None).selection not in (None, "topk")
    if not server_args.disable_cuda_graph and (compares or not has_gpu()):
        logger.warning("kascade: CUDA graphs are off, attention runs through the torch reference")
        server_args.disable_cuda_graph = True
    original(server_args)
    check_server_args(server_args)
