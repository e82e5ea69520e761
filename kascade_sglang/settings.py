"""Every setting, declared once: variable, flag, help, parsing, the documents' table and the log.

Precedence: command-line flag, environment variable, ``"kascade"`` key of the model's config,
then what the plan says. This module alone reads the environment.
"""

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kascade_sglang.errors import KascadeError

logger = logging.getLogger(__name__)

PREFIX = "KASCADE_"
FLAGS_VARIABLE = "KASCADE_FLAGS"
"""Carries the parsed flags, as JSON, to the processes that SGLang starts."""
MIN_K, PREFILL_MIN_K = 3584, 5632
"""Keys attended to at least in decoding and in prefill, where neither user nor plan says otherwise.

What real models lose depends on how many keys a list has more than on which share of the context
they are (``benchmarks/results/prefill_rules.csv``, ``quality_budgets.csv``). In prefill the 32
queries of a tile, in every head of a group, share one list, so it is longer."""
PRESETS = {
    "fast": {"min_k": 128, "prefill_min_k": 128},
    "balanced": {},
    "careful": {"phases": "decode"},
}
"""What a preset says where the user says nothing else: lists of a tenth of any context; the
defaults; prefill dense."""


@dataclass(frozen=True)
class About:
    """What people read of a setting.

    default: in words, where it is no value. expected, fix: of a refusal, where the choices do not
    say it. flag, model: whether a flag and the model's config set it, as a variable always does.
    """

    text: str
    default: str | None = None
    expected: str = "text"
    fix: str = ""
    metavar: str = "N"
    flag: bool = True
    model: bool = True


RATIO = {"expected": "a number in (0, 1]", "fix": "0.1 attends to a tenth", "metavar": "R"}
COUNT = {"expected": "a whole number", "fix": "give a count of keys, like 128"}


