"""The one error that evaluation raises for what the user can mend."""

from kascade_sglang.errors import KascadeError


class EvaluationError(KascadeError):
    """A task, file, option or server that cannot be evaluated with; the message says why."""
