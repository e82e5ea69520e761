"""Drive the backend as SGLang does, with known Q, K, V and any schedule of chunks and batches."""

from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from kascade_kernels.budget import TILE, Budget
from kascade_kernels.structs import Lists
from kascade_sglang.backend.backend import KascadeAttnBackend
from kascade_sglang.backend.reference import ReferencePath, Tile
from kascade_sglang.backend.sizes import runs_kernels
from kascade_sglang.calibration.limited_attention import Limits, limited_attention
from kascade_sglang.config import KascadeConfig
from kascade_sglang.host.dense import FP8_TYPES
from kascade_sglang.host.steps import Batch, set_asks
from kascade_sglang.plan.schema import ModelShape, Plan
from tests.support.shapes import DEVICE

HEAD_DIM = 64 if DEVICE == "cuda" else 32
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


class FakePool:
    """A KV pool of plain tensors with the calls that backends make."""

    def __init__(self, layers: int, slots: int, kv_heads: int, dtype: torch.dtype) -> None:
        shape = (slots, kv_heads, HEAD_DIM)
        unwritten = torch.full(shape, float("nan"), device=DEVICE).to(dtype)
        self.keys = [unwritten.clone() for _ in range(layers)]
        self.values = [unwritten.clone() for _ in range(layers)]
        self.start_layer, self.layer_num = 0, layers
        self.size, self.page_size = slots, 0
        self.memory_saver_adapter = TorchMemorySaverAdapter.create(enable=False)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys[layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values[layer_id]

    def set_kv_buffer(
        self, layer, location, k: torch.Tensor, v: torch.Tensor, k_scale=None, v_scale=None
    ) -> None:
        pools = (self.keys[layer.layer_id], self.values[layer.layer_id])
        for pool, new, scale in zip(pools, (k, v), (k_scale, v_scale), strict=True):
            if pool.dtype.itemsize == 1 and scale is not None:
                new.div_(scale)
            stored = new.view(-1, *pool.shape[1:]).to(pool.dtype)
            # Few of torch's functions take fp8.
            same = torch.uint8 if pool.dtype.itemsize == 1 else pool.dtype
            pool.view(same)[location.loc] = stored.view(same)


def make_plan(
    layers: int,
    kv_heads: int,
    group: int,
    anchors: tuple[int, ...],
    windowed: tuple[int, ...] = (),
    makers: tuple[int, ...] = (),
    pool_share: float = 0.25,
) -> Plan:
    """A plan whose head maps differ from layer to layer; pools where there are makers."""
    generator = torch.Generator().manual_seed(7)
    reuse = [layer for layer in range(layers) if layer not in (*anchors, *windowed)]
    pooled = [layer for layer in anchors if makers and makers[0] < layer not in makers]
    similarity = {
        layer: tuple(map(tuple, torch.rand(kv_heads, kv_heads, generator=generator).tolist()))
        for layer in (*reuse, *pooled)
    }
    pools = {"makers": makers, "pool_share": pool_share} if makers else {}
    shape = ModelShape(layers, kv_heads * group, kv_heads, HEAD_DIM, 64)
    return Plan("test", shape, anchors, similarity, windowed=windowed, **pools)


class Harness:
    """Requests with fixed Q, K, V of every layer; each ``step`` runs some of their tokens.

    scales: k_scale and v_scale of the layers after the first, which torch_native reads unscaled.
    sinks: whether layers have them; the dense backend is then ``DenseWithSinks``.
    outputs[layer][request]: [length, Hq, D], filled as steps run.
    asks: by request, the ``Ask`` that it came with.
    chain: tokens that each request has in a step of decoding; more than one come by ``verify``.
    selections[layer][request]: {(tile, first position): int64 [H, selected] positions}.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        layers: int = 4,
        kv_heads: int = 2,
        group: int = 4,
        anchors: tuple[int, ...] = (0, 2),
        windowed: tuple[int, ...] = (),
        window: int = 0,
        budget: Budget | None = None,
        heads: str = "per_head",
        selection: str = "topk",
        page_size: int = 1,
        dtype: torch.dtype = DTYPE,
        exact: bool = True,
        batch_invariant: bool = False,
        phases: str = "both",
        score_memory: int = 2**24,
        slot_seed: int = 0,
        data_seed: int = 1,
        max_ratio: float | None = None,
        kv_cache_dtype: str = "auto",
        scales: tuple[float, float] | None = None,
        sinks: bool = False,
        chain: int = 1,
        makers: tuple[int, ...] = (),
        pool_share: float = 0.25,
    ) -> None:
        plan = make_plan(layers, kv_heads, group, anchors, windowed, makers, pool_share)
        budget = budget or Budget(0.1, 64)
        self.config = KascadeConfig(
            plan,
            budget,
            heads,
            dense_backend="torch_native",
            selection=selection,
            exact=exact,
            score_memory=score_memory,
            batch_invariant=batch_invariant,
            phases=phases,
            window=window,
            kv_cache_dtype=kv_cache_dtype,
            max_ratio=max_ratio,
        )
        self.asks, self.scales, self.chain = {}, scales, chain
        self.runs_kernels = runs_kernels(DEVICE, self.config)
        self.lengths, self.layers, self.group, self.kv_heads = lengths, layers, group, kv_heads
        self._place(lengths, page_size, slot_seed)
        stored = FP8_TYPES.get(kv_cache_dtype, dtype)
        self.pool = FakePool(layers, self.slots, kv_heads, stored)
        self.runner = self._make_runner(max(lengths), dtype)
        self.backend = KascadeAttnBackend(self.runner, self.config)
        self.sinks = self._add_sinks() if sinks else [None] * layers
        self.qkv = [
            [
                self._tensors(data_seed + 100 * layer + request, length, dtype)
                for request, length in enumerate(lengths)
            ]
            for layer in range(layers)
        ]
        q_heads = kv_heads * group
        self.outputs = [
            [
                torch.full((n, q_heads, HEAD_DIM), float("nan"), dtype=dtype, device=DEVICE)
                for n in lengths
            ]
            for _ in range(layers)
        ]
        self.selections = [[{} for _ in lengths] for _ in range(layers)]

    def _make_runner(self, context: int, dtype: torch.dtype) -> SimpleNamespace:
        """What SGLang's model runner says, without a model."""
        kv_heads = self.kv_heads
        graphs = SimpleNamespace(backend="full", max_bs=len(self.req_to_token), bs=None)
        return SimpleNamespace(
            device=DEVICE,
            model=torch.nn.Module(),
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
            token_to_kv_pool=self.pool,
            model_config=SimpleNamespace(
                context_len=context, get_num_kv_heads=lambda ranks: kv_heads, dtype=dtype
            ),
            server_args=SimpleNamespace(
                tp_size=1,
                enable_metrics=False,
                cuda_graph_config=SimpleNamespace(decode=graphs),
                max_running_requests=None,
                speculative_algorithm="NGRAM" if self.chain > 1 else None,
                speculative_num_draft_tokens=self.chain,
            ),
            ps=SimpleNamespace(tp_rank=0),
        )

    def _add_sinks(self) -> list[torch.Tensor]:
        """Draw each layer's, [Hq], and let a dense backend that takes them compute beside us."""
        generator, heads = torch.Generator().manual_seed(5), self.kv_heads * self.group
        self.backend.dense = DenseWithSinks(self)
        return list((3 + 3 * torch.randn(self.layers, heads, generator=generator)).to(DEVICE))

    def _place(self, lengths: list[int], page_size: int, seed: int) -> None:
        """Give every request pages in random order; slot 0's page stays unused."""
        pages = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed)) + 1
        self.slots = (sum(pages) + 1) * page_size
        self.req_to_token = torch.zeros(len(lengths) + 1, max(lengths), dtype=torch.int32)
        for request, (length, own) in enumerate(zip(lengths, order.split(pages), strict=True)):
            slots = own[:, None] * page_size + torch.arange(page_size)
            self.req_to_token[request + 1, :length] = slots.flatten()[:length]
        self.req_to_token = self.req_to_token.to(DEVICE)

    def _tensors(self, seed: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        drawn = (torch.randn(length, h, HEAD_DIM, generator=generator) for h in heads)
        q, k, v = (tensor.to(dtype).to(DEVICE) for tensor in drawn)
        return [2 * q, k, v]

    def step(self, spans: list[tuple[int, int, int]], mode: ForwardMode | None = None) -> None:
        """Run the tokens [begin, end) of some requests through all layers in one batch."""
        decode = all(end - begin == 1 for _, begin, end in spans)
        mode = mode or (ForwardMode.DECODE if decode else ForwardMode.EXTEND)
        rows = torch.tensor([request + 1 for request, _, _ in spans], device=DEVICE)
        batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=rows,
            seq_lens=torch.tensor([end for _, _, end in spans], device=DEVICE),
            seq_lens_cpu=torch.tensor([end for _, _, end in spans]),
            extend_prefix_lens=torch.tensor([begin for _, begin, _ in spans]),
            extend_prefix_lens_cpu=[begin for _, begin, _ in spans],
            extend_seq_lens=torch.tensor([end - begin for _, begin, end in spans]),
            extend_seq_lens_cpu=[end - begin for _, begin, end in spans],
            encoder_lens=None,
            out_cache_loc=torch.cat(
                [self.req_to_token[r + 1, b:e].to(torch.int64) for r, b, e in spans]
            ),
        )
        reference = ReferencePath(self.config, self.req_to_token, self.backend.paths.kv)
        asks = tuple(self.asks.get(request) for request, _, _ in spans)
        set_asks(self.runner, asks if any(asks) else ())
        self.batch_tiles = list(reference.record(Batch.of(batch, asks)))
        self.backend.init_forward_metadata(batch)
        for layer_id in range(self.layers):
            self._layer(layer_id, spans, batch)

    def verify(self, starts: list[tuple[int, int]]) -> None:
        """Run a chain of tokens of some requests, from a position on, as drafts to verify.

        SGLang's lengths are those before the drafts. Selections are not recorded.
        """
        spans = [(request, begin, begin + self.chain) for request, begin in starts]
        batch = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            req_pool_indices=torch.tensor([request + 1 for request, _ in starts], device=DEVICE),
            seq_lens=torch.tensor([begin for _, begin in starts], device=DEVICE),
            seq_lens_cpu=torch.tensor([begin for _, begin in starts]),
            extend_prefix_lens_cpu=None,
            extend_seq_lens_cpu=None,
            spec_info=SimpleNamespace(draft_token_num=self.chain),
            out_cache_loc=torch.cat(
                [self.req_to_token[r + 1, b:e].to(torch.int64) for r, b, e in spans]
            ),
        )
        asks = tuple(self.asks.get(request) for request, _ in starts)
        set_asks(self.runner, asks if any(asks) else ())
        self.batch_tiles = []
        self.backend.init_forward_metadata(batch)
        for layer_id in range(self.layers):
            self._layer(layer_id, spans, batch)

    def layer(self, layer_id: int) -> SimpleNamespace:
        """What SGLang's RadixAttention says of a layer."""
        k_scale, v_scale = (self.scales if layer_id else None) or (None, None)
        return SimpleNamespace(
            layer_id=layer_id,
            scaling=HEAD_DIM**-0.5,
            tp_q_head_num=self.kv_heads * self.group,
            tp_k_head_num=self.kv_heads,
            qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            attn_type=AttentionType.DECODER,
            is_cross_attention=False,
            sliding_window_size=self.config.window_of(layer_id) - 1,
            logit_cap=0.0,
            k_scale=k_scale,
            v_scale=v_scale,
            k_scale_float=k_scale,
            v_scale_float=v_scale,
        )

    def kept(self, layer_id: int, request: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A request's Q, K and V in float64, on the CPU, as the pool's type keeps K and V."""
        q, k, v = self.qkv[layer_id][request]
        scales = (self.scales if layer_id else None) or (1.0, 1.0)
        stored = (
            (tensor / scale).to(self.pool.keys[0].dtype).double() * scale
            for tensor, scale in zip((k, v), scales, strict=True)
        )
        return tuple(tensor.cpu() for tensor in (q.double(), *stored))

    def _layer(self, layer_id: int, spans: list[tuple[int, int, int]], batch) -> None:
        q, k, v = (
            torch.cat([self.qkv[layer_id][r][i][b:e] for r, b, e in spans]) for i in range(3)
        )
        layer = self.layer(layer_id)
        given = {} if self.sinks[layer_id] is None else {"sinks": self.sinks[layer_id]}
        out = self.backend.forward(q.flatten(1), k, v, layer, batch, **given)
        out = out.view(-1, self.kv_heads * self.group, HEAD_DIM)
        lengths = [end - begin for _, begin, end in spans]
        for (request, begin, end), part in zip(spans, out.split(lengths), strict=True):
            self.outputs[layer_id][request][begin:end] = part
        if self.backend.running is not None and layer_id not in self.config.plan.windowed:
            self._record(layer_id, spans)

    def _record(self, layer_id: int, spans: list[tuple[int, int, int]]) -> None:
        """Translate the selected slots back to positions."""
        selection, head_map = self.backend.paths.store.get(layer_id)
        for index, tile in enumerate(self.batch_tiles):
            request = spans[tile.request][0]
            position_of = torch.full((self.slots,), -1, device=DEVICE)
            table = self.req_to_token[request + 1, : self.lengths[request]].to(torch.int64)
            position_of[table] = torch.arange(len(table), device=DEVICE)
            if isinstance(selection, Lists):
                slots = self._slots(selection, index, tile)
            else:
                slots = selection[index]
            positions = position_of[slots[head_map]].cpu()
            first = tile.end - (tile.queries.stop - tile.queries.start)
            self.selections[layer_id][request][tile.own_start // TILE, first] = positions

    def _slots(self, lists: Lists, index: int, tile: Tile) -> torch.Tensor:
        """A tile's selected slots, int64 [lists, selected]; decoding also lists the own tile."""
        counts, offsets = lists.counts[index].tolist(), lists.offsets[index].tolist()
        own = tile.end - tile.own_start
        assert set(counts) <= {tile.selected, tile.selected + own} and len(set(counts)) == 1
        slots = [lists.slots[offset : offset + tile.selected] for offset in offsets]
        return torch.stack(slots).to(torch.int64)

    def prefill(self, request: int, chunk: int, begin: int = 0) -> None:
        """Run one request from ``begin`` to its end in chunks."""
        for start in range(begin, self.lengths[request], chunk):
            self.step([(request, start, min(start + chunk, self.lengths[request]))])


class DenseWithSinks:
    """What SGLang's backends for a GPU do, in plain torch: torch_native knows no sinks."""

    needs_cpu_seq_lens = True

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def init_forward_metadata(self, batch: SimpleNamespace) -> None:
        """Prepare nothing."""

    def forward_extend(self, q, k, v, layer, batch, save_kv_cache: bool, *, sinks: torch.Tensor):
        """Attend to all that a layer sees: [tokens, Hq * D]."""
        harness, index = self._harness, layer.layer_id
        pool, limits = harness.pool, Limits(harness.config.window_of(index) or None, sinks=sinks)
        pool.set_kv_buffer(layer, SimpleNamespace(loc=batch.out_cache_loc), k, v)
        rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)
        slots = [harness.req_to_token[row, :end].to(torch.int64) for row, end in rows]
        queries = q.view(len(k), -1, HEAD_DIM).split(batch.extend_seq_lens_cpu)
        outputs = [
            limited_attention(
                own, pool.keys[index][of], pool.values[index][of], layer.scaling, limits
            )
            for own, of in zip(queries, slots, strict=True)
        ]
        return torch.cat(outputs).flatten(1)

    forward_decode = forward_extend


