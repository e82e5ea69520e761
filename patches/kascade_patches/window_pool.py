"""Leave room beside the KV pools of models whose layers with a window have one of their own.

Why: these pools take what memory is left; the 8-bit key copies and the scratch come after them.
How: after SGLang has computed the bytes of a token, add the copies', which have the slots of the
    other layers' pool; and take the scratch off what is available for both pools.
Remove when: backends can declare the memory they need.
"""

from typing import Any

TARGET = "sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__"
KIND = "AFTER"


def hook(result: None, configurator: Any, kvc: Any) -> None:
    """Add to what the configurator has counted; classes derived from it are made by it, too."""
    from kascade_sglang.backend.memory import reserved_memory
    from kascade_sglang.checks import check
    from kascade_sglang.host.server import phases_on_kascade, server_facts

    if not phases_on_kascade(kvc.server_args):
        return
    facts = server_facts(kvc.server_args, kvc.kv_cache_dtype)
    reserved = reserved_memory(facts, check(facts))
    configurator._cell_size += reserved.per_token
    # What sizes the other pool apart counts a token by layers.
    configurator._full_per_token += reserved.per_token / configurator._full_layers_num
    sizes = configurator.calculate_pool_sizes

    def less_scratch(available_bytes: int, page_size: int) -> Any:
        return sizes(max(available_bytes - reserved.scratch, 0), page_size)

    configurator.calculate_pool_sizes = less_scratch
