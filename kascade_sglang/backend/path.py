"""The contract of what computes a step.

A key index is born in ``select``, kept in the ``IndexStore`` between layers, and used in
``attend``. ``DecodePath`` and ``ExtendPath`` run the kernels, ``ReferencePath`` plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from kascade_sglang.host.steps import Batch, Layer

if TYPE_CHECKING:
    from kascade_sglang.backend.index_store import IndexStore

StepT = TypeVar("StepT")
"""All that one step's layers share: frozen, made by ``record``, kept by the backend."""
SelectedT = TypeVar("SelectedT")
"""The keys an anchor selected, as KV slots."""


class Path(Protocol[StepT, SelectedT]):
    """One way to compute steps.

    attends_densely: whether ``select`` can also attend to every key, for layer 0; where not,
        layer 0 runs in the dense backend.
    """

    attends_densely: bool

    def reserve(self, requests: int) -> None:
        """Allocate what captured steps of up to ``requests`` requests use."""

    def prepare(self, batch: Batch) -> None:
        """Do what must happen on the host before a graph runs; once a step."""

    def record(self, batch: Batch) -> StepT:
        """Return the step. Recorded in a graph where ``batch`` is captured."""

    def select(
        self,
        step: StepT,
        q: torch.Tensor,
        layer: Layer,
        out: torch.Tensor | None = None,
        store: IndexStore[SelectedT] | None = None,
    ) -> SelectedT:
        """Select the keys of every query tile.

        q: [tokens, Hq, D]. out: like q; where given, also attend to every key, into it.
        store: where candidate pools are put and taken from; without, every key is scored.
        """

    def attend(
        self,
        step: StepT,
        q: torch.Tensor,
        layer: Layer,
        selected: SelectedT,
        head_map: torch.Tensor,
    ) -> torch.Tensor:
        """Attend to selected keys and to the own tile.

        head_map: int32 [H], which of a tile's lists each KV head reads. Returns [tokens, Hq, D];
        rows of q past the step's last token come back as zeros or unwritten padding.
        """
