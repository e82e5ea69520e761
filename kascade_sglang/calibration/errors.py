"""The one error that calibration raises for what the user can mend."""

from kascade_sglang.errors import KascadeError


class CalibrationError(KascadeError):
    """A model, prompt file or option that cannot be calibrated with; the message says why."""
