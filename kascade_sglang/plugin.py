"""Entry point ``sglang.srt.plugins``: make the ``kascade`` backend known to SGLang.

SGLang swallows exceptions raised here, so nothing is checked: the factory checks and refuses.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kascade_sglang.backend.backend import KascadeAttnBackend
    from kascade_sglang.compat import ModelRunner


def register() -> None:
    """Register the backend and the hooks; called once in every process that SGLang starts."""
    import kascade_patches
    from kascade_sglang.compat import register_backend

    register_backend(create_backend)
    kascade_patches.register_hooks()


def create_backend(runner: "ModelRunner") -> "KascadeAttnBackend":
    """Build the backend for one model runner; raises KascadeError where it cannot be right."""
    import kascade_patches
    from kascade_sglang.backend.backend import KascadeAttnBackend
    from kascade_sglang.checks import check_runner
    from kascade_sglang.compat import require_hooks

    require_hooks(kascade_patches.targets())
    return KascadeAttnBackend(runner, check_runner(runner))
