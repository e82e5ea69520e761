"""What a server's ``/metrics`` shows, and Kascade's counters of key reads in it."""

import urllib.request
from collections import Counter
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

KeyCounters = dict[tuple[str, str], int]
"""{(phase, kind): keys}; see ``backend/key_counter.py``."""


def read_samples(url: str, timeout: float = 30) -> Iterator[Sample]:
    """Yield every sample of the ``/metrics`` of the server at ``url``.

    timeout: seconds. Raises OSError (urllib's) where there is none.
    """
    with urllib.request.urlopen(f"{url}/metrics/", timeout=timeout) as reply:
        text = reply.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def read_key_counters(url: str, timeout: float = 30) -> KeyCounters:
    """Return the counters of the server at ``url``; empty under another backend.

    timeout: seconds. Raises OSError (urllib's) where there is no ``/metrics``.
    """
    reads: KeyCounters = Counter()
    for sample in read_samples(url, timeout):
        if sample.name == "kascade_key_reads_total":
            reads[sample.labels["phase"], sample.labels["kind"]] += int(sample.value)
    return dict(reads)


def share_attended(
    before: KeyCounters, after: KeyCounters, phase: str | None = None
) -> float | None:
    """Keys attended to as a share of dense attention's, between two readings of the counters.

    phase: ``prefill`` or ``decode``; None for both. None is returned where nothing was read.
    """
    grown = {
        kind: sum(
            value - before.get(key, 0)
            for key, value in after.items()
            if key[1] == kind and phase in (None, key[0])
        )
        for kind in ("attended", "dense")
    }
    return grown["attended"] / grown["dense"] if grown["dense"] else None
