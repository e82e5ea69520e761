"""``python -m kascade_sglang.servers.child PARENT COMMAND ...``: run a command that ends with us.

Whoever is killed cannot end its servers, which would keep port and GPU. So the system is asked to
end the command when the process PARENT does, whatever ends that. Linux only, as SGLang is.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command."""
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # It has ended before it was watched.
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
