"""The demo's server process, without SGLang: neither it nor its command outlives the other."""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import httpx
import psutil
import pytest

from kascade_sglang.servers.client import client_of
from kascade_sglang.servers.loopback import uses_proxies, without_proxy
from kascade_sglang.servers.process import (
    Server,
    ServerError,
    free_port,
    run_command,
    started,
)

SCRIPT = """
import sys
from pathlib import Path
from kascade_sglang.servers.process import Server, run_command

class Healthy(Server):
    def is_healthy(self):
        return sys.argv[2] == "waiting"

def main():
    sleep = (sys.executable, "-c", "import time; time.sleep(600)")
    say = lambda *_: print("up", flush=True)
    with Healthy([], Path(sys.argv[1]), command=sleep, on_wait=say) as server:
        say()
        server.require_running(None)

sys.exit(run_command(main))
"""


FAKE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *said):
        pass

print("this is the log's end", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
"""A server that is healthy, and nothing else."""


def test_a_server_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    server = Server([], tmp_path / "log", command=(sys.executable, "-c", FAKE))
    asked = threading.Thread(target=server.__enter__)
    asked.start()
    asked.join()
    with contextlib.ExitStack() as stack:
        stack.push(server)
        with pytest.raises(subprocess.TimeoutExpired):
            server._process.wait(1)
        assert server.is_healthy()


@pytest.mark.parametrize("when", ["starting", "waiting"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGKILL"],
)
def test_what_ends_the_command_ends_the_server_too(
    number: signal.Signals, status: int, when: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log"), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        children = psutil.Process(parent.pid).children()
        parent.send_signal(number)
        assert parent.wait(9) == status
    assert len(children) == 1
    assert not psutil.wait_procs(children, timeout=10)[1]


def fake(log: Path, script: str = FAKE) -> Server:
    return Server([], log, command=(sys.executable, "-c", script))


def kill(server: Server) -> None:
    """End the server as the system does where memory is short."""
    os.kill(server._process.pid, signal.SIGKILL)


def test_servers_start_side_by_side_and_end_together(tmp_path: Path) -> None:
    servers = [fake(tmp_path / name) for name in "ab"]
    with started(servers):
        assert all(server.is_healthy() for server in servers)
        processes = [psutil.Process(server._process.pid) for server in servers]
    assert not psutil.wait_procs(processes, timeout=10)[1]
    ended = fake(tmp_path / "c", "print('RuntimeError: no'); raise SystemExit(3)")
    other = fake(tmp_path / "d")
    with pytest.raises(ServerError, match="status 3"), started([other, ended]):
        raise AssertionError("one did not start")
    assert not psutil.pid_exists(other._process.pid) or other._process.poll() is not None


def test_a_server_that_ends_ends_the_block_with_its_log(tmp_path: Path) -> None:
    """Whether what failed was a request, nothing yet, or the wait for the end itself."""

    def ask(server: Server) -> None:
        httpx.get(server.url, trust_env=False)

    for use in (ask, lambda server: server._process.wait(), lambda s: s.require_running(None)):
        with (
            pytest.raises(ServerError, match=r"\(status -9\): this is the log's end"),
            fake(tmp_path / "log") as server,
        ):
            kill(server)
            use(server)


def test_errors_of_the_block_are_not_the_server_s(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fake(tmp_path / "log"):
        _ = 1 / 0
    with fake(tmp_path / "log") as server:
        server.require_running()
        with contextlib.suppress(KeyboardInterrupt):
            raise KeyboardInterrupt
    assert server._process.poll() is not None


@pytest.mark.parametrize("name", ["kascade_sglang.demo.serve", "kascade_sglang.demo"])
def test_commands_end_with_their_server(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command waits for, or fails over, a server that is gone."""
    module = importlib.import_module(name if name.endswith("serve") else f"{name}.__main__")

    class Dying(Server):
        def __init__(self, arguments: list[str], log: Path, *rest: object, **named: object) -> None:
            super().__init__([], tmp_path / "log", command=(sys.executable, "-c", FAKE))

        def __enter__(self) -> Server:
            server = super().__enter__()
            threading.Timer(0.5, kill, [self]).start()
            return server

        def key_counters(self) -> dict:
            return {}

    monkeypatch.setattr(module, "Server", Dying)
    # One that is free, whoever serves here.
    port = ["--port", str(free_port())] if name.endswith("serve") else []
    monkeypatch.setattr(sys, "argv", ["command", *port])
    assert run_command(module.main) == 1
    said = capsys.readouterr().err
    assert "kascade: the server ended (status -9): this is the log's end" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("port", ["-5", "0", "65536", "taken"])
def test_a_port_that_no_server_can_have(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make serve` beside another server would show that one's answers as its own."""
    module = importlib.import_module("kascade_sglang.demo.serve")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = str(other.getsockname()[1]) if port == "taken" else port
        monkeypatch.setattr(sys, "argv", ["serve", "--port", number])
        assert run_command(module.main) == 1
    said = capsys.readouterr()
    assert said.err.startswith("kascade: --port: expected ") and f"got {number}" in said.err
    assert said.out == ""


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_loopback_uses_no_proxy(
    variable: str, proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what waits for the server, nor clients, nor libraries in this process and others."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # restored, whatever the server makes of it
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, proxy)
    script = FAKE.replace(
        "print(", "import os; print(os.environ['no_proxy'], os.environ['NO_PROXY'], "
    )
    with fake(tmp_path / "log", script) as server:
        assert httpx.get(server.url, trust_env=uses_proxies(server.url)).status_code == 200
        assert urllib.request.urlopen(server.url).status == 200
        assert server.key_counters() == {}
        client_of(server.url)
        hosts = "localhost,127.0.0.1,::1"
        assert f"{hosts} {hosts} this is" in server.tail()


def test_hosts_that_need_no_proxy_stay_named() -> None:
    named = without_proxy({"no_proxy": "a.b, localhost", "NO_PROXY": "10.0.0.1"})
    assert set(named) == {"no_proxy", "NO_PROXY"}
    assert set(named.values()) == {"a.b,localhost,10.0.0.1,127.0.0.1,::1"}
    assert set(without_proxy({"no_proxy": "*"}).values()) == {"*"}


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("http://127.0.0.1:30000", False),
        ("http://127.1.2.3/v1", False),
        ("http://localhost:1", False),
        ("http://LOCALHOST:1", False),
        ("http://[::1]:30000", False),
        ("http://10.0.0.1", True),
        ("https://example.org", True),
        ("http://localhost.example.org", True),
        ("http://[broken", True),
    ],
)
def test_only_loopback_is_kept_off_proxies(url: str, proxied: bool) -> None:
    assert uses_proxies(url) is proxied
