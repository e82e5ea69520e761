"""Offline calibration: which layers select keys for which, measured once per model.

``prompts`` -> ``collect`` (one dense forward pass a prompt) -> ``similarity`` -> ``anchors`` ->
a plan; ``run`` is that path. ``hf_attention`` also serves as the end-to-end oracle: Kascade
generation of a Hugging Face model in plain torch.
"""
