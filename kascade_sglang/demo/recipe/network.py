"""The demo model as plain functions over stacked weights: a Llama that trains fast.

Weights of the same kind are stacked over layers, so that the optimiser works on whole stacks.
Everything but attention runs on a flat list of tokens of one fixed size, whatever the length
of the rows, so that ``torch.compile`` compiles it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, in the terms of a Hugging Face ``LlamaConfig``."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 10_240
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5


Weights = dict[str, Tensor]


def new_weights(shape: Shape, seed: int) -> Weights:
    """Fresh float32 weights; each block starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    query = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    inner = hidden**-0.5
    return {
        "embed": normal(shape.vocab_size, hidden, std=0.02),
        "q": normal(layers, query, hidden, std=inner),
        "k": normal(layers, keys, hidden, std=inner),
        "v": normal(layers, keys, hidden, std=inner),
        "o": torch.zeros(layers, hidden, query),
        "gate": normal(layers, shape.intermediate_size, hidden, std=inner),
        "up": normal(layers, shape.intermediate_size, hidden, std=inner),
        "down": torch.zeros(layers, hidden, shape.intermediate_size),
        "norm_attention": torch.ones(layers, hidden),
        "norm_mlp": torch.ones(layers, hidden),
        "norm_out": torch.ones(hidden),
    }


def rotary_tables(
    shape: Shape, length: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token of a flat batch of ``rows`` rows."""
    places = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-places)
    angles = torch.cat([angles, angles], 1).repeat(rows, 1)[:, None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, rounded before the weight is applied, as Transformers does it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [tokens, heads, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def before_attention(
    x: Tensor, qkv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer."""
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    projected = rms_norm(x, norm, shape.rms_norm_eps) @ qkv.T
    split = projected.view(len(x), sum(heads), shape.head_dim).split(heads, 1)
    return rotate(split[0], cos, sin), rotate(split[1], cos, sin), split[2].contiguous()


def after_attention(
    x: Tensor, mixed: Tensor, o: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The rest of one layer: output projection and MLP, with both residuals."""
    x = x + mixed @ o.T
    gate, up = (rms_norm(x, norm, eps) @ gate_up.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ down.T


def attend(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Causal attention within each row of a flat batch."""
    q, k, v = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


def token_losses(
    x: Tensor, embed: Tensor, norm: Tensor, targets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token, and whether the likeliest one is right."""
    logits = (rms_norm(x, norm, eps) @ embed.T).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@dataclass
class Network:
    """Runs the model; compiled on a GPU, plain where compiling is not worth it."""

    shape: Shape
    compiled: bool

    def __post_init__(self) -> None:
        self.before, self.after, self.losses = before_attention, after_attention, token_losses
        if self.compiled:
            self.before = torch.compile(before_attention, dynamic=False)
            self.after = torch.compile(after_attention, dynamic=False)
            self.losses = torch.compile(token_losses, dynamic=False)

    def hidden(self, weights: Weights, ids: Tensor) -> Tensor:
        """The residual stream after the last layer, for ids of shape [rows, length]."""
        rows, length = ids.shape
        cos, sin = rotary_tables(self.shape, length, rows, ids.device)
        low = {name: weight.bfloat16() for name, weight in weights.items()}
        qkv = torch.cat([low["q"], low["k"], low["v"]], 1).unbind(0)
        gate_up = torch.cat([low["gate"], low["up"]], 1).unbind(0)
        o, down = low["o"].unbind(0), low["down"].unbind(0)
        norm_attention, norm_mlp = low["norm_attention"].unbind(0), low["norm_mlp"].unbind(0)
        x = F.embedding(ids.flatten(), low["embed"])
        for layer in range(self.shape.num_hidden_layers):
            q, k, v = self.before(x, qkv[layer], norm_attention[layer], cos, sin, self.shape)
            mixed = attend(q, k, v, rows)
            x = self.after(
                x,
                mixed,
                o[layer],
                norm_mlp[layer],
                gate_up[layer],
                down[layer],
                self.shape.rms_norm_eps,
            )
        return x

    def __call__(self, weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each next token and whether it was predicted, both [rows, length].

        The last place of a row has no next token; whatever stands there is not to be used.
        """
        targets = ids.roll(-1, 1).flatten()
        x = self.hidden(weights, ids)
        losses, right = self.losses(
            x,
            weights["embed"].bfloat16(),
            weights["norm_out"].bfloat16(),
            targets,
            self.shape.rms_norm_eps,
        )
        return losses.view(ids.shape), right.view(ids.shape)
