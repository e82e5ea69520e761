"""Let a model with attention sinks be resolved with the kascade backend.

Why: SGLang asserts by name that such a model's attention backend is one of those that take sinks.
How: around the question which backends attend, while arguments are resolved and for such a model,
    answer with a name that it accepts. Which dense backend computes is for our own checks, which
    refuse those that take no sinks.
Remove when: SGLang asks a backend, not its name.
"""

from collections.abc import Callable
from typing import Any

TARGET = "sglang.srt.server_args.ServerArgs._resolved_attention_backends"
KIND = "AROUND"

ACCEPTED = "triton"


def hook(original: Callable[..., tuple[str, str]], server_args: Any) -> tuple[str, str]:
    """Return the backends of prefill and of decoding."""
    from kascade_sglang.host.server import NAME, served_with_sinks

    names = original(server_args)
    if NAME not in names or not served_with_sinks(server_args.get_model_config().hf_config):
        return names
    return tuple(ACCEPTED if name == NAME else name for name in names)
