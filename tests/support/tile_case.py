"""Extends of several requests on shuffled pages, cut into tiles, and what float64 says of them."""

from dataclasses import dataclass, replace

import torch

from kascade_kernels import reference
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.structs import Lists, Rows
from kascade_kernels.tile_lse import tile_lse
from tests.support.shapes import DEVICE


@dataclass
class TileCase:
    """Requests with keys up to some length, whose last tokens are queries.

    places: (request, end, first query in q, queries) of each row. Slots that hold no key are NaN.
    sinks: [Hq], where heads have them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    places: list[tuple[int, int, int, int]]
    scale: float
    sinks: torch.Tensor | None = None

    @staticmethod
    def make(
        extends: list[tuple[int, int]],
        kv_heads: int = 2,
        group: int = 4,
        dim: int = 32,
        page_size: int = 1,
        dtype: torch.dtype = torch.float16,
        spread: float = 2.0,
        seed: int = 0,
        stored: torch.dtype | None = None,
    ) -> "TileCase":
        """Make requests of (positions that a cache held, length).

        stored: type of keys and values, where it is not that of queries.
        """
        generator = torch.Generator().manual_seed(seed)
        pages = [-(-length // page_size) for _, length in extends]
        order = torch.randperm(sum(pages), generator=generator) + 1
        table = torch.zeros(len(extends) + 2, max(end for _, end in extends) + 7, dtype=torch.int32)
        requests = (torch.randperm(len(extends), generator=generator) + 1).tolist()
        places, tokens = [], 0
        for request, (start, length), own in zip(
            requests, extends, order.split(pages), strict=True
        ):
            slots = own[:, None] * page_size + torch.arange(page_size)
            table[request, :length] = slots.flatten()[:length].to(torch.int32)
            while start < length:
                end = min(TILE * (tile_of(start) + 1), length)
                places.append((request, end, tokens, end - start))
                tokens, start = tokens + end - start, end
        pool = torch.full(((sum(pages) + 1) * page_size, kv_heads, dim), float("nan"))
        used = table[table > 0].long()
        k, v = pool.clone(), pool.clone()
        for cache in (k, v):
            cache[used] = torch.randn(len(used), kv_heads, dim, generator=generator)
        q = torch.randn(tokens, kv_heads * group, dim, generator=generator) * spread
        caches = (cache.to(DEVICE, stored or dtype) for cache in (k, v))
        return TileCase(q.to(DEVICE, dtype), *caches, table.to(DEVICE), places, dim**-0.5)

    @property
    def rows(self) -> Rows:
        """The places as the kernels take them."""
        columns = zip(*self.places, strict=True)
        return Rows(*(torch.tensor(column, dtype=torch.int32).to(DEVICE) for column in columns))

    def only(self, chosen: list[int]) -> "TileCase":
        """The same requests with these rows, in this order."""
        places = [self.places[row] for row in chosen]
        return replace(self, places=places)

    def slots_of(self, row: int) -> torch.Tensor:
        """Slots of the positions that a row's last query sees."""
        request, end, _, _ = self.places[row]
        return self.req_to_token[request, :end].long()

    def queries_of(self, row: int) -> torch.Tensor:
        """A row's queries, [count, Hq, D]."""
        _, _, first, count = self.places[row]
        return self.q[first : first + count]

    def lists(self, budget: Budget, per_row: int = 2) -> Lists:
        """Lists as long as a budget says, of which nothing is to be read but their lengths."""
        counts = [[budget.selected(tile_of(end - 1))] * per_row for _, end, _, _ in self.places]
        held = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        unread = torch.empty(0, dtype=torch.int32, device=DEVICE)
        return Lists(unread, torch.zeros_like(held, dtype=torch.int64), held)

    def is_dense(self, row: int, budget: Budget) -> bool:
        """Whether the budget covers all of a row's candidates."""
        return budget.is_dense(tile_of(self.places[row][1] - 1))

    def scores(self, row: int) -> torch.Tensor:
        """Float64 scores of a row's candidates, [H, candidates]."""
        keys = self.k[self.slots_of(row)].double()
        return reference.tile_scores(self.queries_of(row).double(), keys, self.scale, self.sinks)

    def exact_lse(self, row: int, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Float64 log-sum-exps of a row, [H, count * group], rows query-major."""
        keys = self.k[self.slots_of(row)].double()
        q = self.queries_of(row).double()
        return reference.tile_lse(q, keys, self.scale, weight, self.sinks)

    def lse(self, budget: Budget, **options: object) -> torch.Tensor:
        """What ``tile_lse`` makes of these rows where a budget says how long lists are."""
        where = (self.req_to_token, self.rows, self.lists(budget, self.k.shape[1]))
        return tile_lse(self.q, self.k, *where, self.scale, sinks=self.sinks, **options)

    def draw_lists(self, counts: list[int], heads: int) -> list[torch.Tensor]:
        """Some candidates of every row, ascending by position, as slots: int64 [heads, count]."""
        generator = torch.Generator().manual_seed(1)
        lists = []
        for row, count in enumerate(counts):
            slots = self.slots_of(row)
            own = TILE * tile_of(len(slots) - 1)
            picks = [torch.randperm(own, generator=generator)[:count] for _ in range(heads)]
            lists.append(slots[torch.stack(picks).sort(dim=1).values.to(DEVICE)])
        return lists


def pack_lists(rows: list[list[torch.Tensor]] | list[torch.Tensor]) -> Lists:
    """Pack every row's lists of slots, the last row's first: offsets say where."""
    flat = [one for row in reversed(rows) for one in row]
    held = torch.tensor([len(one) for one in flat], dtype=torch.int32)
    offsets = (held.cumsum(0) - held).view(len(rows), -1).flip(0)
    slots = torch.cat([*flat, flat[0].new_zeros(1)]).to(torch.int32)  # Never empty: an address.
    counts = held.view(len(rows), -1).flip(0)
    where = offsets.to(torch.int64).contiguous()
    return Lists(slots, where.to(DEVICE), counts.contiguous().to(DEVICE))
