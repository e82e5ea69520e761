"""Say in ``/server_info`` what Kascade serves with.

Why: a plugin cannot add to what the endpoint tells, and a start's log may be gone.
How: after a scheduler has told its state, add an entry ``kascade``. Registered when a backend is
    built; nothing depends on it.
Remove when: backends can add to the state of their scheduler.
"""

from typing import Any

TARGET = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
KIND = "AFTER"


def hook(output: Any, scheduler: Any, request: Any) -> None:
    """Add plan, budgets and choices, where this scheduler's model runs on Kascade."""
    from kascade_sglang.backend.published import published

    if settings := published():
        output.internal_state["kascade"] = settings
