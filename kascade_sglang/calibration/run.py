"""Calibrate: prompts -> measurements, a file a prompt -> anchors -> plan -> report."""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import kascade_sglang
from kascade_kernels.budget import Budget, PoolRule
from kascade_sglang.calibration import hf_model
from kascade_sglang.calibration.anchors import AnchorChoice
from kascade_sglang.calibration.answers import MOST_ROWS, Selecting, reply_rows
from kascade_sglang.calibration.build import CRITERIA
from kascade_sglang.calibration.checkpoint import Checkpoint
from kascade_sglang.calibration.collect import (
    ATTENTION,
    LayerStats,
    average,
    full_layers,
    measure_prompt,
    sample_tiles,
    work_of,
)
from kascade_sglang.calibration.elimination import choose, chosen, run_densely
from kascade_sglang.calibration.elimination import work_of as work_of_choosing
from kascade_sglang.calibration.estimate import describe, row_work, seconds_per_work
from kascade_sglang.calibration.measured import Measured
from kascade_sglang.calibration.pools import AUTO, PoolChoice, choose_makers, most_pooled
from kascade_sglang.calibration.pools import work_of as work_of_makers
from kascade_sglang.calibration.prompts import Prompt
from kascade_sglang.calibration.similarity import best_heads
from kascade_sglang.calibration.sources import PromptSet, PromptSource, digest_of
from kascade_sglang.errors import CalibrationError
from kascade_sglang.files import why_unwritable
from kascade_sglang.plan.report import check_target, write_report
from kascade_sglang.plan.schema import HEAD_MODES, POOL_SHARE, Plan, are_makers, check_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationConfig:
    """What the user asks ``kascade calibrate`` for; fields are the options' names.

    anchors: how many to pick, or the layers themselves, whose head maps are then measured; None
        takes the fewest that lose little (``elimination.fewest_good``); by mass, ANCHORS or, where
        there are fewer, all layers with full attention.
    trust_remote_code: whether code that comes with the model may run.
    report: a page about the plan, .png, .svg or .html. tiles: query tiles of each prompt.
    criterion: what anchors are chosen by, one of CRITERIA.
    makers: of the anchors given, those that leave a pool of ``pool_share`` of the keys for others;
        AUTO takes the fewest that lose little (``pools.choose_makers``).
    """

    model: str
    out: Path
    anchors: int | tuple[int, ...] | None = None
    source: PromptSource = field(default_factory=PromptSource)
    report: Path | None = None
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    topk_ratio: float = 0.1
    min_k: int = 128
    heads: str = "per_head"
    tiles: int = 64
    criterion: str = "kl"
    makers: tuple[int, ...] | str = ()
    pool_share: float = POOL_SHARE

    @property
    def seed(self) -> int:
        """Of the prompts and tiles drawn."""
        return self.source.seed


def calibrate(config: CalibrationConfig) -> Plan:
    """Calibrate a model and write its plan to ``config.out``; progress goes to stderr.

    What is measured is kept beside ``config.out`` until the plan is written, so the same call
    goes on where a stopped one ended, and gives the same plan.
    Raises CalibrationError, before the weights are loaded where that is possible.
    """
    measured, checkpoint = measure(config)
    makers = most_pooled(measured.pools).makers if config.makers == AUTO else config.makers
    pools = (makers, config.pool_share)
    plan = measured.plan(config.anchors, config.heads, config.criterion, *pools)
    try:
        plan.save(config.out)
    except OSError as error:
        raise CalibrationError(
            f"--out {config.out}: cannot write ({error.strerror}); the measurements are kept in "
            f"{checkpoint.folder}: free space and give the same command to go on"
        ) from error
    if config.report is not None:
        write_report(plan, config.report)
    checkpoint.remove()
    return plan


def measure(config: CalibrationConfig) -> tuple[Measured, Checkpoint]:
    """Measure a model, or what a stopped run has not; raises as ``calibrate`` does."""
    budget = _check(config)
    check_name(hf_model.name_of(config.model))
    hf_config = hf_model.read_config(config.model, config.trust_remote_code)
    shape = hf_model.shape_of(hf_config)
    tokenizer = hf_model.load_tokenizer(config.model, config.trust_remote_code)
    found = config.source.read(tokenizer, hf_model.context_length(hf_config))
    found = found._replace(prompts=_long_enough(found.prompts, budget, config.source.name))
    windowed = hf_model.windowed_layers(hf_config, _longest(found.prompts))
    full = [layer for layer in range(shape.layers) if layer not in windowed]
    _check_anchors(1 if config.anchors is None else config.anchors, full)
    _check_makers(config)
    if config.criterion == "kl":
        _say_what_answers_are(found.prompts, budget, config.source.name)
    _check_vocabulary(found.prompts, hf_config.get_text_config().vocab_size, config.model)
    device = hf_model.pick_device(config.device)
    checkpoint = Checkpoint(config.out, _settings(config, hf_config, found, device))
    model = hf_model.load_model(
        config.model, config.dtype, device, config.device_map, config.trust_remote_code
    )
    chosen = _measure(model, found.prompts, budget, config, checkpoint)
    provenance = _provenance(config, found, model)
    name = hf_model.name_of(config.model)
    return Measured(*chosen, name, shape, budget, provenance), checkpoint


