"""Evenly spaced samples."""

import numpy as np


def evenly_spaced(num_items: int, count: int) -> list[int]:
    """Indices of at most `count` of `num_items` items, the first and the last among them."""
    return np.linspace(0, num_items - 1, min(count, num_items)).astype(int).tolist()
