"""A decode batch on shuffled pages, and what the float64 reference says about it."""

from dataclasses import dataclass

import torch

from kascade_kernels import reference
from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.copy_keys import allocate_key_copy, copy_keys
from kascade_kernels.decode_lists import Budgets, Spans, decode_lists
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.find_shared_prefixes import SharedPrefix, find_shared_prefixes
from kascade_kernels.merge_parts import Parts
from kascade_kernels.reference import pool_heads
from kascade_kernels.structs import KeyCopy, Lists, PoolKeys, Rows
from tests.support.shapes import DEVICE


@dataclass
class DecodeCase:
    """Requests of the given lengths, each with one new query at its end; sinks: [Hq] or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    rows: Rows
    lengths: list[int]
    scale: float
    sinks: torch.Tensor | None = None

    @staticmethod
    def make(
        lengths: list[int],
        kv_heads: int = 2,
        group: int = 4,
        dim: int = 32,
        page_size: int = 1,
        dtype: torch.dtype = torch.float16,
        spread: float = 2.0,
        seed: int = 0,
        stored: torch.dtype | None = None,
    ) -> "DecodeCase":
        """Draw requests; ``stored``: type of keys and values, where it is not that of queries."""
        generator = torch.Generator().manual_seed(seed)
        pages = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(pages), generator=generator) + 1
        table = torch.zeros(len(lengths) + 2, max(lengths) + 7, dtype=torch.int32)
        requests = torch.randperm(len(lengths), generator=generator) + 1
        for request, length, own in zip(requests, lengths, order.split(pages), strict=True):
            slots = own[:, None] * page_size + torch.arange(page_size)
            table[request, :length] = slots.flatten()[:length].to(torch.int32)
        slots = (sum(pages) + 1) * page_size

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

        return DecodeCase(
            spread * draw(len(lengths), kv_heads * group, dim),
            draw(slots, kv_heads, dim).to(stored or dtype),
            draw(slots, kv_heads, dim).to(stored or dtype),
            table.to(DEVICE),
            Rows(requests.to(DEVICE), torch.tensor(lengths).to(DEVICE)),
            lengths,
            dim**-0.5,
        )

    def share(self, rows: list[int], keys: int) -> None:
        """Let rows begin with the same slots, those of the first of them."""
        requests = self.rows.requests[rows]
        self.req_to_token[requests, :keys] = self.req_to_token[requests[0], :keys]

    def slots_of(self, row: int) -> torch.Tensor:
        """Slots of a row's positions, in order."""
        table = self.req_to_token[self.rows.requests[row]]
        return table[: self.lengths[row]].to(torch.int64)

    def scores(self, row: int, pooled: bool = False) -> torch.Tensor:
        """Float64 scores of a row's candidates, [H or 1, candidates]."""
        keys = self.k[self.slots_of(row)].double()
        scores = reference.decode_scores(self.q[row].double(), keys, self.scale, self.sinks)
        return pool_heads(scores) if pooled else scores

    def spans(self, budget: Budget, batch_invariant: bool = False) -> Spans:
        """How a step over these rows is cut into programs."""
        heads, invariant = self.k.shape[1], batch_invariant
        spans = Spans.allocate(len(self.lengths), heads, DEVICE, batch_invariant=invariant)
        counts = torch.empty(len(self.lengths), heads, dtype=torch.int32, device=DEVICE)
        budgets = Budgets.of([budget] * len(self.lengths), DEVICE)
        decode_lists(self.rows.ends, heads, budgets, spans, counts, batch_invariant=invariant)
        return spans

    def shared(self, spans: Spans) -> SharedPrefix:
        """What the rows have in common."""
        group = self.q.shape[1] // self.k.shape[1]
        shared = SharedPrefix.allocate(len(self.lengths), group, DEVICE)
        find_shared_prefixes(self.req_to_token, self.rows, spans, shared)
        return shared

    def score(
        self,
        keys: torch.Tensor | KeyCopy,
        spans: Spans,
        lists: Lists,
        scratch: ScoreScratch,
        parts: Parts,
        values: torch.Tensor | None = None,
        shared: SharedPrefix | None = None,
        v_scale: float | None = None,
        pool: "PoolCase | None" = None,
    ) -> torch.Tensor | None:
        """Score these rows' candidates, and attend to all keys where ``values`` are given.

        shared: what is taken for common to rows; None finds it. pool: what is scored instead.
        """
        shared = self.shared(spans) if shared is None else shared
        rows = self.rows if pool is None else pool.rows
        where = (self.req_to_token, rows, lists, spans, shared, self.scale)
        keys_of = None if pool is None else pool.keys
        more = {"v_scale": v_scale, "sinks": self.sinks, "pool": keys_of}
        return decode_scores(self.q, keys, *where, scratch, parts, values, **more)

    def counts(self, per_row: int, budget: Budget) -> list[list[int]]:
        """Keys before the own tile that each list of each row holds by a budget."""
        return [[budget.selected(tile_of(length - 1))] * per_row for length in self.lengths]

    def key_copy(self) -> KeyCopy:
        """The 8-bit copy of all keys."""
        copy = allocate_key_copy(*self.k.shape, DEVICE)
        copy_keys(self.k, torch.arange(len(self.k), device=DEVICE), copy)
        return copy

    def own(self, row: int) -> int:
        """Keys of a row's own tile, up to its query."""
        return (self.lengths[row] - 1) % TILE + 1

    def lists(self, counts: list[list[int]], *, append_own: bool) -> Lists:
        """Lists that hold so many keys before the own tile; unwritten slots are -1."""
        own = [self.own(row) if append_own else 0 for row in range(len(counts))]
        held = torch.tensor(
            [[n + more for n in row] for row, more in zip(counts, own, strict=True)]
        )
        room = int(held.max()) + TILE
        return Lists(
            torch.full((held.numel() * room,), -1, dtype=torch.int32, device=DEVICE),
            torch.arange(held.numel(), device=DEVICE).view_as(held) * room,
            held.to(torch.int32).to(DEVICE),
        )


