"""Random cases against the float64 reference, and steps against themselves: ``make fuzz``.

A case is one request: its length, lists, budget, and logits that are flat, as usual, steep, huge,
infinite or NaN. A launch takes many cases of one kind and of one shape; shapes are few, so that
kernels are compiled once. A launch is a kind and a seed, and every failure prints the command that
runs it alone, again. On a CPU kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), where
cases are small.

    prefill    scores of tiles, their selection, and attention to any lists
    decode     the same in decoding, with lists as a budget wants them or of any length
    ties       among equal codes the earlier positions are selected, whatever their number
    schedules  a request's selections and outputs have the same bits whatever its chunks, slots,
               company (of NaN, too) and memory for scores are
"""
