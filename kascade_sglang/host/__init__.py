"""All that knows SGLang: what it has becomes small typed facts of ours."""
