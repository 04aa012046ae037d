"""Hugging Face's imagefolder: images, and a metadata.jsonl or metadata.csv with their captions.

https://huggingface.co/docs/datasets/image_dataset
"""

import os
from collections.abc import Iterator

from lora_engine.data.formats import json_lines, table
from lora_engine.data.rows import AnnotationError, Item, Problem, SourceOptions

READERS = {"metadata.jsonl": json_lines.read, "metadata.csv": table.read}


def read(path: str, options: SourceOptions) -> Iterator[Item | Problem]:
    """The items of the folder's metadata file, with its name and line as `where`.

    metadata.jsonl is preferred where both are there. Raises AnnotationError.
    """
    for name, reader in READERS.items():
        if os.path.isfile(os.path.join(path, name)):
            for item in reader(os.path.join(path, name), options):
                yield item._replace(where=f"{name}:{item.where}")
            return
    raise AnnotationError(f"{path}: has neither {' nor '.join(READERS)}")
