"""Quantised checkpoints: no plan is made from weights without their scales."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kascade_sglang.calibration.hf_model import load_model
from kascade_sglang.calibration.quantised import WAY_OUT
from kascade_sglang.errors import CalibrationError

Weights = dict[str, torch.Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def without_change(folder: Path, weights: Weights) -> None:
    pass


def modelopt(folder: Path, weights: Weights) -> None:
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    eight_bits(folder, weights)


def modelopt_in_config(folder: Path, weights: Weights) -> None:
    configure(folder, {"quant_method": "modelopt", "quant_algo": "FP8"})


def configure(folder: Path, quantisation: dict) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantisation}
    path.write_text(json.dumps(config))


def scales(folder: Path, weights: Weights) -> None:
    weights[f"{Q_PROJ}.weight_scale"] = torch.tensor(0.01)


def input_scales(folder: Path, weights: Weights) -> None:
    weights[f"{Q_PROJ}.input_scale"] = torch.tensor(0.01)


def a_bias(folder: Path, weights: Weights) -> None:
    weights[f"{Q_PROJ}.bias"] = torch.zeros(64)


def eight_bits(folder: Path, weights: Weights) -> None:
    """The largest weight becomes the largest number that eight bits hold."""
    name = f"{Q_PROJ}.weight"
    weights[name] = (weights[name] / weights[name].abs().max() * 448).to(torch.float8_e4m3fn)


def whole_numbers(folder: Path, weights: Weights) -> None:
    weights[f"{Q_PROJ}.weight"] = (100 * weights[f"{Q_PROJ}.weight"]).to(torch.int8)


def gptq(folder: Path, weights: Weights) -> None:
    configure(folder, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    packed(folder, weights)


def awq(folder: Path, weights: Weights) -> None:
    configure(folder, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True})
    packed(folder, weights)


def bitsandbytes(folder: Path, weights: Weights) -> None:
    configure(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True})


def compressed_tensors(folder: Path, weights: Weights) -> None:
    configure(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    packed(folder, weights)


def packed(folder: Path, weights: Weights) -> None:
    del weights[f"{Q_PROJ}.weight"]
    weights[f"{Q_PROJ}.qweight"] = torch.zeros(4, 64, dtype=torch.int32)
    weights[f"{Q_PROJ}.scales"] = torch.ones(1, 64)


def changed(source: Path, target: Path, change: Callable[[Path, Weights], None]) -> Path:
    """Return a copy of a model's folder with other files and weights."""
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    weights = load_file(path)
    change(target, weights)
    save_file(weights, path, {"format": "pt"})
    return target


def load(folder: Path) -> torch.nn.Module:
    return load_model(str(folder), "auto", torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        modelopt,
        modelopt_in_config,
        scales,
        input_scales,
        a_bias,
        eight_bits,
        whole_numbers,
        packed,
        gptq,
        awq,
        bitsandbytes,
        compressed_tensors,
    ],
)
def test_weights_that_are_nothing_by_themselves_are_refused(
    change: Callable[[Path, Weights], None], model_folder: Path, tmp_path: Path
) -> None:
    folder = changed(model_folder, tmp_path / "model", change)
    with pytest.raises(CalibrationError) as refused:
        load(folder)
    said = str(refused.value)
    assert said.startswith(f"model {folder}: ") and said.endswith(WAY_OUT)
    assert "\n" not in said


def unread_layers(folder: Path, weights: Weights) -> None:
    """What other checkpoints hold and no layer needs."""
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["model.layers.4.eh_proj.weight"] = torch.ones(4, 4)
    weights["vision_tower.patch.weight"] = torch.ones(4, 4)
    weights[f"{Q_PROJ}.q_scale"] = torch.ones(1)


@pytest.mark.parametrize("change", [without_change, unread_layers])
def test_weights_that_are_complete_are_read(
    change: Callable[[Path, Weights], None], model_folder: Path, tmp_path: Path
) -> None:
    folder = changed(model_folder, tmp_path / "model", change)
    weights = load_file(model_folder / "model.safetensors")
    assert torch.equal(load(folder).get_parameter(f"{Q_PROJ}.weight"), weights[f"{Q_PROJ}.weight"])
