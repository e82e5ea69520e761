"""A decode batch on shuffled pages, and what the float64 reference says about it."""

from dataclasses import dataclass

import torch

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_kernels.decode_scores import ScoreScratch, decode_scores
from kascade_kernels.decode_spans import Spans, decode_spans
from kascade_kernels.merge_parts import Parts
from kascade_kernels.reference import anchor_scores, pool_heads
from kascade_kernels.shared_prefix import SharedPrefix, find_shared_prefixes
from kascade_kernels.structs import KeyCopy, Rows, Selection
from shapes import DEVICE


@dataclass
class DecodeCase:
    """Requests of the given lengths, each with one new query at its end."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    req_to_token: torch.Tensor
    rows: Rows
    lengths: list[int]
    scale: float

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
    ) -> "DecodeCase":
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
            draw(slots, kv_heads, dim),
            draw(slots, kv_heads, dim),
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
        scores = anchor_scores(self.q[row : row + 1].double(), keys, self.scale)
        return pool_heads(scores) if pooled else scores

    def spans(self, budget: Budget, batch_invariant: bool = False) -> Spans:
        """How a step over these rows is cut into programs."""
        heads, invariant = self.k.shape[1], batch_invariant
        spans = Spans.allocate(len(self.lengths), heads, DEVICE, batch_invariant=invariant)
        decode_spans(self.rows.ends, heads, budget, spans, batch_invariant=batch_invariant)
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
        budget: Budget,
        scratch: ScoreScratch,
        parts: Parts,
        values: torch.Tensor | None = None,
        shared: SharedPrefix | None = None,
    ) -> torch.Tensor | None:
        """Score these rows' candidates, and attend to all keys where ``values`` are given.

        shared: what is taken for common to rows; None finds it.
        """
        shared = self.shared(spans) if shared is None else shared
        where = (self.req_to_token, self.rows, spans, shared, budget, self.scale)
        return decode_scores(self.q, keys, *where, scratch, parts, values)

    def empty_selection(self, lists: int, budget: Budget) -> Selection:
        """Room for the longest list of every row; unwritten slots are -1."""
        room = lists * max(budget.selected(tile_of(n - 1)) + TILE for n in self.lengths)
        rows = len(self.lengths)
        return Selection(
            torch.full((rows * room,), -1, dtype=torch.int32, device=DEVICE),
            torch.arange(rows, device=DEVICE) * room,
            torch.full((rows,), -1, dtype=torch.int32, device=DEVICE),
            lists,
        )


def lists_of(selection: Selection, row: int) -> torch.Tensor:
    """A row's lists, int64 [heads, count]."""
    count, offset = int(selection.counts[row]), int(selection.offsets[row])
    end = offset + selection.heads * count
    return selection.slots[offset:end].view(selection.heads, count).to(torch.int64)
