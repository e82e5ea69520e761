"""Tell the backend what the requests of a step asked for.

Why: a forward batch has no place for it, and SGLang rebuilds forward batches for its graphs.
How: after a batch has become a forward batch, which happens once a step and just before it runs,
    note on the model runner what its requests asked for.
Remove when: backends are told of a step's requests.
"""

from typing import Any

from kascade_patches.req_init import ATTRIBUTE

TARGET = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
KIND = "AFTER"


def hook(result: Any, cls: type, batch: Any, model_runner: Any, **named: object) -> None:
    """Note them, in the batch's order; an empty tuple where none asked."""
    from kascade_sglang.host.steps import set_asks

    asks = tuple(getattr(request, ATTRIBUTE, None) for request in batch.reqs)
    set_asks(model_runner, asks if any(asks) else ())
