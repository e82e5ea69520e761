"""Tasks by name, and names for groups of them."""

from pathlib import Path

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.aime import aime_task
from kascade_sglang.evaluation.longbench import longbench_tasks
from kascade_sglang.evaluation.perplexity import perplexity_task
from kascade_sglang.evaluation.planted_facts import facts_tasks
from kascade_sglang.evaluation.ruler import ruler_tasks
from kascade_sglang.evaluation.ruler_qa import qa_task
from kascade_sglang.evaluation.samples import Task

NEEDS_FILES = {"longbench": "--longbench FOLDER", "aime": "--aime FILE"}


def groups(
    squad: Path | None, aime: Path | None, longbench: Path | None, text: Path | None
) -> dict[str, list[Task]]:
    """{name: tasks} of every task and every group, given the files that there are.

    Raises EvaluationError where the folder cannot be used; files are read when samples are made.
    """
    ruler = [*ruler_tasks(), qa_task(squad)]
    found = {
        "ruler": ruler,
        "niah_single": [task for task in ruler if task.name.startswith("niah_single")],
        "niah_multikey": [task for task in ruler if task.name.startswith("niah_multikey")],
        "facts": facts_tasks(),
    }
    single = [*ruler, *found["facts"], perplexity_task(text)]
    if longbench:
        found["longbench"] = longbench_tasks(longbench)
        single += found["longbench"]
    if aime:
        single.append(aime_task(aime))
    return {**found, **{task.name: [task] for task in single}}


def pick(names: list[str], known: dict[str, list[Task]]) -> list[Task]:
    """The tasks that names stand for, each once. Raises EvaluationError for none or unknown."""
    if not names:
        raise EvaluationError(f"--tasks: expected some of {', '.join(known)}, got no name")
    picked: dict[str, Task] = {}
    for name in names:
        if name not in known:
            flag = NEEDS_FILES.get(name.split("_")[0])
            if flag:
                raise EvaluationError(f"--tasks {name}: needs its data; give {flag}")
            raise EvaluationError(f"--tasks {name}: unknown; expected some of {', '.join(known)}")
        picked.update((task.name, task) for task in known[name])
    return list(picked.values())
