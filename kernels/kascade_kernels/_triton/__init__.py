"""Bodies of the Triton kernels; each is launched by the wrapper that has its name."""
