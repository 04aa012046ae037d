"""Names of splits: train, val and test, in split columns and in the names of shards."""

import os
import re

SPLITS = {
    "train": "train", "training": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}
SEPARATORS = re.compile(r"[-_./\s]+")


def normal_split(name: str) -> str:
    """train, val or test for the names in use (Karpathy's "restval" is train); others unchanged."""
    return SPLITS.get(name.strip().lower(), name)


def split_of(part_path: str, root: str) -> str:
    """The split that the name of a shard, else of its nearest folder below `root`, contains.

    Only whole words between - _ . / count: cc3m-train-0001.tar, validation/00000.tar. "" if there
    are none, or several (train_val).
    """
    for name in reversed(os.path.relpath(part_path, root).split(os.sep)):
        splits = {SPLITS[word] for word in SEPARATORS.split(name.lower()) if word in SPLITS}
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""
