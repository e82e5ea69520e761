"""The attention backend: a dense backend, and Kascade around it."""
