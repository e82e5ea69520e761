"""Rules of selection in prefill, in plain torch: what they keep for a run of query tiles.

A rule is written as parts joined by ``+``, in any order:

    sum | max | rootR | reserveN   how the rows of a tile are pooled: by sum (section 3.3), by the
                     maximum, by the sum of p**R, or by the sum with each row's N best keys first
    keysN            budget: at least N keys, own tile included (128)
    ratioX           budget: the share X of the keys up to the tile's end, own tile included
    massP            budget: the fewest keys whose loss is at most 1 - P of the tile's mass
    rowsP            budget: the fewest keys whose loss is at most 1 - P of every row's mass
    aboveX           budget: the keys with a pooled score over X
    floorX, ceilX    bounds of massP, rowsP and aboveX, shares of the keys
    windowN, sinkN   the N keys before the tile, or the first N, come first in a list
    tileN            positions in a query tile; 32 where nothing is said
    denseN           the first N layers attend to everything
    tailN            so do the prompt's last N positions
    anchorsA.B.C     only these layers select, the others borrow, head by head
    plan             so do a plan's anchors, and others borrow by its head maps

``dense`` alone keeps everything.
"""

import re
from dataclasses import dataclass

import torch

from kascade_sglang.errors import KascadeError

PART = re.compile(r"([a-z]+)([\d.]*)")


@dataclass(frozen=True)
class Rule:
    """One rule; see the module's own words. ``None`` and 0 mean that a part is absent."""

    name: str
    pool: str = "sum"
    pool_by: float = 0.0
    ratio: float | None = None
    mass: float | None = None
    rows: float | None = None
    above: float | None = None
    floor: float = 0.0
    ceil: float = 1.0
    window: int = 0
    sink: int = 0
    tile: int = 32
    dense: int = 0
    tail: int = 0
    keys: int = 128
    plan: bool = False
    anchors: tuple[int, ...] | None = None


def parse_rule(text: str) -> Rule:
    """Read a rule; raises KascadeError that names the part it does not know."""
    found: dict = {"name": text}
    for part in text.split("+"):
        match = PART.fullmatch(part)
        word, value = match.groups() if match else (part, "")
        if word in ("sum", "max", "root", "reserve"):
            found |= {"pool": word, "pool_by": float(value or 0)}
        elif word in ("ratio", "mass", "rows", "above", "floor", "ceil") and value:
            found[word] = float(value)
        elif word in ("window", "sink", "tile", "tail", "dense", "keys") and value:
            found[word] = int(value)
        elif word == "anchors" and value:
            found["anchors"] = tuple(int(layer) for layer in value.split("."))
        elif word == "plan" and not value:
            found["plan"] = True
        elif text == "dense":
            found["ratio"] = 1.0
        else:
            raise KascadeError(
                f"rule {text!r}: expected parts named in benchmarks/prefill_rules.py, got {part!r}"
            )
    return Rule(**found)


def pooled(rule: Rule, p: torch.Tensor) -> torch.Tensor:
    """Score keys for tiles. p: mass [H, tiles, rows, keys], 0 outside the candidates."""
    if rule.pool == "max":
        return p.amax(2)
    if rule.pool == "root":
        return p.pow(rule.pool_by).sum(2)
    scores = p.sum(2)
    if rule.pool == "reserve":
        best = p.topk(min(int(rule.pool_by), p.shape[-1]), dim=-1)
        first = torch.zeros_like(scores)
        first.scatter_reduce_(-1, best.indices.flatten(2), best.values.flatten(2), "amax")
        scores = scores + first * 1e6
    return scores


def kept_keys(rule: Rule, p: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Which candidates a rule keeps for each tile.

    p: float32 [H, tiles, rows, keys], each row's softmax over all keys that it sees, with 0 from
    its tile's first position on. ends: int64 [tiles], that first position: the candidates.
    Returns bool [H, tiles, keys].
    """
    keys = torch.arange(p.shape[-1], device=p.device)
    candidate = keys < ends[:, None]
    scores = pooled(rule, p).masked_fill(~candidate, -1.0)
    fixed = (keys < rule.sink) | (keys >= ends[:, None] - rule.window)
    scores = scores.masked_fill(fixed & candidate, torch.inf)
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    count = _counts(rule, p, ranked, ends)
    rank = torch.empty_like(ranked.indices)
    rank.scatter_(-1, ranked.indices, keys.expand_as(ranked.indices).contiguous())
    return (rank < count[..., None]) & candidate


def _counts(
    rule: Rule, p: torch.Tensor, ranked: torch.return_types.sort, ends: torch.Tensor
) -> torch.Tensor:
    """Length of each list, int64 [H, tiles]."""
    total = ends + rule.tile
    least = (total * rule.floor).long().clamp(min=rule.keys) - rule.tile
    most = (total * rule.ceil).long() - rule.tile
    order = ranked.indices
    if rule.ratio is not None:
        count = ((total * rule.ratio).long() - rule.tile).expand(order.shape[:2])
    elif rule.above is not None:
        count = (ranked.values > rule.above).sum(-1)
    elif rule.mass is not None:
        count = _enough(p.sum(2).gather(-1, order), p.shape[2] * (1 - rule.mass))
    else:
        each = p.gather(-1, order[:, :, None].expand_as(p))
        count = _enough(each, 1 - rule.rows).amax(-1)
    return torch.minimum(torch.maximum(torch.minimum(count, most), least), ends)


def _enough(mass: torch.Tensor, loss: float) -> torch.Tensor:
    """Fewest leading entries of the last dimension after which at most ``loss`` is left."""
    left = mass.sum(-1, keepdim=True) - mass.cumsum(-1)
    return (left > loss).sum(-1) + (mass.sum(-1) > loss)
