"""The one exception for input that Kascade refuses."""


class KascadeError(ValueError):
    """Refused input; the message is one sentence: name, expected, got, how to fix."""
