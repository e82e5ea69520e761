"""Evaluation of methods on the demo model (``make eval``) and of any server (``kascade eval``)."""
