"""Evaluation of any server (``kascade eval``), and of methods on the demo model (``make eval``)."""