def list_of(lists: Lists, row: int, index: int) -> torch.Tensor:
    """One list's slots, int64 [count]."""
    offset, count = int(lists.offsets[row, index]), int(lists.counts[row, index])
    return lists.slots[offset : offset + count].to(torch.int64)


def lists_of(lists: Lists, row: int) -> torch.Tensor:
    """A row's lists where they are of one length, int64 [lists, count]."""
    return torch.stack([list_of(lists, row, index) for index in range(lists.per_row)])


@dataclass
class PoolCase:
    """Candidate pools of a case's rows, drawn at random: a case of shorter rows.

    rows: with pools' lengths as ends. lengths: these. keys: what the kernels take.
    """

    case: DecodeCase
    rows: Rows
    lengths: list[int]
    keys: PoolKeys

    @staticmethod
    def make(case: DecodeCase, tiles: int, per_row: int, seed: int = 0) -> "PoolCase":
        """Draw pools of so many tiles, or of all that rows have; heads borrow in reverse order."""
        generator = torch.Generator().manual_seed(seed)
        before = [TILE * tile_of(length - 1) for length in case.lengths]
        counts = [[min(TILE * tiles, candidates)] * per_row for candidates in before]
        lists = case.lists(counts, append_own=True)
        for row, candidates in enumerate(before):
            for index in range(per_row):
                places = torch.randperm(candidates, generator=generator)[: counts[row][index]]
                own = torch.arange(candidates, case.lengths[row])
                slots = case.slots_of(row)[torch.cat([places.sort().values, own]).to(DEVICE)]
                first = int(lists.offsets[row, index])
                lists.slots[first : first + len(slots)] = slots.to(torch.int32)
        heads = case.k.shape[1]
        head_map = [0] * heads if per_row == 1 else [*reversed(range(heads))]
        ends = lists.counts[:, 0].contiguous()
        keys = PoolKeys(lists, torch.tensor(head_map, dtype=torch.int32, device=DEVICE))
        return PoolCase(case, Rows(case.rows.requests, ends), ends.tolist(), keys)

    def slots_of(self, row: int) -> torch.Tensor:
        """Slots of a row's pool by KV head, own tile included, int64 [H, length]."""
        return lists_of(self.keys.lists, row)[self.keys.head_map.long()]

    def counts(self, per_row: int, budget: Budget) -> list[list[int]]:
        """Keys to select before the own tile: the budget's of the whole row."""
        return self.case.counts(per_row, budget)

    def scores(self, row: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Scores of a row's pools by KV head, [H, keys before the own tile]."""
        case, slots = self.case, self.slots_of(row)
        own = case.own(row)
        keys = reference.pool_keys(case.k, slots[:, :-own], slots[0, -own:]).to(dtype)
        return reference.decode_scores(case.q[row].to(dtype), keys, case.scale, case.sinks)
