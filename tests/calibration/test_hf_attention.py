"""The end-to-end oracle: dense where the budget covers everything, sparse as defined elsewhere."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kascade_kernels.budget import TILE, Budget
from kascade_kernels.reference import pool_heads, select_topk, tile_scores
from kascade_sglang.calibration.hf_attention import (
    KascadeAttention,
    LayerCall,
    dense_attention,
    kascade_generate,
    kascade_prompt_logprobs,
    query_tiles,
)
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.calibration.limited_attention import Limits
from kascade_sglang.errors import CalibrationError
from kascade_sglang.plan.schema import Plan, PlanError

EVERYTHING = Budget(1.0, 64)
SPARSE = Budget(0.1, 64)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.4,
}


def plan_for(model: PreTrainedModel, budget: Budget, heads: str = "per_head") -> Plan:
    """Anchors 0 and 2; layers 1 and 3 borrow crosswise."""
    crossed = ((0.1, 0.9), (0.8, 0.2))
    return Plan("tiny", shape_of(model.config), (0, 2), {1: crossed, 3: crossed}, budget, heads)


def prompt_of(length: int) -> list[int]:
    return torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()


def mistral(window: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()


def gpt_oss() -> PreTrainedModel:
    """Windows of 40 positions in layers 0 and 2, and sinks that take much, in every layer."""
    torch.manual_seed(0)
    small = {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**SMALL, **small)).eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2.0, 2.0)
    return model


def gpt_oss_plan(model: PreTrainedModel, budget: Budget, anchors: tuple[int, ...]) -> Plan:
    similarity = {} if 3 in anchors else {3: ((0.1, 0.9), (0.8, 0.2))}
    shape = shape_of(model.config)
    return Plan("tiny", shape, anchors, similarity, budget, "per_head", windowed=(0, 2))


def dense_logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


@pytest.mark.parametrize("heads", ["per_head", "pooled"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
def test_budget_of_everything_equals_hf_greedy(
    llama: LlamaForCausalLM, length: int, heads: str
) -> None:
    prompt = prompt_of(length)
    expected = llama.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=-1
    )[0, length:].tolist()
    tokens, logprobs = kascade_generate(llama, plan_for(llama, EVERYTHING, heads), prompt, 40)
    assert tokens == expected
    table = dense_logprobs(llama, prompt + tokens)[length - 1 : -1]
    chosen = table[torch.arange(40), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), chosen, atol=2e-4, rtol=0)


@pytest.mark.parametrize("build", [qwen3, mistral], ids=["qwen3", "mistral"])
def test_other_decoders(build: type) -> None:
    model, prompt = build(), prompt_of(100)
    expected = dense_logprobs(model, prompt)[:-1][torch.arange(99), prompt[1:]]
    found = kascade_prompt_logprobs(model, plan_for(model, EVERYTHING), prompt)
    torch.testing.assert_close(torch.tensor(found).double(), expected, atol=2e-4, rtol=0)
    sparse = kascade_prompt_logprobs(model, plan_for(model, SPARSE), prompt_of(200))
    assert len(sparse) == 199


def test_a_model_with_sinks() -> None:
    """Windowed layers and full ones are transformers' own, where the budget covers all keys."""
    model, prompt = gpt_oss(), prompt_of(100)
    plan = gpt_oss_plan(model, EVERYTHING, (1,))
    expected = dense_logprobs(model, prompt)[:-1][torch.arange(99), prompt[1:]]
    found = torch.tensor(kascade_prompt_logprobs(model, plan, prompt)).double()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    tokens, logprobs = kascade_generate(model, plan, prompt, 10)
    table = dense_logprobs(model, prompt + tokens)[99:-1]
    assert tokens == table.argmax(-1).tolist()
    chosen = table[torch.arange(10), tokens]
    torch.testing.assert_close(torch.tensor(logprobs).double(), chosen, atol=2e-4, rtol=0)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(float("-inf"))
    without = torch.tensor(kascade_prompt_logprobs(model, plan, prompt)).double()
    assert (without - expected).abs().max() > 0.1, "the sinks say nothing"


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_sparse_equals_dense_attention_under_a_mask(heads: str, sinks: bool) -> None:
    """Each layer against full float64 attention in which unselected keys are masked out."""
    generator = torch.Generator().manual_seed(5)
    length, kv_heads, group, dim = 7 * TILE + 9, 2, 3, 16
    states = [
        [torch.randn(length, count, dim, generator=generator, dtype=torch.float64) * 2
         for count in (kv_heads * group, kv_heads, kv_heads)]
        for _ in range(4)
    ]  # fmt: skip
    plan = plan_for(mistral(), SPARSE, heads)
    attention = KascadeAttention(plan)
    allowed: dict[int, torch.Tensor] = {}  # anchor -> [H, L, L]
    for layer, (q, k, v) in enumerate(states):
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * 0.25
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        column = 2 * torch.randn(kv_heads * group, generator=generator, dtype=torch.float64)
        given = column if sinks else None
        full = weights_of(logits.masked_fill(~causal, float("-inf")), given)
        if layer in plan.anchors:
            allowed[layer] = masks(full, length, kv_heads, heads)
        mask = allowed[plan.anchor_of[layer]]
        if layer == 0:
            mask = causal.expand(kv_heads, -1, -1)
        elif layer in plan.head_map and heads == "per_head":
            mask = mask[list(plan.head_map[layer])]
        mask = (mask & causal).repeat_interleave(group, 0)
        weights = weights_of(logits.masked_fill(~mask, float("-inf")), given)
        expected = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
        found = attention.attend(LayerCall(layer, q, k, v, 0.25, Limits(sinks=given)))
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        if layer:
            assert not mask[:, -1].all()


