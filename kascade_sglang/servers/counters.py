"""What a server's ``/metrics`` shows, and Kascade's counters of key reads in it."""

from collections import Counter
from collections.abc import Iterator

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kascade_sglang.servers.loopback import uses_proxies

KeyCounters = dict[tuple[str, str], int]
"""{(phase, kind): keys}; see ``backend/key_counter.py``."""


def read_samples(url: str, timeout: float = 30) -> Iterator[Sample]:
    """Yield every sample of the ``/metrics`` of the server at ``url``.

    timeout: seconds. Raises httpx.HTTPError where there is none.
    """
    options = {"timeout": timeout, "follow_redirects": True, "trust_env": uses_proxies(url)}
    reply = httpx.get(f"{url}/metrics/", **options)
    reply.raise_for_status()
    for family in text_string_to_metric_families(reply.text):
        yield from family.samples


def read_key_counters(url: str, timeout: float = 30) -> KeyCounters:
    """Return the counters of the server at ``url``; empty under another backend.

    timeout: seconds. Raises httpx.HTTPError where there is no ``/metrics``.
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
