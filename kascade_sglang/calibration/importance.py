"""How much a layer's attention turns the residual stream: 1 - cos(x, x + attention(x))."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_TOKENS_AT_ONCE = 4096


@contextmanager
def importance_hooks(layers: Sequence[nn.Module]) -> Iterator[dict[int, float]]:
    """Within the block, a forward pass fills in each layer's mean over tokens.

    The update is what the layer adds to the stream: where it normalises its attention's output
    before adding it (Gemma 2 and 3, OLMo 2), that norm's output.
    """
    found: dict[int, float] = {}
    inputs: dict[int, torch.Tensor] = {}
    updates: dict[int, torch.Tensor] = {}

    def enter(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def attended(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple) -> None:
            updates[index] = output[0]

        return hook

    def normed(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            # In pre-norm decoders the norm of this name reads the stream after the update.
            if args and args[0] is updates.get(index):
                updates[index] = output

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, _output: Any) -> None:
            if index in updates:
                found[index] = mean_turn(inputs.pop(index)[0], updates.pop(index)[0])

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(attended(index)))
        if hasattr(layer, "post_attention_layernorm"):
            handles.append(layer.post_attention_layernorm.register_forward_hook(normed(index)))
        handles.append(layer.register_forward_hook(leave(index)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mean_turn(x: torch.Tensor, update: torch.Tensor) -> float:
    """Mean over tokens of 1 - cos(x, x + update); both [L, hidden]."""
    total = 0.0
    # A sharded model's input may still lie on the layer before's device.
    pieces = zip(
        x.to(update.device).split(_TOKENS_AT_ONCE), update.split(_TOKENS_AT_ONCE), strict=True
    )
    for before, change in pieces:
        cosine = functional.cosine_similarity(
            before.float(), before.float() + change.float(), dim=-1
        )
        total += float((1.0 - cosine).double().sum())
    return total / len(x)