def _check(config: CalibrationConfig) -> Budget:
    """Refuse wrong options before anything large is read."""
    if config.heads not in HEAD_MODES:
        raise CalibrationError(f"--heads: expected one of {HEAD_MODES}, got {config.heads!r}")
    if config.criterion not in CRITERIA:
        raise CalibrationError(f"--criterion: expected one of {CRITERIA}, got {config.criterion!r}")
    for name, least in (("tiles", 1), ("seed", 0)):
        if (value := getattr(config, name)) < least:
            raise CalibrationError(f"--{name}: expected {least} or more, got {value}")
    read = {"--prompts": config.source.prompts}
    if why := why_unwritable(config.out, read):
        raise CalibrationError(f"--out {config.out}: {why}")
    if config.report is not None:
        check_target("--report", config.report, {**read, "--out": config.out})
    hf_model.check_device_map(config.device_map)
    if config.device_map is not None and config.device != "auto":
        raise CalibrationError(
            f"--device-map {config.device_map}: expected no --device beside it, got "
            f"{config.device}; drop one"
        )
    try:
        return Budget(config.topk_ratio, config.min_k)
    except ValueError as error:
        raise CalibrationError(str(error)) from error


def _check_anchors(anchors: int | tuple[int, ...], layers: list[int]) -> None:
    """Refuse anchors that the layers with full attention do not have."""
    every = layers == list(range(len(layers)))
    what = "the model's layers" if every else "its layers with full attention"
    if isinstance(anchors, int):
        if not 1 <= anchors <= len(layers):
            raise CalibrationError(f"--anchors: expected 1 to {len(layers)}, {what}, got {anchors}")
        return
    given = ",".join(map(str, anchors))
    inside = anchors[-1] <= layers[-1]
    if anchors[0] != layers[0] or list(anchors) != sorted(set(anchors)) or not inside:
        raise CalibrationError(
            f"--anchors: expected ascending layers from {layers[0]} to at most {layers[-1]}, got "
            f"{given}"
        )
    if not set(anchors) <= set(layers):
        raise CalibrationError(
            f"--anchors: expected layers with full attention, of {','.join(map(str, layers))}, "
            f"got {given}"
        )


def _check_makers(config: CalibrationConfig) -> None:
    """Refuse makers that are no anchors, and shares that are none."""
    if config.makers == AUTO and config.criterion != "kl":
        raise CalibrationError(
            f"--makers auto: expected --criterion kl, which says what answers lose, got "
            f"{config.criterion}; name the makers, or drop --criterion"
        )
    given, named = config.anchors, config.anchors if isinstance(config.anchors, tuple) else ()
    if config.makers != AUTO and not are_makers(config.makers, named):
        raise CalibrationError(
            "--makers: expected ascending layers of those that --anchors names, got "
            f"{','.join(map(str, config.makers))} with --anchors {given}"
        )
    try:
        PoolRule(config.pool_share)
    except ValueError as error:
        raise CalibrationError(f"--pool-share: {error}") from error
    if config.pool_share != POOL_SHARE and not config.makers:
        raise CalibrationError("--pool-share: expected --makers beside it, got none; add them")


def _longest(prompts: list[Prompt]) -> int:
    return max(len(prompt.ids) for prompt in prompts)


def _say_what_answers_are(prompts: list[Prompt], budget: Budget, name: str) -> None:
    silent = sum(not reply_rows(prompt, budget) for prompt in prompts)
    if silent:
        logger.warning(
            "%s: in %d of %d prompts no reply of an assistant can be told where keys are left "
            "out; what the model loses is measured at %d tokens spread over them instead",
            name,
            silent,
            len(prompts),
            MOST_ROWS,
        )


def _long_enough(prompts: list[Prompt], budget: Budget, name: str) -> list[Prompt]:
    """Drop prompts in which every tile's budget is dense, and say so."""
    kept = [one for one in prompts if sample_tiles(len(one.ids), budget, count=1, seed=0)]
    if not kept:
        raise CalibrationError(
            f"{name}: every prompt is too short to measure (the longest has "
            f"{_longest(prompts)} tokens): with this budget every tile attends to all keys"
        )
    if len(kept) < len(prompts):
        logger.warning(
            "%s: skipped %d of %d prompts, too short to measure",
            name,
            len(prompts) - len(kept),
            len(prompts),
        )
    return kept


def _check_vocabulary(prompts: list[Prompt], size: int, model: str) -> None:
    largest = max(max(prompt.ids) for prompt in prompts)
    if largest >= size:
        raise CalibrationError(
            f"model {model}: its tokenizer yields token {largest}, but its vocabulary has {size}"
        )


