"""Retrieval accuracy of every selection method at equal budgets, through a real server."""
