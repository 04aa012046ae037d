"""METEOR and SPICE, by the Java programs of the COCO caption evaluation (salaniz/pycocoevalcap).

The optional package `pycocoevalcap` contains them and their PTBTokenizer; SPICE downloads
Stanford's models when it is first used.
"""

import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from lora_engine.terminal import one_line

JAVA_SCORES = ("meteor", "spice")
INSTALL = "pip install 'lora_engine[coco]'"


def check_java() -> None:
    """Raises ValueError, with what to install, if METEOR and SPICE cannot run."""
    if find_spec("pycocoevalcap") is None:
        raise ValueError(f"METEOR and SPICE need the package pycocoevalcap: {INSTALL}")
    if shutil.which("java") is None:
        raise ValueError(
            "METEOR and SPICE are Java programs, and no `java` was found: install a Java runtime "
            "(Debian and Ubuntu: default-jre-headless), or do without them"
        )


def java_score(
    name: str, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """METEOR or SPICE, between 0 and 1, of `captions[i]` against the texts `references[i]`.

    `name` is one of JAVA_SCORES. Raises ValueError as `check_java` does, and if the program fails.
    """
    check_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenized(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({
            image: [{"caption": text} for text in of_image] for image, of_image in enumerate(texts)
        })

    try:
        program = getattr(import_module(f"pycocoevalcap.{name}.{name}"), name.capitalize())()
        of_captions = tokenized([[caption] for caption in captions])
        score, _ = program.compute_score(tokenized(references), of_captions)
    except Exception as error:  # the program failed, truncated output, no network
        raise ValueError(f"{name.upper()} failed: {one_line(error)}") from error
    return float(score)
