"""What a worker serves with, where those who run the server look: ``/metrics``, ``/server_info``.

Imported by workers alone. prometheus_client reads as it is imported where processes share their
metrics, which SGLang decides after it has read its arguments: earlier, its own would be lost.
"""

from prometheus_client import Gauge

from kascade_sglang.backend.in_force import FIELDS, in_force
from kascade_sglang.config import KascadeConfig

SETTINGS = Gauge(
    "kascade_settings",
    "What the server serves with, as labels; always 1.",
    tuple(FIELDS),
    # One series for all ranks, which serve alike.
    multiprocess_mode="max",
)
_published: dict[str, str] = {}


def publish(config: KascadeConfig, metrics: bool) -> None:
    """Say what this process serves with from now on. metrics: in ``/metrics``, too."""
    _published.update(in_force(config))
    if metrics:
        SETTINGS.labels(**_published).set(1)


def published() -> dict[str, str]:
    """Return what this process serves with; empty where it runs no kascade backend."""
    return dict(_published)