class Settings(BaseModel):
    """Settings and their defaults, None where plan or hardware decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Annotated[
        str | None,
        About(
            "plan made by `kascade calibrate`, or `preset:NAME` for the paper's anchors",
            "`kascade_plan.json` beside the weights, a shipped plan, or a preset",
            metavar="FILE",
        ),
    ] = None
    preset: Annotated[
        Literal["fast", "balanced", "careful"],
        About(
            "`fast`: a tenth of any context, in prefill, too; `balanced`: the defaults; `careful`: "
            "dense prefill; other settings override what a preset says"
        ),
    ] = "balanced"
    topk_ratio: Annotated[
        float | None,
        About("share of the context to attend to, in (0, 1]", "the plan's, 0.1", **RATIO),
    ] = None
    min_k: Annotated[
        int | None, About("least number of keys to attend to", f"the plan's, {MIN_K}", **COUNT)
    ] = None
    prefill_topk_ratio: Annotated[
        float | None, About("the share in prefill", "that of decoding", **RATIO)
    ] = None
    prefill_min_k: Annotated[
        int | None,
        About("least number of keys in prefill", f"the plan's, {PREFILL_MIN_K}", **COUNT),
    ] = None
    max_topk_ratio: Annotated[
        float | None,
        About(
            "largest share that a single request may ask for; lists have room for it",
            "no longer lists than the server's own",
            **RATIO,
        ),
    ] = None
    heads: Annotated[
        Literal["per_head", "pooled"] | None,
        About("one selection per KV head, or one for all heads of a layer", "the plan's"),
    ] = None
    dense_backend: Annotated[
        str | None,
        About(
            "SGLang's backend for layer 0: fa3, flashinfer, triton or torch_native",
            "fa3 on sm_90, flashinfer on other GPUs, torch_native without one",
            metavar="NAME",
        ),
    ] = None
    exact: Annotated[
        bool,
        About(
            "score with exact keys and log-sum-exps: slower, the exact Top-k",
            "off: 8-bit keys, sampled log-sum-exps",
            expected="1 or 0",
        ),
    ] = False
    phases: Annotated[
        Literal["both", "decode"],
        About("what is sparse; `decode`: prefill attends to every key, only decoding is sparse"),
    ] = "both"
    score_memory_mb: Annotated[
        int,
        Field(ge=1),
        About(
            "MiB of GPU memory for one launch's scores; longer batches are scored in parts",
            expected="at least 1",
            fix="default 768",
        ),
    ] = 768  # Room for 64 requests that decode with 128K in the shape of Llama-3.1-8B.
    selection: Annotated[
        Literal["topk", "window", "random", "quest", "omnikv", "lessismore"],
        About("how keys are selected; others than `topk` are for comparisons", flag=False),
    ] = "topk"
    tile: Annotated[
        int,
        Field(ge=1),
        About(
            "positions in a query tile; others are for ablations on the torch reference",
            expected="a whole number of at least 1",
            fix="kernels know 32 alone",
            flag=False,
            model=False,
        ),
    ] = 32


@dataclass(frozen=True)
class Setting:
    """One field of ``Settings``, as people meet it."""

    name: str
    about: About
    choices: tuple[str, ...]
    is_switch: bool
    default: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return environment_variable(self.name)

    @property
    def flag(self) -> str:
        """Its flag, with what follows it."""
        flag = f"--kascade-{self.name.replace('_', '-')}"
        return f"{flag} {{{','.join(self.choices)}}}" if self.choices else flag

    def refusal(self, value: object) -> str:
        """Say in one sentence why a value is refused."""
        choices = f"one of {', '.join(map(repr, self.choices))}"
        expected = choices if self.choices else self.about.expected
        fix = f"; {self.about.fix}" if self.about.fix else ""
        return f"{self.name}: expected {expected}, got {value!r}{fix}"


def environment_variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{name.upper()}"


def _declared() -> Iterator[Setting]:
    for name, field in Settings.model_fields.items():
        about = next(each for each in field.metadata if isinstance(each, About))
        kinds = (field.annotation, *get_args(field.annotation))
        choices = [get_args(kind) for kind in kinds if get_origin(kind) is Literal]
        default = str(field.default) if about.default is None else about.default
        yield Setting(name, about, *(choices or [()]), bool in kinds, default)


SETTINGS = {setting.name: setting for setting in _declared()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; ``judge_settings`` judges their values."""
    group = parser.add_argument_group("Kascade", "sparse attention, --attention-backend kascade")
    for setting in SETTINGS.values():
        if setting.about.flag:
            flag, _, choices = setting.flag.partition(" ")
            kind = {"metavar": choices or setting.about.metavar}
            if setting.is_switch:
                kind = {"action": "store_true", "default": None}
            group.add_argument(
                flag, help=f"{setting.about.text}; default: {setting.default}", **kind
            )


def carry_flags(arguments: Mapping[str, Any]) -> None:
    """Put parsed flags into the environment, which processes inherit.

    Their values are judged where all settings are read, so that all is refused at once.
    """
    given = {name: arguments.get(f"kascade_{name}") for name in SETTINGS}
    flags = {name: value for name, value in given.items() if value is not None}
    os.environ[FLAGS_VARIABLE] = json.dumps(flags)


def require_flags() -> None:
    """Raise KascadeError, a line for each flag, where those that were carried have no values."""
    refused: list[str] = []
    _from_flags(os.environ, refused)
    if refused:
        raise KascadeError("\n".join(refused))


def table() -> list[list[str]]:
    """Return the documents' table of settings, its header first."""
    rows = [["setting", "flag", "environment", "default"]]
    for each in SETTINGS.values():
        flag = f"`{each.flag}`" if each.about.flag else ""
        rows.append([each.about.text, flag, f"`{each.variable}`", each.default])
    return rows


