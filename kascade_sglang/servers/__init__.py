"""Servers from outside: starting, asking, reading the counters of and ending one."""
