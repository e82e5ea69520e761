"""``kascade eval --report``: a page of what each layer reads of one prompt, computed offline."""

from collections.abc import Sequence
from pathlib import Path

from kascade_sglang.calibration.hf_model import (
    load_model,
    load_tokenizer,
    pick_device,
    read_config,
    shape_of,
)
from kascade_sglang.calibration.prompts import to_prompt
from kascade_sglang.calibration.selection import watch
from kascade_sglang.calibration.selection_page import write_page
from kascade_sglang.config import load_config
from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.perplexity import NAME as PERPLEXITY
from kascade_sglang.evaluation.samples import Order, Task


def pick_task(tasks: Sequence[Task]) -> Task:
    """The first task with a question; raises EvaluationError where there is none."""
    for task in tasks:
        if task.metric != PERPLEXITY:
            return task
    raise EvaluationError(
        "--report: expected a task that asks something, got perplexity alone; add one such as "
        "niah_single_1"
    )


def draw_first_sample(
    model: str, task: Task, order: Order, path: Path, trust_remote_code: bool = False
) -> None:
    """Answer a task's first sample with transformers on the CPU, and write the page.

    model: folder or Hugging Face id of the weights; the plan and the settings are those that a
    server started here, without flags, would find. Raises KascadeError.
    """
    (sample, *_) = task.make(order)
    shape = shape_of(read_config(model, trust_remote_code))
    config = load_config(model, shape)
    tokenizer = load_tokenizer(model, trust_remote_code)
    record = {"messages": [{"role": "user", "content": sample.prompt}]}
    if sample.raw or not getattr(tokenizer, "chat_template", None):
        record = {"text": sample.prompt}
    ids = to_prompt(record, task.name, tokenizer, None, None).ids
    ids += tokenizer.encode(sample.prefix, add_special_tokens=False)
    # The server may hold all of the GPU's memory.
    loaded = load_model(model, "auto", pick_device("cpu"), trust_remote_code=trust_remote_code)
    found = watch(loaded, config, ids)
    write_page(found, tokenizer.decode, path, sample.answers[0] if sample.answers else None)
