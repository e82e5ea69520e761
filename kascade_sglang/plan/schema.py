"""The plan file: anchors, similarity and defaults, calibrated once per model.

One JSON object, written and read here only. Pure Python: importing it loads neither torch nor
SGLang, so a bad plan is refused before anything large starts.
"""

import json
import stat
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasPath, BaseModel, Field, ValidationError

from kascade_kernels.budget import TILE, Budget, PoolRule
from kascade_sglang.errors import KascadeError
from kascade_sglang.files import write_atomically

FORMAT = "kascade-plan"
VERSION = 1
MAX_BYTES = 64 * 2**20
MAX_LAYERS = 4096
"""More layers or KV heads than any model has; a larger count is a damaged file."""
MAX_NAME = 500
POOL_SHARE = 0.25
"""Of the keys, that a candidate pool holds unless a plan says."""
HEAD_MODES = ("per_head", "pooled")
ONE_HOT = "one-hot from the map"
"""Value of ``provenance["similarity"]`` where a head map stood in for measured similarities."""


class PlanError(KascadeError):
    """A plan that cannot be used; the message says why and what to do."""


IDENTITY = "identity, not measured"
"""The same where nobody has measured or published which heads fit which."""


class LayerRole(Enum):
    """What a layer does: attend densely and select, select and attend, or reuse a selection.

    WINDOW: it attends in its own sliding window and has no part in Kascade.
    """

    DENSE = "dense"
    ANCHOR = "anchor"
    REUSE = "reuse"
    WINDOW = "window"


Whole = Annotated[int, Field(strict=True)]
Count = Annotated[Whole, Field(ge=1, le=MAX_LAYERS)]
Size = Annotated[Whole, Field(ge=1)]


@dataclass(frozen=True)
class ModelShape:
    """The part of a model's configuration that a plan depends on; files are held to the types."""

    layers: Count
    q_heads: Size
    kv_heads: Count
    head_dim: Size
    hidden: Size

    def differences(self, other: "ModelShape") -> list[str]:
        """Return one phrase for each field in which ``other``, the model served, differs."""
        pairs = asdict(self).items()
        return [
            f"{name} is {getattr(other, name)}, the plan has {value}"
            for name, value in pairs
            if getattr(other, name) != value
        ]


