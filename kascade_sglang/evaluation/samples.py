"""What a task is: a name, and a way to make samples of a wanted length."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kascade_sglang.errors import EvaluationError
from kascade_sglang.evaluation.tokens import Tokens


@dataclass(frozen=True)
class Sample:
    """One request, and how its reply is scored.

    prompt: the user's message, or the whole text where ``raw``.
    prefix: start of the reply that the benchmark prescribes.
    max_tokens: longest reply; None means what the context leaves.
    score: reply -> 0 to 1; for perplexity, unused.
    tokens: of prompt and prefix, without the chat template's.
    raw: sent as text to continue, without a chat template.
    ids: for perplexity: the token ids of the text, instead of a prompt.
    scored_tokens: how many of the last of them count.
    cut: whether the middle of the prompt was cut out to fit.
    """

    prompt: str
    answers: tuple[str, ...]
    tokens: int
    max_tokens: int | None
    score: Callable[[str], float] = field(compare=False)
    prefix: str = ""
    raw: bool = False
    ids: tuple[int, ...] = ()
    scored_tokens: int = 0
    cut: bool = False

    def digest(self) -> str:
        """Fingerprint of all that decides the reply and its score."""
        parts = [self.prompt, self.prefix, self.answers, self.max_tokens, self.raw]
        text = json.dumps([*parts, self.ids, self.scored_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Order:
    """How many samples are wanted, and how long.

    length: tokens of prompt and reply together, chat template included, as RULER counts; None
        for tasks whose data decide.
    limit: most tokens of prompt and reply together, chat template included; None if unknown.
    stopped: whether nobody waits for the samples any more.
    """

    length: int | None
    count: int
    seed: int
    tokens: Tokens
    limit: int | None = None
    stopped: Callable[[], bool] = lambda: False

    def numbers(self, count: int | None = None) -> Iterator[int]:
        """Yield 0, 1, ...; as many as are wanted, or ``count``. Raises EvaluationError once nobody
        waits: a thread that makes samples ends by nothing else."""
        for number in range(self.count if count is None else count):
            if self.stopped():
                raise EvaluationError("stopped")
            yield number


@dataclass(frozen=True)
class Task:
    """A named source of samples.

    by_length: whether samples are made to a length; otherwise they come as long as they are.
    metric: name of the score.
    data: where the samples come from.
    """

    name: str
    make: Callable[[Order], list[Sample]]
    by_length: bool
    metric: str
    data: str = "generated"
