"""Calibrate: prompts -> statistics -> anchors -> plan."""

import datetime
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

import kascade_sglang
from kascade_kernels.budget import Budget
from kascade_sglang.calibration import hf_model
from kascade_sglang.calibration.anchors import AnchorChoice, pick_anchors, total_gain
from kascade_sglang.calibration.collect import ATTENTION, LayerStats, collect, sample_tiles
from kascade_sglang.calibration.errors import CalibrationError
from kascade_sglang.calibration.prompts import file_digest, read_prompts
from kascade_sglang.calibration.similarity import anchor_gain, layer_similarity
from kascade_sglang.plan.schema import HEAD_MODES, Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationConfig:
    """What the user asks ``kascade calibrate`` for; fields are the options' names.

    anchors: how many to pick, or the layers themselves, whose head maps are then measured.
    tiles: query tiles measured in each prompt.
    """

    model: str
    prompts: Path
    anchors: int | tuple[int, ...]
    out: Path
    device: str = "auto"
    dtype: str = "auto"
    max_tokens: int | None = None
    topk_ratio: float = 0.1
    min_k: int = 128
    heads: str = "per_head"
    seed: int = 0
    limit: int | None = None
    tiles: int = 64


def calibrate(config: CalibrationConfig) -> Plan:
    """Calibrate a model and write its plan to ``config.out``; progress goes to stderr.

    Raises CalibrationError, before the weights are loaded where that is possible.
    """
    budget = _check(config)
    hf_config = hf_model.read_config(config.model)
    shape = hf_model.shape_of(hf_config)
    _check_anchors(config.anchors, shape.layers)
    tokenizer = hf_model.load_tokenizer(config.model)
    context = hf_model.context_length(hf_config)
    prompts = read_prompts(
        config.prompts, tokenizer, context, config.max_tokens, config.limit, config.seed
    )
    digest = file_digest(config.prompts)
    prompts = _long_enough(prompts, budget, config.prompts)
    _check_vocabulary(prompts, hf_config.get_text_config().vocab_size, config.model)
    device = hf_model.pick_device(config.device)
    model = hf_model.load_model(config.model, config.dtype, device)
    measured = _measure(model, prompts, budget, config)

    pooled = config.heads == "pooled"
    score = measured.pooled if pooled else layer_similarity(measured.similarity)
    gain = anchor_gain(score, measured.importance)
    if isinstance(config.anchors, int):
        choice = pick_anchors(gain, config.anchors)
    else:
        choice = AnchorChoice(config.anchors, total_gain(gain, config.anchors))
    plan = Plan(
        model=_model_name(config.model),
        shape=shape,
        anchors=choice.anchors,
        similarity=_borrowed_rows(choice, measured.similarity),
        budget=budget,
        heads=config.heads,
        provenance=_provenance(config, digest, measured, choice, score, model),
    )
    try:
        plan.save(config.out)
    except OSError as error:
        raise CalibrationError(f"--out {config.out}: cannot write ({error.strerror})") from error
    return plan


def _check(config: CalibrationConfig) -> Budget:
    """Refuse wrong options before anything large is read."""
    if config.heads not in HEAD_MODES:
        raise CalibrationError(f"--heads: expected one of {HEAD_MODES}, got {config.heads!r}")
    if config.tiles < 1:
        raise CalibrationError(f"--tiles: expected 1 or more, got {config.tiles}")
    folder = config.out.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or config.out.is_dir():
        raise CalibrationError(f"--out {config.out}: not a file that can be written")
    try:
        return Budget(config.topk_ratio, config.min_k)
    except ValueError as error:
        raise CalibrationError(str(error)) from error


def _check_anchors(anchors: int | tuple[int, ...], layers: int) -> None:
    if isinstance(anchors, int):
        if not 1 <= anchors <= layers:
            raise CalibrationError(
                f"--anchors: expected 1 to {layers}, the model's layers, got {anchors}"
            )
    elif anchors[0] != 0 or list(anchors) != sorted(set(anchors)) or anchors[-1] >= layers:
        raise CalibrationError(
            f"--anchors: expected ascending layers from 0 to at most {layers - 1}, got "
            f"{','.join(map(str, anchors))}"
        )


def _long_enough(prompts: list[list[int]], budget: Budget, path: Path) -> list[list[int]]:
    """Drop prompts in which every tile's budget is dense, and say so."""
    kept = [ids for ids in prompts if sample_tiles(len(ids), budget, count=1, seed=0)]
    if not kept:
        raise CalibrationError(
            f"{path}: every prompt is too short to measure (the longest has "
            f"{max(map(len, prompts))} tokens): with this budget every tile attends to all keys"
        )
    if len(kept) < len(prompts):
        logger.warning(
            "%s: skipped %d of %d prompts, too short to measure",
            path,
            len(prompts) - len(kept),
            len(prompts),
        )
    return kept


def _check_vocabulary(prompts: list[list[int]], size: int, model: str) -> None:
    largest = max(max(ids) for ids in prompts)
    if largest >= size:
        raise CalibrationError(
            f"model {model}: its tokenizer yields token {largest}, but its vocabulary has {size}"
        )


def _measure(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    budget: Budget,
    config: CalibrationConfig,
) -> LayerStats:
    """Collect statistics under a progress bar of tiles."""
    tiles = sum(len(sample_tiles(len(ids), budget, config.tiles, seed=0)) for ids in prompts)
    with tqdm(total=tiles, desc="calibrating", unit="tile") as bar:
        try:
            return collect(model, prompts, budget, config.tiles, config.seed, bar.update)
        except torch.OutOfMemoryError as error:
            raise CalibrationError(
                f"{model.device}: out of memory on a prompt of up to {max(map(len, prompts))} "
                "tokens; lower --max-tokens"
            ) from error


def _borrowed_rows(
    choice: AnchorChoice, similarity: np.ndarray
) -> dict[int, tuple[tuple[float, ...], ...]]:
    """For every reuse layer, its heads' similarity to the heads of its nearest earlier anchor."""
    rows = {}
    for layer in range(len(similarity)):
        anchor = max(anchor for anchor in choice.anchors if anchor <= layer)
        if anchor != layer:
            table = similarity[anchor, layer].round(6).tolist()
            rows[layer] = tuple(tuple(row) for row in table)
    return rows


def _model_name(model: str) -> str:
    """Return a hub id as it is and a local folder's name, so that no path enters the plan."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _provenance(
    config: CalibrationConfig,
    digest: str,
    measured: LayerStats,
    choice: AnchorChoice,
    score: np.ndarray,
    model: transformers.PreTrainedModel,
) -> dict[str, Any]:
    """What the plan was made from; ``layer_score`` holds only the pairs i < j, row by row."""
    return {
        "source": "kascade calibrate",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "kascade_sglang": kascade_sglang.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "prompts_file": config.prompts.name,
        "prompts_sha256": digest,
        "prompts": measured.prompts,
        "tokens": measured.tokens,
        "max_tokens": config.max_tokens,
        "limit": config.limit,
        "seed": config.seed,
        "tiles": measured.tiles,
        "tiles_per_prompt": config.tiles,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": ATTENTION,
        "anchors_by": "dynamic programme" if isinstance(config.anchors, int) else "the user",
        "objective": round(choice.objective, 6),
        "importance": measured.importance.round(4).tolist(),
        "layer_score": [row[i + 1 :].round(4).tolist() for i, row in enumerate(score)],
    }
