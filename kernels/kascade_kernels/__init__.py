"""Selection and sparse attention for Kascade (arXiv 2512.16391), independent of any engine.

``budget``     how many keys a query tile may attend to (pure Python).
``reference``  every operation in plain torch; it defines what is correct.
``tuning``     how every kernel is launched.
"""
