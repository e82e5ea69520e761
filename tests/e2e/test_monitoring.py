"""What people watch a server by: ``/server_info``, and every metric that the dashboard names."""

import json
import re
import time

import httpx
import pytest

from kascade_sglang.servers.counters import read_samples
from kascade_sglang.servers.demo_model import MODEL_NAME
from kascade_sglang.servers.process import Server
from tests.support.documents import ROOT
from tests.support.requests import shipped_plan
from tests.support.servers import everyday

pytestmark = pytest.mark.e2e

DASHBOARD = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())


def metrics_named() -> set[str]:
    """Metrics in the dashboard's panels and variables."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [each["query"] for each in DASHBOARD["templating"]["list"]]
    return set(re.findall(r"\b(?:sglang:|kascade_)\w+", "\n".join([*targets, *variables])))


ASKED = (
    *({"phases": "none"}, {"topk_ratio": 1.0}),
    *({"topk_ratio": 0.2}, {"phases": "decode"}, {"phases": "both"}, None),
)


def body_of(asked: dict[str, object] | None) -> dict[str, object]:
    """A request of /generate; asked: what it asks of Kascade."""
    params = {"max_new_tokens": 2, "ignore_eos": True}
    if asked is not None:
        params["custom_params"] = {"kascade": asked}
    return {"input_ids": list(range(64)), "sampling_params": params}


def requests_by_kind(server: Server) -> dict[str, float]:
    """Requests so far, by what they asked for."""
    samples = read_samples(server.url)
    return {s.labels["asked"]: s.value for s in samples if s.name == "kascade_requests_total"}


@everyday
def test_a_server_tells_what_it_serves_with(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello there. " * 40}], "max_tokens": 8}
    body = {"model": MODEL_NAME, "stream": True, "ignore_eos": True, **chat}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200 and "[DONE]" in reply.text
    before = requests_by_kind(server)
    for asked in ASKED:
        again = httpx.post(f"{server.url}/generate", json=body_of(asked), timeout=120)
        assert again.status_code == 200
    counted = requests_by_kind(server)
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()
    missing, until = metrics_named(), time.monotonic() + 60
    while missing and time.monotonic() < until:
        samples = list(read_samples(server.url))
        missing -= {sample.name for sample in samples}
        time.sleep(0.5)
    assert missing == set(), "metrics of the dashboard that no server has"
    (state,) = info["internal_states"]
    settings = state["kascade"]
    plan = shipped_plan()
    assert settings["anchors"] == ",".join(map(str, plan.anchors))
    assert (settings["topk_ratio"], settings["phases"]) == (str(plan.budget.ratio), "both")
    assert settings["min_k"] == str(plan.budget.min_k)
    (labels,) = [each.labels for each in samples if each.name == "kascade_settings"]
    assert labels == settings
    grown = {kind: counted[kind] - before[kind] for kind in counted}
    assert grown == {"nothing": 2, "dense": 2, "phases": 1, "budget": 1}


def test_the_dashboard_shows_what_is_kascades_own() -> None:
    ours = {name for name in metrics_named() if name.startswith("kascade_")}
    counted = {
        f"kascade_{what}_total" for what in ("key_reads", "list_lengths", "steps", "requests")
    }
    assert ours == counted | {"kascade_settings"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
