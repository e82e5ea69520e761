"""Queries and keys to try selection methods on: the demo model's, and heavy-tailed synthetic ones.

Both are rounded to bfloat16, as a GPU's KV pool holds them.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from kascade_kernels.budget import TILE, Budget, tile_of
from kascade_sglang.calibration.collect import sample_tiles
from kascade_sglang.calibration.hf_attention import dense_attention, our_attention
from kascade_sglang.calibration.hf_model import load_model
from kascade_sglang.demo.recipe.encoding import Encoder
from kascade_sglang.demo.recipe.rows import ANSWER, PAD, Chat
from kascade_sglang.plan.schema import load_plan
from kascade_sglang.servers.demo_model import MODEL
from kascade_sglang.text.books import load_books
from kascade_sglang.text.documents import TASKS, compose

DENSE_UP_TO = Budget(0.05)
"""Tiles that this budget covers prove nothing and are left out."""


class Sizes(NamedTuple):
    """How many cases to make: tiles and decode positions of each layer, and samples of both."""

    tiles: int
    positions: int
    samples: int


class Case(NamedTuple):
    """One tile or decode step of one layer: q [n, Hq, D], k [L, H, D] up to the last query's."""

    phase: str
    q: torch.Tensor
    k: torch.Tensor
    scale: float


def cases(
    q_at: Callable[[int, int], torch.Tensor],
    k: torch.Tensor,
    scale: float,
    tiles: Sequence[int],
    positions: Sequence[int],
) -> Iterator[Case]:
    """One layer's cases; ``q_at(start, n)`` gives the queries [n, Hq, D] at positions start..."""
    for tile in tiles:
        yield Case("prefill", q_at(TILE * tile, TILE), k[: TILE * (tile + 1)], scale)
    for position in positions:
        yield Case("decode", q_at(position, 1), k[: position + 1], scale)