def weights_of(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of [Hq, n, L] with each head's sink in the denominator, written out."""
    exponents = logits.exp()
    of_sinks = 0 if sinks is None else sinks.exp()[:, None, None]
    return exponents / (exponents.sum(-1, keepdim=True) + of_sinks)


def masks(full: torch.Tensor, length: int, kv_heads: int, heads: str) -> torch.Tensor:
    """[H, L, L] keys that each query may attend to, before causality: own tile and Top-k."""
    mask = torch.zeros(kv_heads, length, length, dtype=torch.bool)
    for tile in range((length + TILE - 1) // TILE):
        rows = slice(TILE * tile, TILE * (tile + 1))
        mask[:, rows, rows] = True
        mass = full[:, rows, : TILE * tile].unflatten(0, (kv_heads, -1)).sum((1, 2))
        if heads == "pooled":
            mass = mass.sum(0, keepdim=True).expand(kv_heads, -1)
        best = mass.topk(SPARSE.selected(tile)).indices
        for head in range(kv_heads):
            mask[head, rows, best[head]] = True
    return mask


@pytest.mark.parametrize("chunk", [TILE, 3 * TILE])
@pytest.mark.parametrize("heads", ["per_head", "pooled"])
def test_chunks_of_whole_tiles_change_nothing(chunk: int, heads: str) -> None:
    generator = torch.Generator().manual_seed(6)
    length = 8 * TILE + 5
    q, k, v = (torch.randn(length, count, 16, generator=generator) for count in (4, 2, 2))
    plan = plan_for(mistral(), SPARSE, heads)
    for layer in (2, 3):  # one anchor and the layer that reuses it
        whole, chunked = KascadeAttention(plan), KascadeAttention(plan)
        pieces = []
        for start in range(0, length, chunk):
            end = min(length, start + chunk)
            for earlier in range(2, layer):
                chunked(earlier, q[start:end], k[:end], v[:end], 0.25)
            pieces.append(chunked(layer, q[start:end], k[:end], v[:end], 0.25))
        for earlier in range(2, layer):
            whole(earlier, q, k, v, 0.25)
        assert torch.equal(torch.cat(pieces), whole(layer, q, k, v, 0.25))


@pytest.mark.parametrize("heads", ["per_head", "pooled"])
@pytest.mark.parametrize("tiles", [4, 7])
def test_decoding_the_first_position_of_a_tile_equals_prefilling_it(
    llama: LlamaForCausalLM, tiles: int, heads: str
) -> None:
    """There the last tile holds one query either way; later in a tile selections may differ."""
    plan, prompt = plan_for(llama, SPARSE, heads), prompt_of(tiles * TILE)
    tokens, logprobs = kascade_generate(llama, plan, prompt, 2)
    again, prefilled = kascade_generate(llama, plan, [*prompt, tokens[0]], 1)
    assert again == tokens[1:]
    assert prefilled == pytest.approx(logprobs[1:], abs=1e-4)
    dense, dense_logprobs_ = kascade_generate(llama, replace(plan, budget=EVERYTHING), prompt, 2)
    assert abs(dense_logprobs_[1] - logprobs[1]) > 1e-3 or dense != tokens  # sparsity mattered


@pytest.mark.parametrize("length", [100, 160])
def test_decoding_equals_prefilling_where_the_budget_is_dense(
    llama: LlamaForCausalLM, length: int
) -> None:
    plan, prompt = plan_for(llama, Budget(0.1, 256)), prompt_of(length)
    tokens, logprobs = kascade_generate(llama, plan, prompt, 60)
    prefilled = kascade_prompt_logprobs(llama, plan, prompt + tokens)[length - 1 :]
    assert prefilled == pytest.approx(logprobs, abs=2e-4)


def test_budget_heads_and_map_matter(llama: LlamaForCausalLM) -> None:
    prompt, plan = prompt_of(300), plan_for(llama, SPARSE)
    straight = ((0.9, 0.1), (0.2, 0.8))
    others = {
        "budget": replace(plan, budget=EVERYTHING),
        "heads": replace(plan, heads="pooled"),
        "map": replace(plan, similarity={1: straight, 3: straight}),
        "anchors": replace(plan, anchors=(0, 1), similarity={2: straight, 3: straight}),
    }
    found = torch.tensor(kascade_prompt_logprobs(llama, plan, prompt))
    for name, other in others.items():
        difference = torch.tensor(kascade_prompt_logprobs(llama, other, prompt)) - found
        assert difference.abs().max() > 1e-3, name


@pytest.mark.parametrize("first", [1, 43, 44, 172, 299])
def test_dense_attention_of_a_chunk_sees_what_came_before(first: int) -> None:
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(300, count, 16, generator=generator) for count in (4, 2, 2))
    whole = dense_attention(q, k, v, 0.25)
    torch.testing.assert_close(dense_attention(q[first:], k, v, 0.25), whole[first:])


def test_layer_zero_is_dense_and_selects() -> None:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(5 * TILE, count, 16, generator=generator) for count in (4, 2, 2))
    plan = plan_for(mistral(), SPARSE)
    attention = KascadeAttention(plan)
    attention(0, q, k, v, 0.25)
    reused = attention(1, q, k, v, 0.25)
    last = select_topk(tile_scores(q[-TILE:], k, 0.25), SPARSE.selected(4))
    assert pool_heads(tile_scores(q[-TILE:], k, 0.25)).shape == (1, 4 * TILE)
    moved = v.clone()
    moved[[position for position in range(4 * TILE) if position not in last]] += 1.0
    again = attention(1, q, k, moved, 0.25)
    assert torch.equal(again[-TILE:], reused[-TILE:])  # keys outside the selection do not count
    moved[last[0, 0]] += 1.0
    assert not torch.equal(attention(1, q, k, moved, 0.25)[-TILE:], reused[-TILE:])


