"""Shapes that several launches share."""

import triton


def padded_group(group: int) -> int:
    """Rows of the product's left operand: tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(group))