@dataclass(frozen=True)
class Plan:
    """Anchors and head similarities of one model.

    anchors: ascending layer numbers; the first is the first layer with full attention, 0 unless
        that one is windowed.
    similarity: for every layer that borrows, [KV heads][heads of the layer it borrows from]: the
        share of a head's own Top-k mass that the other head's keys recover. The head map is its
        argmax (section 3.4). Reuse layers borrow an anchor's lists, pooled anchors a maker's pool.
    windowed: layers with a sliding window (Gemma 2 and 3), neither anchors nor reuse layers.
    budget: what similarities were measured at.
    decode_min_k, prefill_min_k: least number of keys when served; None leaves it to the release.
    makers: anchors that score all keys and leave the best as a candidate pool, which anchors after
        them score alone. None: every anchor scores all keys. pool_share: of keys in a pool.
    """

    model: str
    shape: ModelShape
    anchors: tuple[int, ...]
    similarity: dict[int, tuple[tuple[float, ...], ...]]
    budget: Budget = Budget()
    heads: str = "per_head"
    provenance: dict[str, Any] = field(default_factory=dict)
    windowed: tuple[int, ...] = ()
    decode_min_k: int | None = None
    prefill_min_k: int | None = None
    makers: tuple[int, ...] = ()
    pool_share: float | None = None

    def __post_init__(self) -> None:
        check_name(self.model)
        _check_windowed(self.windowed, self.shape.layers)
        _check_anchors(self.anchors, self.shape.layers, self.windowed)
        for phase, least in (("decode", self.decode_min_k), ("prefill", self.prefill_min_k)):
            try:
                Budget(self.budget.ratio, self.budget.min_k if least is None else least)
            except ValueError as error:
                raise PlanError(f"plan.{phase}_{error}") from error
        _check_makers(self.makers, self.pool_share, self.anchors)
        for layer in self.borrowing_layers:
            _check_similarity(layer, self.similarity.get(layer), self.shape.kv_heads)
        extra = sorted(set(self.similarity) - set(self.borrowing_layers))
        if extra:
            raise PlanError(f"plan.similarity: layers {extra} borrow nothing by this plan")

    @cached_property
    def anchor_of(self) -> tuple[int, ...]:
        """For every layer, the nearest anchor at or before it; a windowed layer, itself."""
        return tuple(
            layer
            if layer in self.windowed
            else max(anchor for anchor in self.anchors if anchor <= layer)
            for layer in range(self.shape.layers)
        )

    @property
    def full_layers(self) -> list[int]:
        """Layers that take part: every one but the windowed."""
        return [layer for layer in range(self.shape.layers) if layer not in self.windowed]

    @property
    def reuse_layers(self) -> list[int]:
        """Layers that attend to an earlier anchor's keys."""
        return [layer for layer in self.full_layers if layer not in self.anchors]

    @property
    def pool_rule(self) -> PoolRule | None:
        """How many keys are in a candidate pool; None where no maker leaves any."""
        return PoolRule(self.pool_share) if self.makers else None

    @cached_property
    def maker_of(self) -> dict[int, int]:
        """For every pooled anchor, the maker whose candidate pool it scores: the last before it."""
        return {
            anchor: max(maker for maker in self.makers if maker < anchor)
            for anchor in self.anchors
            if anchor not in self.makers and any(maker < anchor for maker in self.makers)
        }

    @property
    def borrowing_layers(self) -> list[int]:
        """Layers that have a head map: reuse layers and pooled anchors."""
        return sorted((*self.reuse_layers, *self.maker_of))

    @cached_property
    def head_map(self) -> dict[int, tuple[int, ...]]:
        """For every borrowing layer, whose head each KV head borrows; ties go to the lower."""
        everything = range(self.shape.kv_heads)
        return {layer: self.local_head_map(layer, everything) for layer in self.borrowing_layers}

    def local_head_map(self, layer: int, heads: range) -> tuple[int, ...]:
        """Head map of a borrowing layer within one rank's KV heads, numbered from its first."""
        rows = (self.similarity[layer][head][heads.start : heads.stop] for head in heads)
        return tuple(row.index(max(row)) for row in rows)

    def role(self, layer: int) -> LayerRole:
        """Return what the layer does; the first anchor attends densely and still selects."""
        if layer in self.windowed:
            return LayerRole.WINDOW
        if layer == self.anchors[0]:
            return LayerRole.DENSE
        return LayerRole.ANCHOR if layer in self.anchors else LayerRole.REUSE

    def check_fits(self, shape: ModelShape) -> None:
        """Raise PlanError unless the plan was made for a model of this shape."""
        differences = self.shape.differences(shape)
        if differences:
            raise PlanError(
                f"plan: made for another model ({self.model}): {'; '.join(differences)}; "
                "run `kascade calibrate` for the model you serve"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it stands in the file."""
        # Written only where there are any: releases without them still read the others.
        windowed = {"windowed": list(self.windowed)} if self.windowed else {}
        pools = {"makers": list(self.makers), "pool_share": self.pool_share} if self.makers else {}
        least = {"decode_min_k": self.decode_min_k, "prefill_min_k": self.prefill_min_k}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {"id": self.model, **asdict(self.shape)},
            **windowed,
            "anchors": list(self.anchors),
            **pools,
            "anchor_of": list(self.anchor_of),
            "similarity": {str(layer): rows for layer, rows in self.similarity.items()},
            "tile": TILE,
            "topk_ratio": self.budget.ratio,
            "min_k": self.budget.min_k,
            **{name: keys for name, keys in least.items() if keys is not None},
            "heads": self.heads,
            "provenance": self.provenance,
        }

    def save(self, path: Path) -> None:
        """Write the plan in one step: a full disk leaves the old one. Raises OSError."""
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())


def check_name(name: str) -> None:
    """Raise PlanError for what no plan can be named after."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise PlanError(
            f"plan.model.id: expected a name of at most {MAX_NAME} printable characters, got "
            f"{name[:MAX_NAME]!r}"
        )


def _check_windowed(windowed: tuple[int, ...], layers: int) -> None:
    inside = all(0 <= layer < layers for layer in windowed)
    if not inside or list(windowed) != sorted(set(windowed)) or len(windowed) == layers:
        raise PlanError(
            f"plan.windowed: expected some, not all, of the layers 0 to {layers - 1}, ascending, "
            f"got {list(windowed)}"
        )


def _check_anchors(anchors: tuple[int, ...], layers: int, windowed: tuple[int, ...]) -> None:
    first = next(layer for layer in range(layers) if layer not in windowed)
    if not anchors or list(anchors) != sorted(set(anchors)) or anchors[0] != first:
        raise PlanError(
            f"plan.anchors: expected ascending layers from {first}, got {list(anchors)}"
        )
    if set(anchors) & set(windowed):
        raise PlanError(
            f"plan.anchors: layers {sorted(set(anchors) & set(windowed))} have a sliding window; "
            "only full attention can select"
        )
    if anchors[-1] >= layers:
        raise PlanError(
            f"plan.anchors: expected layers below {layers}, the model's count, got {anchors[-1]}"
        )


