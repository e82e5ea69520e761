"""Find the last slot of a prefix in torch where there is no GPU (page sizes above 1).

Why: this function has its own list of backend names that do without Triton.
How: around it, call SGLang's torch version. Registered only on machines without a GPU.
Remove when: SGLang asks the platform (its 0.5.23 does).
"""

from collections.abc import Callable

import torch

TARGET = "sglang.srt.mem_cache.allocation.get_last_loc"
KIND = "AROUND"


def hook(
    original: Callable[..., torch.Tensor],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> torch.Tensor:
    """Return the slot before each request's first new token, -1 where there is none."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices, prefix_lens)
