"""Parts of a data set: its splits, and images held out for validation."""

import hashlib
import logging
import os
import random
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np

from lora_engine.data.pairs import Pairs
from lora_engine.data.sources.split_names import normal_split
from lora_engine.terminal import counted

logger = logging.getLogger(__name__)

MAX_HELD_OUT = 5_000  # images, unless more are asked for
DEFAULT_FRACTION = 0.05


def splits_of(pairs: Pairs) -> dict[str, int]:
    """How many rows each split has, by its name; "" for rows without one."""
    counts = np.bincount(pairs.split_numbers, minlength=len(pairs.source.splits))
    return {
        name: int(count) for name, count in zip(pairs.source.splits, counts) if count
    }


def of_splits(pairs: Pairs, names: Collection[str]) -> Pairs:
    """The rows of some splits."""
    if set(splits_of(pairs)) <= set(names):
        return pairs
    numbers = [i for i, name in enumerate(pairs.source.splits) if name in names]
    return pairs.choose(
        ["split", sorted(names)],
        lambda: np.flatnonzero(np.isin(pairs.split_numbers, numbers)),
    )


def named_split(pairs: Pairs, asked: str) -> Pairs:
    """The rows of the split that --split names; raises ValueError that lists the splits."""
    splits = splits_of(pairs)
    if normal_split(asked) not in splits:
        known = ", ".join(f"{name or 'none'} ({count:,} rows)" for name, count in splits.items())
        raise ValueError(f"--split {asked}: no row has this split; the splits are {known}")
    return of_splits(pairs, [normal_split(asked)])


def evaluation_split(pairs: Pairs, names: Sequence[str]) -> Pairs:
    """The rows of the first of these splits that there is; all rows if there is none of them."""
    splits = splits_of(pairs)
    name = next((name for name in names if name in splits), None)
    if name is None or len(splits) == 1:
        return pairs
    logger.info(
        f"split {name}: {splits[name]:,} of {len(pairs):,} captions (--split chooses another)"
    )
    return of_splits(pairs, [name])


def hold_out(
    pairs: Pairs, *, fraction: float | None, size: int | None, seed: int
) -> tuple[Pairs, Pairs]:
    """Split rows into (training, validation) by image, so that no image is on both sides.

    `size` images are held out, or `fraction` of them, by default the smaller of 5 % and 5,000; at
    least one. They are those whose names have the smallest hashes with `seed`, so that the same
    images are held out whatever folder or shard they are in. Rows keep their order. Raises
    ValueError for fewer than two images.
    """
    count = _number_to_hold_out(len(pairs.images), fraction, size)

    @cache  # for both sides
    def is_held_out() -> np.ndarray:
        hashes = np.array([
            int.from_bytes(hashlib.blake2b(
                f"{seed}\0{os.path.basename(name)}".encode("utf-8", "surrogatepass"), digest_size=8
            ).digest())
            for name in pairs.images
        ], dtype=np.uint64)
        is_chosen = np.zeros(len(hashes), dtype=bool)
        is_chosen[np.argsort(hashes, kind="stable")[:count]] = True
        return is_chosen[pairs.image_of_row]

    key = ["hold out", count, seed]
    return (
        pairs.choose([*key, "training"], lambda: np.flatnonzero(~is_held_out())),
        pairs.choose([*key, "validation"], lambda: np.flatnonzero(is_held_out())),
    )


def hold_out_sampled(pairs: Pairs, *, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Hold out the images that earlier versions would, to resume runs that they began."""
    count = _number_to_hold_out(len(pairs.images), fraction, None)
    names = sorted(pairs.images)
    held_out = set(random.Random(seed).sample(names, count))
    is_held_out = np.array([name in held_out for name in pairs.images])[pairs.image_of_row]
    key = ["sampled", fraction, seed]
    return (
        pairs.choose([*key, "training"], lambda: np.flatnonzero(~is_held_out)),
        pairs.choose([*key, "validation"], lambda: np.flatnonzero(is_held_out)),
    )


def _number_to_hold_out(num_images: int, fraction: float | None, size: int | None) -> int:
    if num_images < 2:
        raise ValueError(
            f"cannot hold out validation images: the rows name {counted(num_images, 'image')}, "
            f"expected at least 2; add images, or pass validation data with --val_data_path"
        )
    if size is not None and size >= num_images:
        raise ValueError(
            f"--val_size is {size}, but there are {num_images} images: hold out fewer, or pass "
            f"validation data with --val_data_path"
        )
    if size is None:
        size = round((DEFAULT_FRACTION if fraction is None else fraction) * num_images)
        if fraction is None:
            size = min(size, MAX_HELD_OUT)
    return min(max(size, 1), num_images - 1)
