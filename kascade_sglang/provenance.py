"""Where and with what a result was measured: the columns every results file ends with."""

import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(commit: str | None = None) -> dict[str, str]:
    """Return device, dtype the demo model is served in, versions, commit and date.

    commit: where the files are no repository; otherwise it is asked.
    """
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "dtype": "bfloat16" if gpu else "float32",
        "versions": f"sglang {version('sglang')} torch {torch.__version__}",
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
