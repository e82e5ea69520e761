"""What a worker serves with, where those who run the server look: ``/metrics``, ``/server_info``.

Imported by workers alone. prometheus_client reads as it is imported where processes share their
metrics, which SGLang decides after it has read its arguments: earlier, its own would be lost.
"""

from prometheus_client import Counter, Gauge

from kascade_sglang.asks import KINDS
from kascade_sglang.backend.in_force import FIELDS, in_force
from kascade_sglang.config import KascadeConfig

SETTINGS = Gauge(
    "kascade_settings",
    "What the server serves with, as labels; always 1.",
    tuple(FIELDS),
    # One series for all ranks, which serve alike.
    multiprocess_mode="max",
)
REQUESTS = Counter(
    "kascade_requests",
    "Requests by what they asked for. nothing: what the server does anyway; dense: all keys; "
    "phases: a dense phase; budget: another share or least number of keys.",
    ["asked"],
)
_published: dict[str, str] = {}
_requests: dict[str, Counter] = {}


def publish(config: KascadeConfig, metrics: bool, requests: bool) -> None:
    """Say what this process serves with from now on.

    metrics: in ``/metrics``, too. requests: there, ``count_request`` counts here.
    """
    _published.update(in_force(config))
    if metrics:
        SETTINGS.labels(**_published).set(1)
    if requests:
        _requests.update({kind: REQUESTS.labels(kind) for kind in KINDS})


def count_request(kind: str) -> None:
    """Count a request by its kind, in the one process of a server's ranks that counts them."""
    if _requests:
        _requests[kind].inc()


def published() -> dict[str, str]:
    """Return what this process serves with; empty where it runs no kascade backend."""
    return dict(_published)
