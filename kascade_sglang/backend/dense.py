"""Which of SGLang's backends computes what is not sparse."""

import torch


def default_dense_backend() -> str:
    """Return the in-tree backend that this machine's hardware calls for."""
    if not torch.cuda.is_available():
        return "torch_native"
    return "fa3" if torch.cuda.get_device_capability() == (9, 0) else "flashinfer"
