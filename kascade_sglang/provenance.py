"""Where and with what a result was measured: the columns every results file ends with."""

import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kascade_sglang

ABSENT = "not installed"


def device_name() -> str:
    """Return the first GPU's name, ``cpu`` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Return the releases that decide what a server does, by package."""
    return {
        "kascade": kascade_sglang.__version__,
        "sglang": _installed("sglang"),
        "torch": torch.__version__,
        "triton": _installed("triton"),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def provenance(commit: str | None = None) -> dict[str, str]:
    """Return device, dtype the demo model is served in, versions, commit and date.

    commit: where the files are no repository; otherwise it is asked.
    """
    named = versions()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "device": device_name(),
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "versions": f"sglang {named['sglang']} torch {named['torch']}",
        "commit": commit or described.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def gpu_provenance(commit: str | None = None) -> dict[str, str]:
    """Return the same for a benchmark of a GPU, which names its own dtypes."""
    stamp = provenance(commit)
    return {
        "gpu": stamp["device"],
        **{name: stamp[name] for name in ("versions", "commit", "date")},
    }
