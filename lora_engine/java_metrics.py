"""METEOR and SPICE, by the Java programs of the COCO caption evaluation (salaniz/pycocoevalcap).

The optional package `pycocoevalcap` brings them and the PTBTokenizer that cuts their tokens; SPICE
fetches Stanford's models when it is first used.
"""

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

INSTALL = "pip install 'lora_engine[coco]'"


def check_java() -> None:
    """Raises ValueError, saying what to install, where METEOR and SPICE cannot run."""
    if find_spec("pycocoevalcap") is None:
        raise ValueError(f"METEOR and SPICE need the package pycocoevalcap: {INSTALL}")
    if shutil.which("java") is None:
        raise ValueError(
            "METEOR and SPICE are Java programs, and there is no `java` here: install a Java "
            "runtime (Debian and Ubuntu: default-jre-headless), or leave them out"
        )


def java_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """METEOR and SPICE, both between 0 and 1, of `captions[i]` against the texts `references[i]`.

    Raises ValueError as `check_java` does, and where one of the programs fails.
    """
    check_java()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def cut(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({
            image: [{"caption": text} for text in of_image] for image, of_image in enumerate(texts)
        })

    scores: dict[str, float] = {}
    for name, program in (("meteor", Meteor), ("spice", Spice)):
        try:
            score, _ = program().compute_score(
                cut(references), cut([[caption] for caption in captions])
            )
        except Exception as error:  # a program that ended, its output cut short, no network
            raise ValueError(
                f"{name.upper()} failed: {' '.join(str(error).split()) or type(error).__name__}"
            ) from error
        scores[name] = float(score)
    return scores
