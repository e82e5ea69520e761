"""The demo's server process, without SGLang: it must never outlive the command that started it."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

SCRIPT = """
import sys
from pathlib import Path
from kascade_sglang.servers.process import Server, stop_servers_on_sigterm

stop_servers_on_sigterm()
sleep = (sys.executable, "-c", "import time; time.sleep(600)")
server = Server([], Path(sys.argv[1]), command=sleep, on_wait=lambda _: print("up", flush=True))
with server:
    pass
"""


def test_sigterm_ends_the_server_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"up\n"
        children = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 128 + signal.SIGTERM
    assert len(children) == 1
    assert not psutil.wait_procs(children, timeout=10)[1]
