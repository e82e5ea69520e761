"""Check plan and flags before any process starts, and turn off what cannot be captured.

Why: a refusal in a worker comes a minute later, under other output; and SGLang turns CUDA graphs
    off only for backend names that it knows.
How: around the resolution of ServerArgs: graphs off before it where attention runs eagerly, our
    checks and the log of settings after it.
Remove when: SGLang has a validation hook.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kascade_patches.server_args_from_cli_args import FROM_COMMAND_LINE
from kascade_sglang.errors import KascadeError, lines, noted
from kascade_sglang.host.release import resolves_late

TARGET = (
    f"sglang.srt.server_args.ServerArgs.{'resolve_once' if resolves_late() else '__post_init__'}"
)
KIND = "AROUND"

logger = logging.getLogger(__name__)


def hook(original: Callable[..., None], server_args: Any) -> None:
    """Resolve ServerArgs; raises KascadeError where this server would not be right.

    Arguments of a command line end the process instead, with status 1 and the sentence.
    """
    from kascade_sglang.asks import accept
    from kascade_sglang.backend.in_force import in_force
    from kascade_sglang.checks import check
    from kascade_sglang.host.release import require_supported_host
    from kascade_sglang.host.server import (
        has_gpu,
        phases_on_kascade,
        server_facts,
    )
    from kascade_sglang.settings import announce

    if getattr(server_args, "_resolution_finished", False) or not phases_on_kascade(server_args):
        return original(server_args)
    try:
        require_supported_host()
        if not server_args.disable_cuda_graph and (_compares() or not has_gpu()):
            logger.warning(
                "kascade: CUDA graphs are off, attention runs through the torch reference"
            )
            server_args.disable_cuda_graph = True
        try:
            original(server_args)
        except Exception as error:
            # SGLang may stumble over what is refused anyway; our sentences are clearer.
            if reasons := _reasons_known_early(server_args):
                raise KascadeError("\n".join(reasons)) from error
            raise
        facts = server_facts(server_args)
        config = check(facts)
        accept(config, facts.phases, facts.model.context)
        announce(config.changed)
        serves = " ".join(f"{name}={value}" for name, value in in_force(config).items())
        logger.info("kascade: serves with %s", serves)
    except KascadeError as error:
        if getattr(server_args, FROM_COMMAND_LINE, False):
            raise SystemExit(f"kascade: {lines(error)}") from None
        raise


def _compares() -> bool:
    """Whether keys are selected otherwise than the method does, to compare it."""
    from kascade_sglang.settings import read_settings

    # What cannot be read is refused later, with all else.
    with suppress(KascadeError):
        return read_settings(None).selection != "topk"
    return False


def _reasons_known_early(server_args: Any) -> list[str]:
    """Return what ServerArgs that SGLang could not resolve are refused for."""
    from kascade_sglang.checks import flag_reasons, model_reasons
    from kascade_sglang.host.server import refused_flags, unsupported
    from kascade_sglang.settings import read_settings

    reasons = list(flag_reasons(refused_flags(server_args)))
    with noted(reasons):
        read_settings(None)
    # Where SGLang cannot read the model's config, that is the error to show.
    with suppress(Exception):
        reasons += model_reasons(unsupported(server_args))
    return reasons
