"""Parts of a data set: images held out for validation, and evenly spaced samples."""

import random
from collections.abc import Sequence

import numpy as np

from lora_engine.data.rows import Row


def hold_out(rows: Sequence[Row], *, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (training, validation) by image, so that no image is on both sides.

    About `fraction` of the images, at least one, are held out: drawn with `seed` from their sorted
    names. Rows keep their order. Raises ValueError for a fraction outside (0, 1) and for fewer than
    two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--val_fraction is {fraction}, expected a number between 0 and 1")
    images = sorted({row.image for row in rows})
    if len(images) < 2:
        raise ValueError(
            f"cannot hold out validation images: the rows name {len(images)} image(s), expected "
            "at least 2; add images, or pass a validation file with --val_data_path"
        )
    count = min(max(round(fraction * len(images)), 1), len(images) - 1)
    held_out = set(random.Random(seed).sample(images, count))
    train = [row for row in rows if row.image not in held_out]
    validation = [row for row in rows if row.image in held_out]
    return train, validation


def evenly_spaced(num_items: int, count: int) -> list[int]:
    """Indices of at most `count` of `num_items` items, the first and the last among them."""
    return np.linspace(0, num_items - 1, min(count, num_items)).astype(int).tolist()
