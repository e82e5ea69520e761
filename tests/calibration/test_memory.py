"""Memory of one prompt: linear in its length, far below heads x tiles x length."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from kascade_kernels.budget import TILE, Budget
from kascade_sglang.calibration.collect import measure_prompt, sample_tiles

LAYERS, Q_HEADS, KV_HEADS = 4, 8, 4


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that torch's operations made, and how many lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_of(model: LlamaForCausalLM, length: int) -> int:
    prompt = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    budget = Budget(0.1, 64)
    tiles = sample_tiles(length, budget, 10**6, seed=0)
    assert len(tiles) > 0.8 * length / TILE
    # Outside inference mode, where the dispatcher shows the operations that really run.
    inner = measure_prompt.__wrapped__
    with torch.no_grad(), PeakMemory() as memory:
        inner(model, prompt, tiles, budget, range(LAYERS))
    return memory.peak


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS, num_key_value_heads=KV_HEADS, head_dim=8,
        max_position_embeddings=16384,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_memory_grows_with_length_not_with_its_square(model: LlamaForCausalLM) -> None:
    shorter, longer = peak_of(model, 2048), peak_of(model, 4096)
    assert longer < 2.2 * shorter
    # One layer's scores of all heads and tiles; and all the layers', which stats must not hold.
    assert longer < 0.6 * 4 * LAYERS * KV_HEADS * (4096 // TILE) * 4096
