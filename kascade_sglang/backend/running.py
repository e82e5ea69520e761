"""The step that layers run in: what computes it, and what its anchors have selected so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch

from kascade_sglang.backend.index_store import IndexStore
from kascade_sglang.backend.path import Path, SelectedT, StepT
from kascade_sglang.host.steps import Batch, Layer


@dataclass(frozen=True)
class Running(Generic[StepT, SelectedT]):
    """A step, the path that computes it, and the store between its layers.

    A path, its step and what it selects belong together: so types follow a query to the kernel.
    """

    path: Path[StepT, SelectedT]
    step: StepT
    store: IndexStore[SelectedT]

    @staticmethod
    def begin(
        path: Path[StepT, SelectedT], batch: Batch, store: IndexStore[SelectedT]
    ) -> Running[StepT, SelectedT]:
        """Forget the last step and record this one, in a graph where ``batch`` is captured."""
        store.clear()
        return Running(path, path.record(batch), store)

    def select(self, q: torch.Tensor, layer: Layer, out: torch.Tensor | None = None) -> None:
        """Select an anchor's keys and keep them; arguments are those of ``Path.select``."""
        selected = self.path.select(self.step, q, layer, out, self.store)
        self.store.put(layer.index, selected)

    def attend(self, q: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Attend to what a layer's anchor selected; [tokens, Hq, D] as ``q``."""
        selected, head_map = self.store.get(layer.index)
        return self.path.attend(self.step, q, layer, selected, head_map)