def _measure(
    model: transformers.PreTrainedModel,
    prompts: list[Prompt],
    budget: Budget,
    config: CalibrationConfig,
    checkpoint: Checkpoint,
) -> tuple[LayerStats, list[AnchorChoice], list[PoolChoice]]:
    """Measure what the checkpoint lacks and, by ``kl``, choose anchors, under a progress bar."""
    layers, depth = full_layers(model, _longest(prompts)), len(hf_model.decoder_layers(model))
    lengths = [len(prompt.ids) for prompt in prompts]
    heads = hf_model.shape_of(model.config).kv_heads
    measured = [checkpoint.load(number, len(layers), heads) for number in range(len(prompts))]
    left = [length for length, stats in zip(lengths, measured, strict=True) if stats is None]
    if len(left) < len(prompts):
        kept = len(prompts) - len(left)
        logger.warning("resuming: %d of %d prompts are measured already", kept, len(prompts))
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    per_work = seconds_per_work(model, longest)
    work, by_row = float(sum(work_of(length, depth) for length in left)), 0.0
    if config.criterion == "kl":
        by_row = row_work(model, longest, per_work)
        work += work_of_choosing(lengths, layers, depth, by_row)
        if config.makers == AUTO:
            work += work_of_makers(len(lengths), config.anchors, depth, by_row)
    print(f"calibrating {describe(per_work * work, lengths)}", file=sys.stderr)
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    # smoothing=0: the time left counts the pauses of the forward passes between prompts' tiles.
    with tqdm(total=work, desc="calibrating", bar_format=shown, smoothing=0) as bar:
        try:
            for number, prompt in enumerate(prompts):
                if measured[number] is None:
                    length, seed = len(prompt.ids), config.seed + number
                    tiles = sample_tiles(length, budget, config.tiles, seed)
                    stats = measure_prompt(model, prompt.ids, tiles, budget, layers, bar.update)
                    checkpoint.store(number, stats)
                    measured[number] = stats
            found = average(layers, [stats for stats in measured if stats is not None])
            choices = _choose(model, prompts, found, budget, config, bar.update, by_row)
            bar.update(work - bar.n)  # Fewer trials than there might have been.
            return found, *choices
        except torch.OutOfMemoryError as error:
            raise CalibrationError(
                f"{model.device}: out of memory on a prompt of up to {_longest(prompts)} "
                "tokens; lower --max-tokens, or spread the model with --device-map auto"
            ) from error
        except KeyboardInterrupt:
            bar.close()
            logger.warning(
                "stopped: %d of %d prompts are measured and kept in %s; give the same command "
                "to go on",
                sum(stats is not None for stats in measured),
                len(prompts),
                checkpoint.folder,
            )
            raise


def _choose(
    model: transformers.PreTrainedModel,
    prompts: list[Prompt],
    stats: LayerStats,
    budget: Budget,
    config: CalibrationConfig,
    on_work: Callable[[float], object],
    by_row: float,
) -> tuple[list[AnchorChoice], list[PoolChoice]]:
    """Return anchors and makers, and what the model loses by them; none where mass chooses."""
    if config.criterion == "mass":
        return [], []
    maps = torch.from_numpy(best_heads(stats.similarity))
    how = Selecting(stats.layers, maps, budget, config.heads == "pooled")
    sparse = run_densely(model, prompts, how, on_work)
    choices = choose(sparse, how.layers, config.anchors, on_work, by_row)
    if config.makers != AUTO:
        return choices, []
    anchors, rule = chosen(choices, config.anchors).anchors, PoolRule(config.pool_share)
    return choices, choose_makers(sparse, how, anchors, rule, on_work, by_row)


def _settings(
    config: CalibrationConfig,
    hf_config: transformers.PreTrainedConfig,
    found: PromptSet,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that the measurements' bits depend on; anchors and heads are picked later."""
    described = json.dumps(hf_config.to_diff_dict(), sort_keys=True, default=str)
    return {
        "format": 4,  # of the files of measurements
        "model": hf_model.name_of(config.model),
        "model_config": hashlib.sha256(described.encode()).hexdigest(),
        "weights": hf_model.weights_version(config.model, hf_config),
        "prompts": found.name,
        # Before the tokens that they change: the first that differs is named.
        "max_tokens": config.source.max_tokens,
        "limit": config.source.limit,
        "tokens": digest_of(found.prompts),
        "topk_ratio": config.topk_ratio,
        "min_k": config.min_k,
        "tiles": config.tiles,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": config.device_map or device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kascade_sglang": kascade_sglang.__version__,
    }


def _provenance(
    config: CalibrationConfig, found: PromptSet, model: transformers.PreTrainedModel
) -> dict[str, Any]:
    """What the plan is made from."""
    return {
        "source": "kascade calibrate",
        "kascade_sglang": kascade_sglang.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "prompts_file": found.name,
        "prompts_sha256": found.digest,
        "max_tokens": config.source.max_tokens,
        "limit": config.source.limit,
        "seed": config.seed,
        "tiles_per_prompt": config.tiles,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ",".join(sorted({weight.device.type for weight in model.parameters()})),
        "attention": ATTENTION,
    }
