"""A step through the torch reference, tile by tile: on a CPU, and for comparisons anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kascade_kernels.reference import sparse_attention
from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.metadata import StepMetadata
from kascade_sglang.backend.selectors import SELECTORS, Case
from kascade_sglang.compat import key_value_caches
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError

if TYPE_CHECKING:
    from kascade_sglang.compat import ForwardBatch, ModelRunner, RadixAttention

Selection = list[torch.Tensor]
"""For every tile row of the step, int64 [KV heads, selected] slots."""


class ReferencePath:
    """Prefill and decoding alike: decoding is the case of one new token a request."""

    delegates_dense = True

    def __init__(self, runner: ModelRunner, config: KascadeConfig, store: IndexStore) -> None:
        self._table = runner.req_to_token_pool.req_to_token
        self._pool = runner.token_to_kv_pool
        self._config = config
        self._store = store
        self.step: StepMetadata | None = None

    def reserve(self, rows: int) -> None:
        """Refuse capture: eager torch chooses shapes by length, which a graph would freeze."""
        raise KascadeError("CUDA graphs: this path computes eagerly; pass --disable-cuda-graph")

    def begin(self, batch: ForwardBatch) -> None:
        """Cut this step's queries into tiles."""
        self.step = StepMetadata.build(batch, self._table, self._config.budget)

    def select(self, q: torch.Tensor, layer: RadixAttention) -> None:
        """Select for every tile and keep the lists."""
        keys, _ = key_value_caches(self._pool, layer.layer_id)
        selection = select(q, keys, self.step, self._config, layer.layer_id, layer.scaling)
        self._store.put(layer.layer_id, selection)

    def attend(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """Attend every tile to its selection and to itself."""
        keys, values = key_value_caches(self._pool, layer.layer_id)
        selection, head_map = self._store.get(layer.layer_id)
        mapped = [slots[head_map] for slots in selection]
        return attend(q, keys, values, self.step, mapped, layer.scaling)


def select(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    step: StepMetadata,
    config: KascadeConfig,
    layer_id: int,
    scale: float,
) -> Selection:
    """Select every tile's keys.

    q: [tokens, Hq, D]. k_cache: [slots, H, D], this step's keys already stored.
    Returns for each tile int64 [H, selected] slots, ascending by position.
    """
    selector, heads = SELECTORS[config.selection], k_cache.shape[1]
    selection, request, keys = [], -1, None
    for row in step.rows:
        if row.request != request:
            request, keys = row.request, None
        if row.is_dense:
            positions = torch.arange(row.selected, device=q.device).unsqueeze(0)
        else:
            if keys is None:
                # One gather a request, in the working precision, serves all its tiles.
                keys = k_cache[step.slots[request]]
                keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            queries = q[row.start : row.start + row.count]
            case = Case(queries, keys[: row.end], row.selected, layer_id, scale, config.pooled)
            positions = selector(case)
        selection.append(step.slots[request][positions.expand(heads, -1)])
    return selection


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: StepMetadata,
    selection: Selection,
    scale: float,
) -> torch.Tensor:
    """Attend every tile to its selected keys and, causally, to itself.

    q: [tokens, Hq, D]; rows past the step's last token are padding and come back as zeros.
    Returns [tokens, Hq, D].
    """
    out = torch.zeros_like(q)
    for row, selected in zip(step.rows, selection, strict=True):
        rows = slice(row.start, row.start + row.count)
        own = step.slots[row.request][row.own_start : row.end]
        out[rows] = sparse_attention(q[rows], k_cache, v_cache, selected, own, scale)
    return out
