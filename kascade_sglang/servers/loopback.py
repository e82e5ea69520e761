"""Servers of this machine are never asked through a proxy, whatever the environment says."""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

HOSTS = ("localhost", "127.0.0.1", "::1")
VARIABLES = ("no_proxy", "NO_PROXY")
"""Libraries read the one or the other, some the first alone where both are set."""


def uses_proxies(url: str) -> bool:
    """Whether requests to an address may go through the proxies that the environment names.

    For ``trust_env`` of httpx's clients: with a SOCKS proxy they cannot even be made.
    """
    try:
        host = urlsplit(url).hostname or ""
        return host != "localhost" and not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or no address at all, which the client refuses itself
        return True


def without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep loopback off proxies, for any library and for children."""
    named = [host.strip() for name in VARIABLES for host in environ.get(name, "").split(",")]
    hosts = ",".join(dict.fromkeys(filter(None, (*named, *HOSTS))))
    return dict.fromkeys(VARIABLES, "*" if "*" in named else hosts)
