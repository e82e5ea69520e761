"""Refuse a storage tier that is attached to HiCache while a server runs.

Why: other servers may share it, and their keys and values may be of another attention. The flag is
    refused before a start; an administrator's request comes later.
How: in place of what attaches it. Hooked when a backend is built, where HiCache is on.
Remove when: SGLang names stored KV by the attention that made it, too.
"""

from typing import Any

TARGET = "sglang.srt.managers.scheduler.Scheduler.attach_hicache_storage_wrapped"
KIND = "AROUND"


def hook(original: Any, scheduler: Any, request: Any) -> Any:
    """Return SGLang's answer to such a request, with why it is refused."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    return AttachHiCacheStorageReqOutput(
        success=False,
        message=(
            "--hicache-storage-backend: expected none with the kascade backend, got "
            f"{request.hicache_storage_backend!r}; keep to host memory, or serve with another "
            "--attention-backend"
        ),
    )
