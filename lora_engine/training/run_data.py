"""The data of a run: rows of the annotation files, checked, tokenized and split in two."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.config import TrainingConfig
from lora_engine.data.annotations import locations_of, usable_rows
from lora_engine.data.batches import CaptionedImages
from lora_engine.data.rows import MAX_ROWS_SHOWN, BadRow, Row
from lora_engine.data.subsets import evenly_spaced, hold_out
from lora_engine.models.pretrained import Captioner
from lora_engine.training.skipped_rows import MIN_SAMPLE, allowed_failures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The usable rows of a run's annotation files, and those that are skipped."""

    train: list[Row]
    val: list[Row]
    bad: list[BadRow]

    @property
    def images(self) -> list[str]:
        """Paths of the training images, then of the validation images, in order of appearance."""
        return [
            path for rows in (self.train, self.val)
            for path in dict.fromkeys(row.image for row in rows)
        ]

    @cached_property  # they are part of every checkpoint
    def fingerprints(self) -> dict[str, str]:
        return {
            "training_data": _fingerprint(self.train),
            "validation_data": _fingerprint(self.val),
        }


@dataclass(frozen=True)
class RunData:
    """The data of a run; `images` of its sets know what the run has seen of each image file."""

    rows: Rows
    train_set: CaptionedImages
    val_set: CaptionedImages

    @property
    def digests(self) -> np.ndarray:
        """Digests of the training and validation images, V16 (N,), in the order of `Rows.images`.
        """
        return np.concatenate([self.train_set.images.digests, self.val_set.images.digests])


def read_rows(config: TrainingConfig) -> Rows:
    """Read and check the annotation files; raises ValueError if they cannot be used."""
    if config.train_data_path is None:
        raise ValueError("--train_data_path is missing: a JSON list of {\"text\", \"image\"} rows")
    rows, bad_rows = usable_rows(config.train_data_path, max_bad_share=config.max_bad_share)
    if config.val_data_path is not None:
        train_rows = rows
        val_rows, more = usable_rows(config.val_data_path, max_bad_share=config.max_bad_share)
        bad_rows += more
    else:
        train_rows, val_rows = hold_out(rows, fraction=config.val_fraction, seed=config.seed)
    for path, part in ((config.train_data_path, train_rows), (config.val_data_path, val_rows)):
        _check_images_exist(path or config.train_data_path, part, config.max_bad_share)
    _warn_of_overlap(train_rows, val_rows)
    if config.eval_captions:
        _warn_of_captions_without_words(config, val_rows)
    return Rows(train_rows, val_rows, bad_rows)


def build_data(
    rows: Rows, captioner: Captioner, config: TrainingConfig, *, digests: np.ndarray
) -> RunData:
    """Tokenize the rows; `digests` V16 (N,) are what is known of `Rows.images`."""
    num_train_images = len({row.image for row in rows.train})
    return RunData(
        rows,
        captioned_images(
            rows.train, captioner, config, substitute=True, digests=digests[:num_train_images]
        ),
        captioned_images(
            rows.val, captioner, config, substitute=False, digests=digests[num_train_images:]
        ),
    )


def captioned_images(
    rows: Sequence[Row],
    captioner: Captioner,
    config: TrainingConfig,
    *,
    substitute: bool,
    digests: np.ndarray | None = None,
) -> CaptionedImages:
    """Tokenize the rows; `substitute` and `digests` are those of `CaptionedImages`."""
    captions = captioner.tokenizer.encode(
        (row.text for row in rows),
        prompt=captioner.prompt,
        max_caption_tokens=config.max_caption_tokens,
    )
    return CaptionedImages(
        [row.image for row in rows],
        captions,
        captioner.pixels,
        seed=config.seed,
        substitute=substitute,
        digests=digests,
    )


def _fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over captions and image names, but not over the images' folders."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.text}\0{os.path.basename(row.image)}\n".encode())
    return digest.hexdigest()


def _warn_of_overlap(train_rows: Sequence[Row], val_rows: Sequence[Row]) -> None:
    images = {row.image for row in val_rows}
    shared = images & {row.image for row in train_rows}
    if shared:
        logger.warning(
            f"{len(shared):,} of {len(images):,} validation images are also training images, "
            f"such as {min(shared)}: the validation loss is too optimistic"
        )


def _warn_of_captions_without_words(config: TrainingConfig, val_rows: Sequence[Row]) -> None:
    """Name the captions that no score can be computed against, by file and line.

    Raises ValueError if no other captions remain and a score selects the best adapter.
    """
    wordless = {row for row in val_rows if not has_words(row.text)}
    if not wordless:
        return
    path = config.val_data_path or config.train_data_path
    assert path is not None
    if config.best_by != "loss" and len(wordless) == len(set(val_rows)):
        raise ValueError(
            f"--best_by {config.best_by} needs captions with words to compare, but no validation "
            f"caption of {path} has any"
        )
    locations = locations_of(path, wordless)
    rest = len(locations) - MAX_ROWS_SHOWN
    more = f" and {rest:,} more (lora_engine validate --json FILE lists them)" if rest > 0 else ""
    logger.warning(
        f"{len(locations):,} validation captions have no words to compare and are not scored: "
        f"{', '.join(locations[:MAX_ROWS_SHOWN])}{more}"
    )


def _check_images_exist(path: str, rows: Sequence[Row], max_share: float) -> None:
    """Check up to MIN_SAMPLE of the rows at once, in case the paths do not lead to the images."""
    checked = [rows[i] for i in evenly_spaced(len(rows), MIN_SAMPLE)]
    missing = [row.image for row in checked if not os.path.isfile(row.image)]
    is_sample = len(rows) > MIN_SAMPLE
    if len(missing) > allowed_failures(len(checked), max_share, is_sample=is_sample):
        raise ValueError(
            f"{path}: {len(missing)} of {len(checked)} rows checked name an image that does not "
            f"exist, more than --max_bad_share {max_share:g}; the first is {missing[0]} (image "
            f"paths are absolute or relative to the annotation file)"
        )