def attended(harness: Harness, layer_id: int, request: int) -> torch.Tensor:
    """Which keys each query attends to by the recorded selections: bool [H, length, length]."""
    length, plan = len(harness.qkv[layer_id][request][0]), harness.config.plan
    if layer_id in plan.windowed:
        seen = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - harness.config.window)
        return seen.expand(harness.kv_heads, -1, -1)
    mask = torch.zeros(harness.kv_heads, length, length, dtype=torch.bool)
    for (tile, first), positions in harness.selections[layer_id][request].items():
        for position in range(first, min(32 * (tile + 1), length)):
            if layer_id == plan.anchors[0]:
                mask[:, position, : position + 1] = True
                continue
            for head in range(harness.kv_heads):
                mask[head, position] = False
                mask[head, position, positions[head]] = True
            mask[:, position, 32 * tile : position + 1] = True
    return mask


def expected_output(harness: Harness, layer_id: int, request: int) -> torch.Tensor:
    """Masked float64 attention over the recorded selections, written out without the kernels."""
    q, k, v = harness.kept(layer_id, request)
    length, group = len(q), harness.group
    mask = attended(harness, layer_id, request)
    logits = torch.einsum("qhgd,khd->hgqk", q.view(length, -1, group, HEAD_DIM), k)
    logits *= HEAD_DIM**-0.5
    exponents = logits.masked_fill(~mask[:, None], float("-inf")).exp()
    total, sinks = exponents.sum(-1, keepdim=True), harness.sinks[layer_id]
    if sinks is not None:
        total += sinks.double().cpu().exp().view(harness.kv_heads, -1, 1, 1)
    out = torch.einsum("hgqk,khd->qhgd", exponents / total, v)
    return out.reshape(length, -1, HEAD_DIM)
