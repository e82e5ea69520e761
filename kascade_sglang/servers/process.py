"""Start a real SGLang server as a child process, and end it whatever happens."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from kascade_sglang.errors import KascadeError, sentence
from kascade_sglang.servers.counters import KeyCounters, read_key_counters
from kascade_sglang.servers.loopback import without_proxy

START_TIMEOUT = 600
DYING = 20
"""Seconds that a server which answers no more may take to end, once one of its processes has."""
PORTS = range(20_000, 32_000)
CAUSE = re.compile(r"^(kascade: |[\w.]*(Error|Exception): )|crashed with exit code")
"""What SGLang ends for is an exception's last line, after it lines of its own ending."""

_starter = ThreadPoolExecutor(1)
"""Starts all servers: a child ends with the thread that started it, and this one lives as we do."""
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


def require_free(port: int) -> None:
    """Raise ServerError where no server can listen: another's answers would pass for its own."""
    if not 0 < port < 2**16:
        raise ServerError(f"--port: expected 1 to {2**16 - 1}, got {port}; name another")
    with socket.socket() as probe:
        # As servers do: what a closed connection leaves behind for a minute is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(
                f"--port: expected a free one, got {port} ({error.strerror}); name another, as "
                "in `make serve PORT=30001`"
            ) from error


def stop_servers_on_sigterm() -> None:
    """Let SIGTERM end this process and its servers, which would outlive it and keep the GPU."""

    def stop(*_: object) -> None:
        for server in list(_running):
            server.stop()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command that starts servers and return its exit status.

    Its servers end with it, by SIGTERM, too. A server that ends by itself, and whatever else the
    user can mend, is one message and status 1.
    """
    stop_servers_on_sigterm()
    try:
        return main() or 0
    except ServerError as error:
        print(f"kascade: {error}", file=sys.stderr)
        return 1
    except KascadeError as error:
        print(f"kascade: {sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class Server:
    """``with Server(arguments, log) as server``: a running server at ``server.url``.

    arguments: of the command, without host and port.
    log: file that takes the server's output.
    environment: variables set for the server only.
    command: what starts the server.

    Raises ServerError where the server does not start, and at the block's end where it has ended
    by itself, whatever that made of the block. Loopback is kept off proxies, in this process and
    in the server's.
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
        os.environ.update(without_proxy(os.environ))
        # Worker threads spin at barriers: one core must stay free for the server's own processes.
        threads = str(max(1, (os.cpu_count() or 1) - 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **self._environment}
        # SGLang's own processes end with the first of them, which ends with this one.
        watched = [sys.executable, "-m", "kascade_sglang.servers.child", str(os.getpid())]
        with open(self.log, "wb") as log:
            self._process = _starter.submit(
                subprocess.Popen,
                [*watched, *self._command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ).result()
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
        try:
            if error is None or isinstance(error, Exception):
                # What fails first is a request; the server says why when it has ended.
                self.require_running(DYING if error and not self.is_healthy() else 0)
        finally:
            self.stop()

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        while not self.is_healthy():
            waited = time.monotonic() - started
            self.require_running()
            if waited > START_TIMEOUT:
                raise ServerError(f"the server did not start in {START_TIMEOUT} s: {self.tail()}")
            self._on_wait(waited)
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        """Whether the server accepts requests."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    def require_running(self, seconds: float | None = 0) -> None:
        """Raise ServerError, with the end of the log, if the server has ended by itself.

        seconds: how long to wait for that; None waits until it does.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
            raise ServerError(f"the server ended (status {status}): {self.cause()}")

    def cause(self) -> str:
        """Return the line of the log that says what ended the server, or else the last ones."""
        lines = self.log.read_text(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if CAUSE.search(line)), None)
        return self.tail() if said is None else f"{said.strip()}; its log: {self.log}"

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
        # Never a wait: a signal's handler may be here while what it interrupted waits, too.
        self._process.poll()
        _running.discard(self)


@contextlib.contextmanager
def started(servers: Collection[Server]) -> Iterator[None]:
    """Start servers side by side: each takes a minute. All end, also where one does not start."""
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(stack.enter_context, servers))
        yield
