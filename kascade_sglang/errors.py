"""The exceptions for input that Kascade refuses: what the user can mend."""


class KascadeError(ValueError):
    """Refused input; the message is one sentence: name, expected, got, how to fix."""


class CalibrationError(KascadeError):
    """A model, prompt file or option that cannot be calibrated with; the message says why."""


class EvaluationError(KascadeError):
    """A task, file, option or server that cannot be evaluated with; the message says why."""
