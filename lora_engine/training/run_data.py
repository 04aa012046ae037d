"""The data of a run: pairs of its sources, checked, tokenized and split in two."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.config import TrainingConfig
from lora_engine.data.batches import CaptionedImages
from lora_engine.data.captions import TokenizedCaptions
from lora_engine.data.image_table import JoinedImages
from lora_engine.data.pairs import Pairs
from lora_engine.data.read_order import block_ends
from lora_engine.data.read_pairs import name_of, read_pairs
from lora_engine.data.rows import MAX_ROWS_SHOWN, PYTHON_ROWS, BadRow, SourceOptions
from lora_engine.data.sampling import evenly_spaced
from lora_engine.data.sources.split_names import normal_split
from lora_engine.data.subsets import (
    DEFAULT_FRACTION,
    evaluation_split,
    hold_out,
    hold_out_sampled,
    named_split,
    of_splits,
    splits_of,
)
from lora_engine.data.tokenization import tokenize
from lora_engine.features.store import cache_folder
from lora_engine.models.pretrained import Captioner
from lora_engine.terminal import counted
from lora_engine.training.skipped_rows import MIN_SAMPLE, allowed_failures

logger = logging.getLogger(__name__)

FEW_IMAGES = 20  # for validation
_UNKNOWN_SHARE = 0.01  # of tokens, from which a run warns


@dataclass(frozen=True)
class Rows:
    """The usable rows of a run, and those that are skipped."""

    train: Pairs
    val: Pairs
    bad: Sequence[BadRow]

    @property
    def images(self) -> JoinedImages:
        """The training images, then the validation images, in order of appearance."""
        return JoinedImages(self.train.images, self.val.images)

    @cached_property  # they are part of every checkpoint
    def fingerprints(self) -> dict[str, str]:
        return {
            "training_data": self.train.fingerprint(),
            "validation_data": self.val.fingerprint(),
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


def read_rows(
    config: TrainingConfig,
    *,
    data: Any = None,
    val_data: Any = None,
    is_of_earlier_version: bool = False,
) -> Rows:
    """Read and check the data of a run; raises ValueError if they cannot be used.

    `data` and `val_data`, given from Python, take the place of the paths in the settings. A run
    that an earlier version began holds out the images that that version chose.
    """
    if data is not None and config.train_data_path is not None:
        raise ValueError("train() got data and a train_data_path in its settings: give one of them")
    data = config.train_data_path if data is None else data
    val_data = config.val_data_path if val_data is None else val_data
    if data is None:
        raise ValueError("--train_data_path is missing: image-caption pairs (docs/data.md)")
    read = partial(
        read_pairs,
        options=SourceOptions(
            config.data_format, config.image_field, config.caption_field, config.image_root
        ),
        index_folder=cache_folder(config.cache_dir),
        max_bad_share=config.max_bad_share,
    )
    pairs = read(data)
    bad = list(pairs.bad)
    train = _training_split(pairs, config.split)
    _check_images_exist(name_of(data), train, config.max_bad_share)
    if val_data is not None:
        val_pairs = read(val_data)
        bad += val_pairs.bad
        val = evaluation_split(val_pairs, ["val", "test"])
    elif is_of_earlier_version and config.split is None and config.val_size is None:
        fraction = DEFAULT_FRACTION if config.val_fraction is None else config.val_fraction
        train, val = hold_out_sampled(pairs, fraction=fraction, seed=config.seed)
    else:
        train, val = _divide(pairs, train, config)
    _check_images_exist(name_of(val_data or data), val, config.max_bad_share)
    _warn_of_overlap(train, val)
    if config.eval_captions:
        _warn_of_captions_without_words(config, val, name_of(val_data or data))
    return Rows(train, val, bad)


def warn_of_few_images(val: Pairs, config: TrainingConfig) -> None:
    """Warn if there are too few validation images to choose an adapter by."""
    if len(val.images) < FEW_IMAGES:
        logger.warning(
            f"only {counted(len(val.images), 'validation image')}: their loss and scores say "
            f"little (--val_size)"
        )
    if len(val.images) == 1 and config.best_by == "cider_d":
        logger.warning(
            "CIDEr-D is 0 by definition for one image, so the adapter with the lowest validation "
            "loss counts as the best; give more validation images"
        )


def _training_split(pairs: Pairs, asked: str | None) -> Pairs:
    """The rows of --split; without it those of the split train, or all if there is none."""
    if asked is not None:
        return named_split(pairs, asked)
    splits = splits_of(pairs)
    return of_splits(pairs, ["train"]) if "train" in splits else pairs


def _divide(pairs: Pairs, train: Pairs, config: TrainingConfig) -> tuple[Pairs, Pairs]:
    """Training and validation rows of one source: by its splits, else held out by image of `train`,
    its `_training_split`."""
    splits = splits_of(pairs)
    is_val = config.split is not None and normal_split(config.split) == "val"
    if "val" in splits and train is not pairs and not is_val:
        unused = sum(splits.values()) - splits["val"] - len(train)
        logger.info(
            f"splits: {counted(len(train), 'row')} to train on, {splits['val']:,} for validation"
            + (f", {unused:,} of other splits unused" if unused else "")
        )
        return train, of_splits(pairs, ["val"])
    return hold_out(
        train, fraction=config.val_fraction, size=config.val_size, seed=config.seed
    )


def build_data(
    rows: Rows, captioner: Captioner, config: TrainingConfig, *, digests: np.ndarray
) -> RunData:
    """Tokenize the rows; `digests` V16 (N,) are what is known of `Rows.images`."""
    num_train_images = len(rows.train.images)
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
    pairs: Pairs,
    captioner: Captioner,
    config: TrainingConfig,
    *,
    substitute: bool,
    digests: np.ndarray | None = None,
) -> CaptionedImages:
    """Tokenize the captions; `substitute` and `digests` are those of `CaptionedImages`.

    Raises ValueError if the tokenizer knows none of their characters.
    """
    captions = tokenize(
        pairs,
        captioner.tokenizer,
        fingerprint=captioner.fingerprints["tokenizer"],
        prompt=captioner.prompt,
        max_caption_tokens=config.max_caption_tokens,
    )
    _check_known(captions, pairs, captioner.name)
    ends = None
    if substitute and config.read_order == "blocks":
        ends = pairs.derived("blocks", None, lambda writer: writer.append(
            "ends", block_ends(pairs.images, pairs.image_of_row).astype(np.uint64)
        ))["ends"]
    return CaptionedImages(
        pairs.images,
        pairs.image_of_row,
        captions,
        captioner.pixels,
        seed=config.seed,
        substitute=substitute,
        digests=digests,
        block_ends=ends,
    )


def _check_known(captions: TokenizedCaptions, pairs: Pairs, name: str) -> None:
    """Warn if the tokenizer of the model `name` does not know 1 % of the captions' characters.

    Raises ValueError if it knows none of them.
    """
    if captions.num_unknown and captions.num_unknown == captions.num_tokens:
        raise ValueError(
            f"the tokenizer of {name} does not know a single character of the captions, such as "
            f"{pairs.text(0)[:40]!r}; choose a model for their language"
        )
    if captions.num_unknown >= _UNKNOWN_SHARE * max(captions.num_tokens, 1):
        logger.warning(
            f"{captions.num_unknown / captions.num_tokens:.1%} of the captions' tokens stand for "
            f"characters that the tokenizer of {name} does not know (emoji, other scripts): the "
            f"captioner cannot learn them"
        )


def _warn_of_overlap(train: Pairs, val: Pairs) -> None:
    if train.source is val.source:
        return  # a choice of images, or what the source itself says
    places = {container.path for container in train.images.containers}
    if places.isdisjoint(container.path for container in val.images.containers):
        return
    images = set(filter(os.path.isabs, val.images))  # others are in memory, named by their rows
    shared = images.intersection(train.images)
    if shared:
        logger.warning(
            f"{len(shared):,} of {len(val.images):,} validation images are also training images, "
            f"such as {min(shared)}: the validation loss is too optimistic"
        )


def _warn_of_captions_without_words(config: TrainingConfig, val: Pairs, name: str) -> None:
    """Name the captions that no score can be computed against, by file and line.

    Raises ValueError if no other captions remain and a score selects the best adapter.
    """
    wordless = [number for number, row in enumerate(val) if not has_words(row.text)]
    if not wordless:
        return
    if config.best_by != "loss" and len(wordless) == len(val):
        raise ValueError(
            f"--best_by {config.best_by} needs captions with words to compare, but no validation "
            f"caption of {name} has any"
        )
    rest = len(wordless) - MAX_ROWS_SHOWN
    more = f" and {rest:,} more (lora_engine validate --json FILE lists them)" if rest > 0 else ""
    logger.warning(
        f"{counted(len(wordless), 'validation caption')} without words to compare, not scored: "
        f"{', '.join(map(val.location, wordless[:MAX_ROWS_SHOWN]))}{more}"
    )


def _check_images_exist(name: str, pairs: Pairs, max_share: float) -> None:
    """Check up to MIN_SAMPLE of the rows at once, in case the paths do not lead to the images."""
    checked = evenly_spaced(len(pairs), MIN_SAMPLE)
    missing = [row for row in checked if not pairs.images.has_file(int(pairs.image_of_row[row]))]
    is_sample = len(pairs) > MIN_SAMPLE
    if len(missing) > allowed_failures(len(checked), max_share, is_sample=is_sample):
        image, where = pairs[missing[0]].image, pairs.location(missing[0])
        folder = "to the working folder" if name == PYTHON_ROWS else (
            "to the annotation file; --image_root names another folder"
        )
        raise ValueError(
            f"{name}: no image file for {len(missing)} of {counted(len(checked), 'row')} checked, "
            f"more than --max_bad_share {max_share:g}; the first missing is {image}"
            f"{f' ({where})' if where != image else ''}. Image paths are absolute or relative "
            f"{folder}"
        )
