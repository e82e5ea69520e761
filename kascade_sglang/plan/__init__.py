"""The plan: which layers select keys, and whose keys every other layer reuses."""
