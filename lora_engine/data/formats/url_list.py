"""Lists of web addresses, which must be downloaded first: Google's CC3M (caption, tab, URL)."""

from typing import NoReturn

from lora_engine.data.formats.text_heads import text_format
from lora_engine.data.rows import AnnotationError, SourceOptions


def recognizes(path: str, head: str) -> bool:
    return text_format(path, head) == "url_list"


def read(path: str, options: SourceOptions) -> NoReturn:
    """Raises AnnotationError, with the command that downloads the images."""
    raise AnnotationError(
        f"{path}: holds web addresses, not images; download them first: lora-engine download "
        f"{path} --out DIR (the ready-made set is pixparse/cc3m-wds on the Hub)"
    )
