"""Kascade's counters of key reads, as a server's ``/metrics`` shows them."""

import urllib.request
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

KeyReads = dict[tuple[str, str], int]
"""{(phase, kind): keys}; see ``backend/metrics.py``."""


def read_key_reads(url: str, timeout: float = 30) -> KeyReads:
    """Return the counters of the server at ``url``; empty under another backend.

    timeout: seconds. Raises OSError (urllib's) where there is no ``/metrics``.
    """
    with urllib.request.urlopen(f"{url}/metrics/", timeout=timeout) as reply:
        text = reply.read().decode()
    reads: KeyReads = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "kascade_key_reads_total":
                reads[sample.labels["phase"], sample.labels["kind"]] += int(sample.value)
    return dict(reads)


def share_attended(before: KeyReads, after: KeyReads, phase: str | None = None) -> float | None:
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
