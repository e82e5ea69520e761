"""Quantised checkpoints: those whose weights would be read without their scales are refused."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from kascade_sglang.errors import CalibrationError

NOT_IN_CONFIG = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says how it has quantised, which transformers does not read."""
SMALL = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32", "U32")
"""Types of safetensors in which weights are stored with scales beside them."""
OF_THE_CACHE = ("k_scale", "v_scale", "q_scale", "prob_scale")
"""Scales of a KV cache, which calibration has none of."""
WAY_OUT = (
    "calibrate the model that it was made from: a plan fits every model of its shape, quantised "
    "or not"
)


def quantisation(config: PreTrainedConfig) -> str | None:
    """Return what a configuration calls the way its weights are quantised; None if they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    for bits in (4, 8):
        if found.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(found.get("quant_method"))


def refuse_unread_scales(model: str, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint that transformers would read as if it were not quantised.

    Looks at files, before anything is loaded or, of a hub id, after that. Raises CalibrationError.
    """
    method = quantisation(config)
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise _refusal(model, f"quantised ones ({method})")
    if method is not None:
        return
    if _file_of(model, NOT_IN_CONFIG):
        raise _refusal(model, f"quantised ones ({NOT_IN_CONFIG})")
    described = _file_of(model, "config.json")
    for path in sorted(described.parent.glob("*.safetensors")) if described else []:
        for name, kind in _types(path):
            if kind in SMALL and name.endswith("weight"):
                raise _refusal(model, f"{kind} for {name}, in {path.name}")


def refuse_unused(model: str, loaded: PreTrainedModel, unused: Iterable[str]) -> None:
    """Refuse weights that stand beside those of the model's layers and were not read.

    Whole layers that a model does not have, of vision or of several predicted tokens, do no harm.
    """
    modules = {name for name, _ in loaded.named_modules() if name}
    scales = [
        name
        for name in sorted(unused)
        if name.rpartition(".")[0] in modules and not name.endswith(OF_THE_CACHE)
    ]
    if scales:
        raise _refusal(
            model, f"{len(scales)} weights that its layers do not use ({scales[0]}, ...)"
        )


def _refusal(model: str, got: str) -> CalibrationError:
    return CalibrationError(
        f"model {model}: expected weights that are complete by themselves, got {got}; {WAY_OUT}"
    )


def _file_of(model: str, name: str) -> Path | None:
    """Return a file of a folder or hub id, None where there is none."""
    if os.path.isdir(model):
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(cached_file(model, name))
    except (OSError, ValueError):
        return None


def _types(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            return [(name, file.get_slice(name).get_dtype()) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):  # loading says what is wrong
        return []
