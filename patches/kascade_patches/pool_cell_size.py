"""Count the 8-bit key copies as part of a token's KV cache.

Why: the pool takes what memory is left, and the copies, which grow with it, come after it.
How: after SGLang has computed a token's bytes, add the copies'.
Remove when: backends can declare memory that grows with the pool.
"""

from typing import Any

TARGET = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
KIND = "AFTER"


def hook(cell_size: int, configurator: Any, kvc: Any, num_layers: int) -> int:
    """Return the bytes of one token, copies included; notes our scratch for the pool's size."""
    from kascade_sglang.backend.memory import reserved_memory
    from kascade_sglang.checks import check
    from kascade_sglang.host.server import phases_on_kascade, server_facts

    configurator.kascade_scratch = 0
    if not phases_on_kascade(kvc.server_args):
        return cell_size
    facts = server_facts(kvc.server_args, kvc.kv_cache_dtype)
    reserved = reserved_memory(facts, check(facts))
    configurator.kascade_scratch = reserved.scratch
    return cell_size + reserved.per_token
