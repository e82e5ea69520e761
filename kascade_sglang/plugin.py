"""Entry point ``sglang.srt.plugins``: make the ``kascade`` backend known to SGLang.

SGLang swallows exceptions raised here, so nothing is checked: the factory checks and refuses.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kascade_sglang.backend.backend import KascadeAttnBackend
    from kascade_sglang.host.runtime import ModelRunner


def register() -> None:
    """Register the backend and the hooks; called once in every process that SGLang starts."""
    import kascade_patches
    from kascade_sglang.host.server import register_backend

    register_backend(create_backend)
    kascade_patches.register_hooks()


def create_backend(runner: "ModelRunner") -> "KascadeAttnBackend":
    """Build the backend for one model runner; raises KascadeError where it cannot be right.

    All checks run again: ServerArgs may have been made before the plugin was loaded.
    """
    import kascade_patches
    from kascade_sglang.asks import accept
    from kascade_sglang.backend.backend import KascadeAttnBackend
    from kascade_sglang.checks import check
    from kascade_sglang.errors import KascadeError
    from kascade_sglang.host.release import require_supported_host
    from kascade_sglang.host.runtime import require_runner
    from kascade_sglang.host.server import require_hooks, worker_facts
    from kascade_sglang.host.speculation import NGRAM

    require_supported_host()
    facts = worker_facts(runner)
    of_ngram = kascade_patches.OF_NGRAM if facts.speculates_by == NGRAM else ()
    of_hicache = kascade_patches.OF_HICACHE if facts.hicache else ()
    require_hooks([*kascade_patches.targets(), *kascade_patches.hook_now(of_ngram + of_hicache)])
    of_pool = ("window_pool",) if facts.model.window_pool else ("pool_cell_size", "pool_sizes")
    kascade_patches.require_ran(*of_pool)
    config = check(facts)
    if facts.gpu and config.selection != "topk" and facts.captured_decode:
        raise KascadeError(
            f"CUDA graphs: expected none with selection {config.selection}, which runs eagerly, "
            f"got graphs of up to {facts.captured_decode} requests; call "
            "sglang.srt.plugins.load_plugins() before ServerArgs(...), or pass "
            "disable_cuda_graph=True"
        )
    require_runner(runner, config.window_of, config.kv_cache_dtype, config.dense_backend)
    accept(config, facts.phases, facts.model.context)
    kascade_patches.hook_informing()
    return KascadeAttnBackend(runner, config)
