"""What each layer's heads read of a prompt for an answer, beside what dense attention would weigh.

The torch reference answers a prompt once, offline. For every token of the answer that a decoding
step computes, each layer's query says two things: which keys its list holds, and how a softmax
over all keys weighs them. Both are summed up by *places*, equal pieces of the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from kascade_kernels.budget import TILE, tile_of
from kascade_sglang.calibration.hf_attention import (
    DenseAttention,
    KascadeAttention,
    LayerAttention,
    LayerCall,
    our_attention,
)
from kascade_sglang.calibration.hf_model import shape_of
from kascade_sglang.calibration.limited_attention import softmax
from kascade_sglang.config import KascadeConfig
from kascade_sglang.plan.schema import LayerRole, Plan

MOST_PLACES = 256
MOST_TOKENS = 48
"""Of the answer."""


@dataclass(frozen=True)
class Selection:
    """What was read for an answer; arrays are means over the steps that decoded it.

    plan: whose layers they are. prompt, answer: token ids. place: tokens in a place.
    read: float64 [layers, KV heads, places], the share of a place's keys that attention read.
    weight: the same shape: a place's share of dense attention, mean over the query heads of a KV
        head; what the answer's own tokens get is missing from the sum.
    found: the same shape: the part of ``weight`` on keys that were read.
    kept: float64 [layers, KV heads], the share of dense attention on all keys that were read.
    steps: how many they are. Windowed layers are zeros.
    """

    plan: Plan
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    place: int
    read: np.ndarray
    weight: np.ndarray
    found: np.ndarray
    kept: np.ndarray
    steps: int

    def tokens_of(self, place: int) -> tuple[int, ...]:
        """The prompt's token ids that stand in a place."""
        return self.prompt[self.place * place : self.place * (place + 1)]


class _Watched:
    """Kascade's attention, which counts what one query a step reads and would weigh."""

    limits = KascadeAttention.limits

    def __init__(self, plan: Plan, prompt: int) -> None:
        self._plan, self._prompt = plan, prompt
        self._attention = KascadeAttention(plan)
        self.place = -(-prompt // MOST_PLACES)
        self._places = -(-prompt // self.place)
        heads = (plan.shape.layers, plan.shape.kv_heads)
        self.read, self.weight, self.found = (np.zeros((*heads, self._places)) for _ in range(3))
        self.kept = np.zeros(heads)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return self.attend(LayerCall(layer, q, k, v, scale))

    def attend(self, call: LayerCall) -> torch.Tensor:
        """Attend as Kascade does; q is one token."""
        out = self._attention.attend(call)
        if self._plan.role(call.layer) is not LayerRole.WINDOW:
            read, weights = self._keys_read(call), dense_weights(call)
            self.kept[call.layer] += (weights * read).sum(dim=1).cpu().numpy()
            self.weight[call.layer] += self._by_place(weights)
            self.found[call.layer] += self._by_place(weights * read)
            # The last place may be shorter than the others.
            sizes = self._by_place(torch.ones_like(weights))
            self.read[call.layer] += self._by_place(read) / sizes
        return out

    def _keys_read(self, call: LayerCall) -> torch.Tensor:
        """1 for each key that the query reads, 0 for the others: float64 [H, L]."""
        length, heads, _ = call.k.shape
        read = torch.zeros(heads, length, dtype=torch.float64, device=call.k.device)
        if self._plan.role(call.layer) is LayerRole.DENSE:
            return read + 1
        tile = tile_of(length - 1)
        read[:, TILE * tile :] = 1
        return read.scatter_(1, self._attention.keys_for(call.layer, tile), 1)

    def _by_place(self, of_keys: torch.Tensor) -> np.ndarray:
        """Sum [H, L] over the keys of each place: [H, places]."""
        ours = of_keys[:, : self._prompt].cpu().numpy()
        return np.add.reduceat(ours, self.place * np.arange(self._places), axis=1)


def dense_weights(call: LayerCall) -> torch.Tensor:
    """Attention of the one query over all keys, mean over a KV head's query heads: [H, L].

    In float64. What sinks take is missing.
    """
    heads, dim = call.k.shape[1:]
    rows = call.q.reshape(heads, -1, dim).double()
    logits = rows @ call.k.permute(1, 2, 0).double() * call.scale
    sinks = call.limits.sinks_by_head(heads)
    return softmax(logits, None if sinks is None else sinks[:, :, 0]).mean(dim=1)


@torch.inference_mode()
def watch(
    model: PreTrainedModel,
    config: KascadeConfig,
    prompt: Sequence[int],
    most_tokens: int = MOST_TOKENS,
    on_step: Callable[[int], object] = lambda step: None,
) -> Selection:
    """Answer a prompt greedily as a server with this configuration would, and watch the answer.

    prompt: token ids. most_tokens: of the answer, which a token of the model's that ends it ends.
    on_step: called with how many tokens there are. Selection is by exact scores (a server's
    default copies keys to 8 bits). Raises PlanError where the plan does not fit the model,
    CalibrationError for attention that is not plain causal, ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("prompt: expected at least one token")
    plan = config.plan
    plan.check_fits(shape_of(model.config))
    plan = replace(plan, heads="pooled" if config.pooled else "per_head")
    prefill: LayerAttention = DenseAttention()
    if config.sparse_prefill:
        prefill = KascadeAttention(replace(plan, budget=config.prefill_budget))
    watched = _Watched(replace(plan, budget=config.budget), len(prompt))
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    cache, answer = DynamicCache(config=model.config), []
    step, attention = torch.tensor([list(prompt)], device=model.device), prefill
    with our_attention(model):
        while len(answer) < most_tokens and not (answer and answer[-1] in ends):
            given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            logits = model(input_ids=step, kascade=attention, **given).logits
            step, attention = logits[:, -1].argmax(dim=-1, keepdim=True), watched
            answer.append(int(step))
            on_step(len(answer))
    steps = max(1, len(answer) - 1)
    sums = (watched.read, watched.weight, watched.found, watched.kept)
    means = [of_steps / steps for of_steps in sums]
    return Selection(
        plan, tuple(prompt), tuple(answer), watched.place, *means, steps=len(answer) - 1
    )
