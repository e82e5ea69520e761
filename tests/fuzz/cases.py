"""What a launch computes on: requests of drawn lengths and logits, and what was found wrong."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kascade_kernels import reference
from kascade_kernels.budget import TILE
from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from kascade_kernels.structs import KeyCopy
from tests.support.shapes import DEVICE

ON_GPU = DEVICE == "cuda"
LONG = 3072 if ON_GPU else 192
"""Positions of a row of the slot table: one width, so that kernels are compiled once."""
REQUESTS = 32 if ON_GPU else 3
"""Of one launch."""
EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)


class Shape(NamedTuple):
    """What kernels are compiled for.

    pooled: one list for all heads. eight_bit: select by 8-bit copies of the keys.
    batch_invariant: cut decode rows by their own lengths alone.
    """

    kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype
    pooled: bool = False
    eight_bit: bool = False
    batch_invariant: bool = False

    @property
    def lists(self) -> int:
        """Lists of each row."""
        return 1 if self.pooled else self.kv_heads


SHAPES = (
    Shape(2, 4, 128 if ON_GPU else 32, torch.bfloat16, eight_bit=True),
    Shape(1, 7, 64 if ON_GPU else 16, torch.float16, batch_invariant=True),
    Shape(2, 16, 64 if ON_GPU else 32, torch.float16, pooled=True, eight_bit=True),
    Shape(1, 1, 256 if ON_GPU else 64, torch.bfloat16),
)
SPREADS = {"usual": 2.0, "flat": 1e-3, "steep": 60.0, "huge": 1e4}
"""Queries' standard deviation; that of keys and values is 1."""
WEIGHTS = {"usual": 4, "flat": 2, "steep": 3, "huge": 2, "infinite": 3, "nothing": 1, "nan": 2}
"""How often a request has which logits.

infinite: some keys' are +inf for a part of the queries, -inf for the others.
nothing: all are -inf. nan: some numbers of q, k or v are NaN.
"""


def draw_length(draw: random.Random, most: int = LONG) -> int:
    """Draw a length: around the edges of tiles, or any."""
    return draw.choice(EDGES) if draw.random() < 0.4 else draw.randint(1, most)


