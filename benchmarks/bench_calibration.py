"""Time and memory of ``kascade calibrate`` on a model of real size, with random weights, on a GPU.

Random weights say nothing about anchors; what is computed, and so what it takes, is the same.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.serving_model import ANCHORS, make_shape
from kascade_sglang.calibration.build import CRITERIA
from kascade_sglang.calibration.run import CalibrationConfig, calibrate
from kascade_sglang.calibration.sources import PromptSource
from kascade_sglang.files import append_csv
from kascade_sglang.provenance import gpu_provenance

RESULTS = Path(__file__).parent / "results/calibration.csv"
COLUMNS = """model criterion prompts tokens gpus seconds weights_mb peak_memory_mb
    gpu versions commit date""".split()


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a model folder of ``serving_model`` with random bfloat16 weights."""
    path = make_shape(name, folder)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path), dtype=torch.bfloat16
        )
    model.save_pretrained(path)
    return path


def write_prompts(path: Path, count: int, tokens: int) -> None:
    """Write texts of random words of the shape's tokenizer, one token each."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            text = " ".join(f"w{draw.randrange(3, 1000)}" for _ in range(tokens))
            file.write(json.dumps({"text": text}) + "\n")


def measure(model: Path, criterion: str, prompts: Path, device_map: str | None) -> dict[str, float]:
    """Calibrate; seconds include loading the weights.

    Memory is what torch allocated at most, on the GPU where that was most.
    """
    gpus = range(torch.cuda.device_count() if device_map else 1)
    torch.cuda.empty_cache()
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    config = CalibrationConfig(
        model=str(model),
        out=model / f"{criterion}.json",
        anchors=len(ANCHORS[model.name]),
        source=PromptSource(prompts=prompts),
        criterion=criterion,
        device_map=device_map,
    )
    started = time.monotonic()
    calibrate(config)
    seconds = time.monotonic() - started
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {
        "gpus": len(gpus),
        "seconds": round(seconds, 1),
        "weights_mb": weights >> 20,
        "peak_memory_mb": max(map(torch.cuda.max_memory_allocated, gpus)) >> 20,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_calibration", description=__doc__)
    parser.add_argument("--model", choices=ANCHORS, default="llama-3.1-8b", help="shape")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768, help="of each prompt")
    parser.add_argument("--device-map", help="of kascade calibrate: auto takes all GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, outside a repository")
    return parser.parse_args()


def main() -> int:
    """Calibrate by every criterion; rows are written as they come."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("bench_calibration: expected a CUDA GPU, got none; run it on a machine with one")
    with tempfile.TemporaryDirectory(prefix="kascade-calibration-") as name:
        folder = Path(name)
        model = make_checkpoint(options.model, folder)
        prompts = folder / "prompts.jsonl"
        write_prompts(prompts, options.prompts, options.tokens)
        for criterion in options.criteria:
            figures = measure(model, criterion, prompts, options.device_map)
            row = {"model": options.model, "criterion": criterion, "prompts": options.prompts}
            row |= {"tokens": options.tokens, **figures, **gpu_provenance(options.commit)}
            append_csv(options.out, COLUMNS, [row])
            print(f"{criterion}: {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
