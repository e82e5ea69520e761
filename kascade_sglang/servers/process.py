"""Start a real SGLang server as a child process, and end it whatever happens."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from kascade_sglang.servers.counters import KeyCounters, read_key_counters

START_TIMEOUT = 600
PORTS = range(20_000, 32_000)

_running: set["Server"] = set()


class ServerError(RuntimeError):
    """The server ended, or did not start in time; the message quotes its log."""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on.

    Below those that a system hands out: a server takes a minute to bind its port, and meanwhile
    any connection could be given one of them.
    """
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def stop_servers_on_sigterm() -> None:
    """Let SIGTERM end this process and its servers, which would outlive it and keep the GPU."""

    def stop(*_: object) -> None:
        for server in list(_running):
            server.stop()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)


class Server:
    """``with Server(arguments, log) as server``: a running server at ``server.url``.

    arguments: of the command, without host and port.
    log: file that takes the server's output.
    environment: variables set for the server only.
    command: what starts the server.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        port: int | None = None,
        environment: dict[str, str] | None = None,
        on_wait: Callable[[float], None] = lambda seconds: None,
        command: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
    ) -> None:
        self.log = log
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = environment or {}
        self._on_wait = on_wait
        ports = ["--port", str(self.port)]
        # Replicas would all take the one port.
        ports += [] if "--dp-size" in arguments else ["--nccl-port", str(free_port())]
        self._command = [*command, *ports, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        # Worker threads spin at barriers: one core must stay free for the server's own processes.
        threads = str(max(1, (os.cpu_count() or 1) - 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **self._environment}
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        _running.add(self)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        while not self.is_healthy():
            waited = time.monotonic() - started
            if self._process.poll() is not None:
                raise ServerError(
                    f"the server ended (status {self._process.returncode}): {self.tail()}"
                )
            if waited > START_TIMEOUT:
                raise ServerError(f"the server did not start in {START_TIMEOUT} s: {self.tail()}")
            self._on_wait(waited)
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        """Whether the server accepts requests."""
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def tail(self, lines: int = 5) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def key_counters(self) -> KeyCounters:
        """Return Kascade's counters as {(phase, kind): keys}; empty under another backend."""
        return read_key_counters(self.url)

    def stop(self) -> None:
        """End the server and every process it started."""
        if self._process is None:
            return
        family = [self._process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [child.pid for child in psutil.Process(family[0]).children(recursive=True)]
        members = []
        for pid in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                members.append(psutil.Process(pid))
                members[-1].kill()
        psutil.wait_procs(members, timeout=10)
        self._process.wait(10)
        _running.discard(self)
