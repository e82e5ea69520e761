"""Shapes that several launches share."""

import torch
import triton

from kascade_kernels._triton import _primitives, _tile_lse, _tiles
from kascade_kernels._triton._primitives import TILE
from kascade_kernels.structs import PoolKeys

LOG2_E = _primitives.LOG2_E.value
"""Kernels take logits in base 2."""
KERNEL_TILE = TILE.value
"""Positions that share a selection, as the kernels are written."""
EDGE = _tile_lse.EDGE.value
"""Candidates at either end that a sampled log-sum-exp reads one by one."""
PRODUCT_ROWS = _tiles.MAX_ROWS.value
"""Query rows of one product in prefill, at most."""


def padded_group(group: int) -> int:
    """Rows of the product's left operand: tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(group))


def pool_arguments(pool: PoolKeys | None) -> dict[str, torch.Tensor | None]:
    """Return what kernels take of pools that are scored; without them they compile as before."""
    lists, head_map = (None, None) if pool is None else pool
    return {"pool_offsets": lists and lists.offsets, "pool_map": head_map}