def are_makers(makers: tuple[int, ...], anchors: tuple[int, ...]) -> bool:
    """Whether layers may be the makers of these anchors: some of them, ascending, none twice."""
    return list(makers) == sorted(set(makers) & set(anchors))


def _check_makers(makers: tuple[int, ...], share: float | None, anchors: tuple[int, ...]) -> None:
    if not are_makers(makers, anchors):
        raise PlanError(
            f"plan.makers: expected some of the anchors {list(anchors)}, ascending, got "
            f"{list(makers)}"
        )
    if bool(makers) != (share is not None):
        raise PlanError("plan.pool_share: expected a share with makers, and none without")
    if share is not None:
        try:
            PoolRule(share)
        except ValueError as error:
            raise PlanError(f"plan.{error}") from error


def _check_similarity(layer: int, rows: Any, kv_heads: int) -> None:
    if rows is None:
        raise PlanError(f"plan.similarity: layer {layer} is missing; calibrate again")
    square = len(rows) == kv_heads and all(len(row) == kv_heads for row in rows)
    if not square or not all(0 <= value <= 1e6 for row in rows for value in row):
        raise PlanError(
            f"plan.similarity: layer {layer} must hold {kv_heads} x {kv_heads} numbers of 0 or more"
        )


class _File(BaseModel):
    """The form of a plan file; ``Plan`` and ``Budget`` check what it says."""

    version: Literal[VERSION]
    tile: Literal[TILE]
    shape: Annotated[ModelShape, Field(validation_alias="model")]
    model: Annotated[str, Field(validation_alias=AliasPath("model", "id"))]
    anchors: tuple[Whole, ...]
    similarity: dict[int, tuple[tuple[Annotated[float, Field(strict=True)], ...], ...]]
    topk_ratio: Any
    min_k: Any
    heads: Literal[HEAD_MODES]
    provenance: dict[str, Any]
    anchor_of: tuple[Whole, ...]
    windowed: tuple[Whole, ...] = ()
    decode_min_k: Whole = None
    prefill_min_k: Whole = None
    makers: tuple[Whole, ...] = ()
    pool_share: Any = None


def plan_from_json(raw: Any) -> Plan:
    """Build a plan from the file's JSON value; raises PlanError naming the field that is wrong."""
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PlanError(f'plan: not a Kascade plan (no "format": "{FORMAT}")')
    try:
        file = _File.model_validate(raw)
        budget = Budget(file.topk_ratio, file.min_k)
    except ValidationError as error:
        raise PlanError(_refusal(**error.errors(include_url=False)[0])) from error
    except ValueError as error:
        raise PlanError(f"plan.{error}") from error
    said = {name: value for name, value in file if name in Plan.__dataclass_fields__}
    plan = Plan(budget=budget, **said)
    if file.anchor_of != plan.anchor_of:
        raise PlanError("plan.anchor_of: every layer must reuse its nearest earlier anchor")
    return plan


def _refusal(loc: tuple[Any, ...], msg: str, input: Any, **_: Any) -> str:
    """Say what pydantic found first in a sentence of ours."""
    name = ".".join(map(str, ("plan", *loc)))
    if msg == "Field required":
        return f"{name} is missing; calibrate again"
    for theirs, ours in (("Input should be", "expected"), (" valid integer", " whole number")):
        msg = msg.replace(theirs, ours)
    return f"{name}: {msg}, got {input!r}; calibrate again"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"plan: {double!r} stands twice in one object; calibrate again")
    return found


def _no_number(text: str) -> None:
    raise PlanError(f"plan: expected numbers, got {text}; calibrate again")


def require_file(path: Path, most_bytes: int) -> None:
    """Raise PlanError unless there is a regular file of at most so many bytes; or OSError.

    Reading a device or a pipe may never end.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise PlanError("expected a file, got a folder or device")
    if found.st_size > most_bytes:
        raise PlanError(f"{found.st_size} bytes, more than the {most_bytes} it may have")


def load_plan(path: Path) -> Plan:
    """Read a plan file; raises PlanError with the file's name for anything that is wrong."""
    try:
        require_file(path, MAX_BYTES)
        text = path.read_text(encoding="utf-8")
        return plan_from_json(
            json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_number)
        )
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, 5000-digit numbers
        raise PlanError(f"{path}: not valid JSON ({error})") from error
