"""What a single request may ask for: budgets of its own, or dense attention in a phase or in both.

It is the entry ``kascade`` of ``custom_params``, which SGLang's sampling parameters carry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kascade_kernels.budget import PPM, TILE, Budget
from kascade_sglang.config import KascadeConfig
from kascade_sglang.errors import KascadeError, sentence

NAME = "kascade"
"""The entry of ``custom_params``."""
EVERYTHING = Budget(1.0, 2 * TILE)
SPARSE = {"both": ("prefill", "decode"), "decode": ("decode",), "none": ()}
"""Which phases are sparse, by what ``phases`` says."""
PHASES_OF = {
    "topk_ratio": ("prefill", "decode"),
    "min_k": ("decode",),
    "prefill_topk_ratio": ("prefill",),
    "prefill_min_k": ("prefill",),
}
"""Budgets that a request may ask for, and the phases that they are about."""
KINDS = ("nothing", "dense", "phases", "budget")
"""What requests are counted by; see ``kind_of``."""
MARK = "\x1fkascade:"
"""Begins what we add to a request's ``extra_key``; no user's key may hold it."""


@dataclass(frozen=True)
class Ask:
    """One request's budgets; a dense phase has ``EVERYTHING``."""

    prefill: Budget
    decode: Budget

    @property
    def key(self) -> str:
        """What the radix cache tells such requests' KV by."""
        budgets = (self.prefill, self.decode)
        return MARK + ",".join(f"{each.ratio_ppm}/{each.min_k}" for each in budgets)


class AskReader:
    """Reads what requests ask for, on a server with a configuration.

    phases: those of ``prefill`` and ``decode`` that run on the kascade backend.
    context: positions that a request may have.
    """

    def __init__(self, config: KascadeConfig, phases: frozenset[str], context: int) -> None:
        self._config, self._context = config, context
        sparse = phases if config.sparse_prefill else phases - {"prefill"}
        self._server = {
            "prefill": config.prefill_budget if "prefill" in sparse else EVERYTHING,
            "decode": config.budget if "decode" in sparse else EVERYTHING,
        }
        self._sparse = sparse
        self._usual = Ask(*map(_canonical, self._server.values()))

    def read(self, asked: object) -> Ask | None:
        """Return what a request asks for; None where that is what the server does anyway.

        Raises KascadeError with one sentence.
        asked: the value of ``custom_params["kascade"]``.
        """
        try:
            return self._read(_given(asked))
        except KascadeError as error:
            raise KascadeError(f"custom_params.{NAME}: {sentence(error)}") from error

    def check(self, custom_params: object) -> None:
        """Raise KascadeError where a request's ``custom_params`` ask what they may not ask."""
        if not isinstance(custom_params, Mapping | None):
            raise KascadeError(
                f'custom_params: expected an object like {{"{NAME}": {{"phases": "none"}}}}, got '
                f"{sentence(repr(custom_params))}"
            )
        asked = asked_in(custom_params)
        if asked is not None:
            self.read(asked)

    def _read(self, values: Mapping[str, Any]) -> Ask | None:
        sparse = self._sparse_phases(values)
        for name, phases in PHASES_OF.items():
            if name in values and not sparse.intersection(phases):
                raise KascadeError(
                    f"{name}: expected no budget where attention is dense, got {values[name]!r} "
                    f"and sparse phases {sorted(sparse) or 'none'}; drop it, or ask for other "
                    "phases"
                )
        budgets = (
            self._budget(phase, values) if phase in sparse else EVERYTHING
            for phase in ("prefill", "decode")
        )
        ask = Ask(*map(_canonical, budgets))
        return None if ask.key == self._usual.key else ask

    def _sparse_phases(self, values: Mapping[str, Any]) -> frozenset[str]:
        if "phases" not in values:
            return self._sparse
        asked = values["phases"]
        if not isinstance(asked, str) or asked not in SPARSE:
            known = ", ".join(map(repr, SPARSE))
            raise KascadeError(f"phases: expected one of {known}, got {asked!r}")
        sparse = frozenset(SPARSE[asked])
        if not sparse <= self._sparse:
            raise KascadeError(
                f"phases: expected no more than this server's, {sorted(self._sparse)}, got "
                f"{asked!r}; start it with --kascade-phases both"
            )
        return sparse

    def _budget(self, phase: str, values: Mapping[str, Any]) -> Budget:
        own, prefix = self._server[phase], "prefill_" if phase == "prefill" else ""
        given = [name for name in (f"{prefix}topk_ratio", "topk_ratio") if name in values][:1]
        ratio = values[given[0]] if given else own.ratio
        given += [name for name in (f"{prefix}min_k",) if name in values]
        try:
            budget = Budget(ratio, values.get(f"{prefix}min_k", own.min_k))
        except ValueError as error:
            # The budget says which of its two it is; a request may have another name for it.
            field, _, why = str(error).partition(":")
            name = next((name for name in given if name.endswith(field)), field)
            raise KascadeError(f"{name}:{why}") from error
        last = (self._context - 1) // TILE
        room = self._config.most_selected(phase, self._context)
        if budget.selected(last) > room and not budget.is_everything:
            wanted = max(budget.min_k, TILE * (last + 1) * budget.ratio_ppm // PPM)
            raise KascadeError(
                f"{' and '.join(given)}: expected at most {room + TILE} keys of this server's "
                f"{self._context} in {phase}, got {wanted}; ask for less, for phases 'none', or "
                "start the server with --kascade-max-topk-ratio"
            )
        return budget


def _given(asked: object) -> dict[str, Any]:
    """Return what is asked for by name, without what is null."""
    if not isinstance(asked, Mapping):
        raise KascadeError(
            f'expected an object like {{"topk_ratio": 0.2}} or {{"phases": "none"}}, got {asked!r}'
        )
    known = ("phases", *PHASES_OF)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise KascadeError(f"unknown {unknown[0]!r}; a request may ask for {', '.join(known)}")
    return {name: value for name, value in asked.items() if value is not None}


def _canonical(budget: Budget) -> Budget:
    """Return one budget for all that attend to everything."""
    return EVERYTHING if budget.is_everything else budget


def kind_of(asked: object, ask: Ask | None) -> str:
    """Return which of ``KINDS`` a request is counted as.

    asked: what it says. ask: what that comes to, None where it is what the server does anyway:
    ``nothing``. ``dense``: it reads all keys in both phases. ``budget``: it names a budget.
    """
    if ask is None:
        return "nothing"
    if ask.prefill == ask.decode == EVERYTHING:
        return "dense"
    return "phases" if _given(asked).keys().isdisjoint(PHASES_OF) else "budget"


_here: dict[str, AskReader] = {}


def accept(config: KascadeConfig, phases: frozenset[str], context: int) -> None:
    """Let requests that this process serves ask from now on; arguments are AskReader's."""
    _here[NAME] = AskReader(config, phases, context)


def reader_here() -> AskReader | None:
    """Return what reads requests in this process; None where it runs no kascade backend."""
    return _here.get(NAME)


def asked_in(custom_params: object) -> object:
    """Return what a request asks for, not read yet; None where it asks for nothing."""
    return custom_params.get(NAME) if isinstance(custom_params, Mapping) else None