@dataclass
class Requests:
    """Requests on shuffled pages; slots that hold no key are NaN.

    k, v: [slots, H, D]. table: int32 [requests + 2, LONG]. rows: a request's row of the table.
    logits: what each request's are like, by the names in ``WEIGHTS``.
    """

    lengths: list[int]
    logits: list[str]
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    rows: list[int]
    generator: torch.Generator

    @staticmethod
    def draw(draw: random.Random, shape: Shape) -> "Requests":
        """Draw lengths, pages, keys and values; ``queries`` then makes the logits."""
        lengths = [draw_length(draw) for _ in range(REQUESTS)]
        logits = draw.choices(list(WEIGHTS), list(WEIGHTS.values()), k=REQUESTS)
        page = draw.choice((1, 2, 16, 32, 64))
        pages = [-(-length // page) for length in lengths]
        on_cpu = torch.Generator().manual_seed(draw.getrandbits(31))
        order = torch.randperm(sum(pages), generator=on_cpu) + 1
        table = torch.zeros(REQUESTS + 2, LONG, dtype=torch.int32)
        rows = draw.sample(range(1, REQUESTS + 1), REQUESTS)
        for row, length, own in zip(rows, lengths, order.split(pages), strict=True):
            slots = own[:, None] * page + torch.arange(page)
            table[row, :length] = slots.flatten()[:length].to(torch.int32)
        generator = torch.Generator(DEVICE).manual_seed(draw.getrandbits(31))
        used = table[table > 0].long().to(DEVICE)
        pools = []
        for _ in "kv":
            size = ((sum(pages) + 1) * page, shape.kv_heads, shape.dim)
            pool = torch.full(size, float("nan"), dtype=shape.dtype, device=DEVICE)
            drawn = torch.randn(len(used), *size[1:], generator=generator, device=DEVICE)
            pool[used] = drawn.to(shape.dtype)
            pools.append(pool)
        return Requests(lengths, logits, *pools, table.to(DEVICE), rows, generator)

    def slots(self, request: int) -> torch.Tensor:
        """Slots of a request's keys, in order."""
        return self.table[self.rows[request], : self.lengths[request]].long()

    def queries(self, draw: random.Random, shape: Shape, tokens: list[int]) -> torch.Tensor:
        """Draw each request's queries, [all tokens, Hq, D], and change its keys as they ask for."""
        size = (sum(tokens), shape.kv_heads * shape.group, shape.dim)
        q = torch.randn(size, generator=self.generator, device=DEVICE)
        for request, own in enumerate(q.split(tokens)):
            own *= SPREADS.get(self.logits[request], 2.0)
            self._distort(draw, request, own)
        return q.to(shape.dtype)

    def _distort(self, draw: random.Random, request: int, q: torch.Tensor) -> None:
        logits, slots, first = self.logits[request], self.slots(request), q[..., 0]
        some = draw.sample(range(len(slots)), min(len(slots), draw.randint(1, 5)))
        if logits == "infinite":
            first.copy_((first.abs() + 1).copysign(first))
            self._infinite_keys(slots[some], float("inf"))
        elif logits == "nothing":
            first.abs_().add_(1)
            self._infinite_keys(slots, float("-inf"))
        elif logits == "nan":
            tensor = draw.choice((q, self.k, self.v))
            tensor[some[0] % len(q) if tensor is q else slots[some]] = float("nan")

    def _infinite_keys(self, slots: torch.Tensor, value: float) -> None:
        """Keys whose product with a query has the sign of the query's first number."""
        self.k[slots] = 0
        self.k[slots, :, 0] = value

    def logit_error(self, request: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Bound on what float32 sums err in a logit: 2^-20 of the largest sum of magnitudes."""
        q, k = (x.double().nan_to_num(0, 0, 0) for x in (q, self.k[self.slots(request)]))
        return 2**-20 * scale * q.norm(dim=-1).amax() * k.norm(dim=-1).amax()


class Findings:
    """Conditions on the device, looked at together: waiting for each would take longest."""

    def __init__(self) -> None:
        self._said: list[Callable[[], str]] = []
        self._hold: list[torch.Tensor] = []

    def expect(self, said: str | Callable[[], str], holds: torch.Tensor) -> None:
        """Note a condition, a bool tensor of any shape that must hold everywhere.

        said: what it is; a function where that takes computing, called if the condition fails.
        """
        self._said.append(said if callable(said) else lambda: said)
        self._hold.append(holds.all())

    def require(self) -> None:
        """Raise AssertionError unless all conditions held."""
        hold = torch.stack(self._hold).tolist() if self._hold else []
        wrong = [said for said, held in zip(self._said, hold, strict=True) if not held]
        first = "\n".join(said() for said in wrong[:5])
        assert not wrong, f"{len(wrong)} of {len(hold)} conditions fail:\n{first}"


@dataclass
class Attended:
    """What queries of one KV head attended to, and what came of it.

    q, out: [n, group, D]. k, v: [slots, 1, D]. selected, own: slots of the keys on the list, and
    of the own tile's, of which each query sees those up to its own.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    selected: torch.Tensor
    own: torch.Tensor
    scale: float
    out: torch.Tensor

    def check(self, findings: Findings, said: str, logit_error: torch.Tensor) -> None:
        """Expect the definition's output, NaN where that is, but for what rounding may err."""
        lists = (self.selected[None], self.own, self.scale)
        exact = reference.tile_attention(self.q.double(), self.k, self.v, *lists)
        bound = rounding(self.v) + 10 * logit_error
        off = (self.out.double() - exact).abs()
        right = (off <= bound) | (self.out.isnan() & exact.isnan())
        findings.expect(lambda: f"{said}{self._explain(exact, float(bound))}", right)

    def _explain(self, exact: torch.Tensor, bound: float) -> str:
        """Tell a kernel's fault from a bound that is too narrow."""
        keys, n = torch.cat([self.selected, self.own]), len(self.q)
        logits = self.q.transpose(0, 1) @ self.k[keys, 0].T * self.scale  # [group, n, keys]
        seen = torch.ones(n, len(keys), dtype=torch.bool, device=DEVICE).tril(len(keys) - n)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        eager = (weights @ self.v[keys, 0]).transpose(0, 1)
        off, eager_off, values, logits = (
            f"{float(x.double().nan_to_num(-torch.inf).max()):.3g}"
            for x in (
                (self.out.double() - exact).abs(),
                (eager.double() - exact).abs(),
                self.v[keys].abs(),
                logits.abs(),
            )
        )
        return (
            f": off by {off}, where eager attention is by {eager_off} and {bound:.3g} is allowed; "
            f"{len(keys)} keys, values to {values}, logits to {logits}, "
            f"NaN in {int(self.out.isnan().sum())} numbers for {int(exact.isnan().sum())}, "
            f"{self.out.dtype}"
        )


def copy_of(requests: Requests) -> KeyCopy:
    """The 8-bit copy of all requests' keys."""
    slots, heads, dim = requests.k.shape
    copy = allocate_key_copy(slots, heads, dim, DEVICE)
    copy_keys(requests.k, requests.table[requests.table > 0].long(), copy)
    return copy


def candidates_of(length: int) -> int:
    """Keys before the tile of a request's last position."""
    return (length - 1) // TILE * TILE


def draw_counts(draw: random.Random, candidates: int, lists: int) -> list[int]:
    """Draw how long a row's lists are: nothing, everything, anything."""
    return [
        draw.choice((0, candidates, draw.randint(0, candidates), draw.randint(0, candidates)))
        for _ in range(lists)
    ]


def rounding(values: torch.Tensor) -> float:
    """Rounding of weights and result of a mean of values that are drawn as here."""
    return 5.5 * torch.finfo(values.dtype).eps
