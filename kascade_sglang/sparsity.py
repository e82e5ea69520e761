"""How many keys one request reads: what the budget says, for reports about single requests."""

from dataclasses import dataclass

from kascade_kernels.budget import tile_of
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import LayerRole


@dataclass(frozen=True)
class KeyReads:
    """Keys read per query and KV head, summed over layers and queries.

    attended: K and V read by attention. scored: K read by an anchor's selection.
    dense: what dense attention reads.
    """

    attended: int
    scored: int
    dense: int


def key_reads(config: KascadeConfig, begin: int, end: int) -> KeyReads:
    """Count the reads of the queries at positions [begin, end) through all layers."""
    plan, budget = config.plan, config.budget
    roles = [plan.role(layer) for layer in range(plan.shape.layers)]
    selecting = roles.count(LayerRole.DENSE) + roles.count(LayerRole.ANCHOR)
    sparse = len(roles) - roles.count(LayerRole.DENSE)
    visible = sum(position + 1 for position in range(begin, end))
    scored = sum(
        position + 1 for position in range(begin, end) if not budget.is_dense(tile_of(position))
    )
    attended = sum(budget.attended(position) for position in range(begin, end))
    return KeyReads(
        attended=sparse * attended + roles.count(LayerRole.DENSE) * visible,
        scored=selecting * scored,
        dense=len(roles) * visible,
    )