def _parse(source: str, values: Mapping[str, Any], refused: list[str]) -> Settings:
    """Read one source, in which None is silence; notes a line for each value that is refused."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        refused += _refusals(source, error)
        wrong = {each["loc"][0] for each in error.errors()}
        return Settings.model_validate({name: given[name] for name in given.keys() - wrong})


def _refusals(source: str, error: ValidationError) -> Iterator[str]:
    for each in error.errors():
        name = each["loc"][0]
        if name in SETTINGS:
            yield f"{source}: {SETTINGS[name].refusal(each['input'])}"
        else:
            known = ", ".join(name for name, setting in SETTINGS.items() if setting.about.model)
            yield f"{source}: unknown setting {name!r}; known: {known}"


def _from_flags(environ: Mapping[str, str], refused: list[str]) -> Settings:
    given = environ.get(FLAGS_VARIABLE) or "{}"
    try:
        flags = json.loads(given)
    except (ValueError, RecursionError):
        flags = None
    if not isinstance(flags, dict):
        refused.append(f"{FLAGS_VARIABLE}: expected what a server's start leaves there, unset it")
        return Settings()
    return _parse("command line", flags, refused)


def _from_environment(environ: Mapping[str, str], refused: list[str]) -> Settings:
    given = {name: environ.get(each.variable) or None for name, each in SETTINGS.items()}
    return _parse("environment KASCADE_*", given, refused)


def _from_model(options: Any, refused: list[str]) -> Settings:
    source = 'model config "kascade"'
    if options is not None and not isinstance(options, Mapping):
        refused.append(f"{source}: expected an object of settings, got {options!r}")
        return Settings()
    given = dict(options or {})
    for name in SETTINGS.keys() & given:
        if not SETTINGS[name].about.model:
            refused.append(
                f"{source}: {name}: expected it in the environment alone, got it here; set "
                f"{SETTINGS[name].variable}"
            )
            del given[name]
    return _parse(source, given, refused)


def judge_settings(
    model_options: Any, environ: Mapping[str, str] | None = None
) -> tuple[Settings, list[str]]:
    """Merge flags, environment and the model config's ``kascade`` key, in that order.

    model_options: the value of that key, None if there is none.
    Also returns a line for each setting that is wrong, which names its source and is left out.
    """
    environ = os.environ if environ is None else environ
    refused: list[str] = []
    sources = (
        _from_model(model_options, refused),
        _from_environment(environ, refused),
        _from_flags(environ, refused),
    )
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= source.model_dump(exclude_unset=True)
    return Settings(**{**PRESETS[merged.get("preset", "balanced")], **merged}), refused


def read_settings(model_options: Any, environ: Mapping[str, str] | None = None) -> Settings:
    """Return what ``judge_settings`` does; raises KascadeError, a line for each that is wrong."""
    settings, refused = judge_settings(model_options, environ)
    if refused:
        raise KascadeError("\n".join(refused))
    return settings


def changed(settings: Settings, defaults: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that differ from their defaults; defaults: where the plan has them."""
    usual = {**Settings().model_dump(), **defaults}
    given = settings.model_dump(exclude_unset=True)
    return {name: value for name, value in given.items() if value != usual[name]}


def announce(differ: Mapping[str, object], environ: Mapping[str, str] | None = None) -> None:
    """Log the settings that differ from their defaults, and variables that nothing reads."""
    environ = os.environ if environ is None else environ
    known = [FLAGS_VARIABLE, *(setting.variable for setting in SETTINGS.values())]
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            logger.warning(
                "kascade: %s: expected a variable that Kascade knows, got one that nothing reads; "
                "did you mean %s?",
                name,
                nearest,
            )
    values = ", ".join(f"{name}={value}" for name, value in differ.items()) or "none"
    logger.info("kascade: settings that differ from their defaults: %s", values)


def set_tile() -> None:
    """Give ``kascade_kernels``, which reads no environment, the tile of an ablation.

    Its modules copy the tile as they are imported, so this comes before them. A value that is no
    tile is left to ``read_settings``: SGLang hides what a plugin raises as it is imported.
    """
    variable = SETTINGS["tile"].variable
    refused: list[str] = []
    tile = _from_environment({variable: os.environ.get(variable, "")}, refused).tile
    if refused:
        return
    early = "kascade_kernels.budget" in sys.modules
    from kascade_kernels import budget

    if early and tile != budget.TILE:
        raise KascadeError(
            f"{variable}: expected kascade_sglang to be imported before kascade_kernels, got "
            f"{budget.TILE} in use already; import kascade_sglang first"
        )
    budget.TILE = tile