def spread(places: Sequence[int], count: int) -> list[int]:
    """Up to ``count`` of the places, evenly spread, the last one included."""
    count = min(count, len(places))
    return [places[len(places) * (step + 1) // count - 1] for step in range(count)]


def demo_chat(length: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a chat of about ``length`` tokens, and the loss class of each of them."""
    chat = Chat(Encoder(MODEL))
    rng, questions = random.Random(f"mass-{seed}-{length}"), 4 * len(TASKS)
    counts = dict.fromkeys(TASKS, 4)
    texts = load_books()
    room = length - 40 * questions
    draft = compose(rng, "test", counts, room, chat.encoder.count, texts)
    items = list(draft.items)
    rng.shuffle(items)
    ids, kinds = chat.row(draft.pieces, items, length).tolist()
    used = max(place for place, kind in enumerate(kinds) if kind != PAD) + 1
    return ids[:used], kinds[:used]


def demo(length: int, sizes: Sizes) -> Iterator[Case]:
    """Cases of the demo model's anchor layers."""
    anchors = load_plan(MODEL / "kascade_plan.json").anchors
    model = load_model(str(MODEL), "float32", torch.device("cpu"))
    for seed in range(sizes.samples):
        ids, kinds = demo_chat(length, seed)
        kept: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}

        def record(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
        ) -> torch.Tensor:
            if layer in anchors:
                kept[layer] = q.bfloat16(), k.bfloat16(), scale  # noqa: B023
            return dense_attention(q, k, v, scale)

        with torch.inference_mode(), our_attention(model):
            model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False, kascade=record)
        # The token before a reply's token is the one whose query has to find it.
        asks = [place - 1 for place, kind in enumerate(kinds) if kind == ANSWER]
        first = tile_of(asks[0]) + 1
        even = sample_tiles(TILE * first, DENSE_UP_TO, sizes.tiles // 2, seed)
        tiles = even + spread(range(first, len(ids) // TILE), sizes.tiles - len(even))
        positions = spread(range(8 * TILE, asks[0]), sizes.positions // 4)
        positions += spread(asks, sizes.positions - len(positions))
        for q, k, scale in kept.values():
            yield from cases(lambda at, n, q=q: q[at : at + n], k, scale, tiles, positions)


class SyntheticHead:
    """Keys of one KV head, and queries to them, with heavy-tailed attention; group of 4.

    In nats, a query's logit to a key is the sum of
    * topics: 64 directions; runs of 16-128 tokens have one topic, drawn by Zipf (1 / rank); the
      tile wants 3 topics, drawn likewise, with 1-4 nats each, times 0.5-1.5 for each query head;
    * needles: every key has a direction of its own in 112 dimensions. Query heads and queries
      of a tile share 4 needles, each used with probability a half; a query has one of its own
      with a probability of 1/4 in even tiles, 1/32 in odd ones (about one query a head). The
      margin is uniform in 8-15 nats. Needles are not orthogonal: each adds noise of about 1 nat
      to every other key;
    * sink: ``sink`` nats at position 0, three quarters of it at 1-3;
    * distance: 6 nats at 0, a sum of 7 cosines from 1/2 to 1/2000 radians a token, as rotary
      embeddings give;
    * noise of 1 nat a query.
    A random rotation then mixes the 128 channels; 4 channels of K grow 8-10 times, those of q
    shrink by as much, which leaves the logits as they are.
    """

    dim, group, content = 128, 4, 112

    def __init__(self, length: int, seed: int, sink: float) -> None:
        self.seed, self.sink = seed, sink
        draw = self.draw = torch.Generator().manual_seed(seed)
        self.zipf = 1 / torch.arange(1, 65, dtype=torch.float32)
        self.topics = self._unit(64)
        runs = torch.randint(16, 129, (length // 16,), generator=draw)
        topic = torch.multinomial(self.zipf, len(runs), True, generator=draw)
        self.own = self._unit(length)
        content = self.own + self.topics[topic.repeat_interleave(runs)[:length]]
        sink_at = torch.zeros(length, 1)
        sink_at[:4, 0] = torch.tensor([1, 0.75, 0.75, 0.75])
        self.waves = 2.0 ** torch.linspace(-1, -math.log2(2000), 7)
        place = torch.arange(length, dtype=torch.float64)
        features = [content, sink_at, self._wave(place), torch.zeros(length, 1)]
        self.rotation = torch.linalg.qr(self._normal(self.dim, self.dim)).Q
        self.stretch = torch.ones(self.dim)
        outliers = torch.randperm(self.dim, generator=draw)[:4]
        self.stretch[outliers] = 8 + 2 * torch.rand(4, generator=draw)
        self.k = (torch.cat(features, 1) @ self.rotation * self.stretch).bfloat16()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw)

    def _unit(self, count: int) -> torch.Tensor:
        return torch.nn.functional.normalize(self._normal(count, self.content), dim=-1)

    def _wave(self, place: torch.Tensor) -> torch.Tensor:
        angle = place.unsqueeze(1) * self.waves.double()
        return torch.cat([angle.cos(), angle.sin()], 1).float()

    def queries(self, start: int, n: int) -> torch.Tensor:
        """Queries at positions start..start + n - 1, float32 [n, 4, 128]."""
        draw = self.draw.manual_seed(hash((self.seed, start, n)) % 2**40)

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(*shape, generator=draw)

        limit = TILE * tile_of(start)
        wanted = torch.multinomial(self.zipf, 3, generator=draw)
        topic = (uniform(1, 4, 3, 1) * self.topics[wanted]).sum(0)
        content = topic * uniform(0.5, 1.5, 1, self.group, 1)
        content = content + self._normal(n, self.group, self.content)
        for needle in torch.randint(4, limit, (4,), generator=draw).tolist():
            used = torch.rand(n, self.group, 1, generator=draw) < 0.5
            content = content + used * uniform(8, 15, 1, 1, 1) * self.own[needle]
        alone = torch.randint(4, limit, (n, self.group), generator=draw)
        rate = 1 / 4 if tile_of(start) % 2 == 0 else 1 / 32
        used = torch.rand(n, self.group, 1, generator=draw) < rate
        content = content + used * uniform(8, 15, n, self.group, 1) * self.own[alone]
        wave = self._wave(torch.arange(start, start + n, dtype=torch.float64)) * 6 / 7
        sink = torch.full((n, self.group, 1), self.sink)
        wave = wave.unsqueeze(1).expand(n, self.group, -1)
        q = torch.cat([content, sink, wave, torch.zeros(n, self.group, 1)], -1)
        return q @ self.rotation / self.stretch * math.sqrt(self.dim)


def synthetic(length: int, sizes: Sizes) -> Iterator[Case]:
    """Cases of synthetic layers with 2 KV heads, of sinks of 12 and 8 nats."""
    for seed in range(sizes.samples):
        heads = [SyntheticHead(length, 100 * seed + h, sink) for h, sink in enumerate((12, 8))]
        k = torch.stack([head.k for head in heads], 1)
        tiles = sample_tiles(length, DENSE_UP_TO, sizes.tiles, seed)
        positions = spread(range(TILE * TILE // 2, length), sizes.positions)

        def q_at(start: int, n: int) -> torch.Tensor:
            return torch.cat([head.queries(start, n) for head in heads], 1).bfloat16()  # noqa: B023

        yield from cases(q_at, k, heads[0].dim ** -0.5, tiles, positions)