@pytest.mark.parametrize(
    "n, length, expected",
    [
        (1, 1, [(0, 1, 1)]),
        (32, 32, [(0, 32, 32)]),
        (5, 35, [(0, 2, 32), (1, 3, 35)]),
        (1, 65, [(2, 1, 65)]),
        (70, 70, [(0, 32, 32), (1, 32, 64), (2, 6, 70)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_query_tiles(n: int, length: int, expected: list[tuple[int, int, int]]) -> None:
    q = torch.arange(length - n, length).reshape(n, 1, 1)
    found = list(query_tiles(q, length))
    assert [(tile, len(rows), end) for tile, rows, end in found] == expected
    assert torch.equal(torch.cat([rows for _, rows, _ in found]), q)


def test_refuses_models_that_are_not_plain_causal() -> None:
    window = mistral(window=16)
    with pytest.raises(CalibrationError, match="sliding window"):
        kascade_generate(window, plan_for(window, SPARSE), [1, 2], 1)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, layer_types=["full_attention"] * 4)).eval()
    with pytest.raises(CalibrationError, match="soft-capped"):
        kascade_generate(gemma, plan_for(gemma, SPARSE), [1, 2], 1)
    assert window.config._attn_implementation == "sdpa"


def test_refuses_a_plan_for_another_model(llama: LlamaForCausalLM) -> None:
    plan = plan_for(llama, SPARSE)
    other = replace(plan, shape=replace(plan.shape, head_dim=32))
    with pytest.raises(PlanError, match="head_dim is 16, the plan has 32"):
        kascade_generate(llama, other, [1, 2], 1)


def test_refuses_an_empty_prompt(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        kascade_generate(llama, plan_for(llama, SPARSE), [], 1)
