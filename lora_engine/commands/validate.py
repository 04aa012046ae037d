"""python -m lora_engine validate: check every row and image of a data set before training."""

import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.caption_tokens import has_words
from lora_engine.commands.captioning_flags import check_writable
from lora_engine.commands.source_flags import SourceConfig
from lora_engine.config import Range, TrainingConfig, check_ranges
from lora_engine.data.image_identity import content_digest
from lora_engine.data.image_table import ImageTable
from lora_engine.data.images import ImageError, open_image
from lora_engine.data.pairs import Pairs
from lora_engine.data.read_pairs import name_of, paths_of
from lora_engine.data.rows import BadRow
from lora_engine.data.subsets import named_split
from lora_engine.data.workers import load
from lora_engine.devices import num_processors
from lora_engine.files import replaced_file
from lora_engine.models.pretrained import load_tokenizer
from lora_engine.terminal import printable

PROBLEMS = 1  # exit status: some rows cannot be used
MAX_SHOWN = 20  # problems on the terminal; --json has all
_CHUNK = 64  # images per task of a worker process


@dataclass(frozen=True)
class ValidateConfig(SourceConfig):
    """Flags of `validate`."""

    data: str | tuple[str, ...]
    """Data to check, in any format that training reads."""
    val_data: str | tuple[str, ...] | None = None
    """Validation data, whose rows and images are checked, too; images that are also in --data are
    counted."""
    split: str | None = None
    """Check only this split of --data."""
    model: str | None = None
    """Captioner (folder or Hub name) whose tokens measure the captions. Default: count words."""
    revision: str | None = None
    """Revision of a Hub model."""
    max_caption_tokens: Annotated[int, Range(ge=1)] = 64
    """Count captions longer than this, which training would truncate; requires --model."""
    json: str | None = None
    """Write all results, including every bad row, to this file."""
    num_workers: Annotated[int | None, Range(ge=1)] = None
    """Worker processes that read images. Default: one per processor."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value that is not accepted."""
        check_ranges(self)
        inputs = [*paths_of(self.data), *paths_of(self.val_data)]
        check_writable("--json", self.json, inputs=inputs)


class ImageFacts(NamedTuple):
    """The (width, height) and content digest of an image, or the reason why it cannot be used."""

    size: tuple[int, int] | None
    digest: bytes
    reason: str | None = None


@dataclass
class Findings:
    """Everything that was found out about a data set."""

    pairs: Pairs  # the well-formed rows
    images: list[ImageFacts]  # by their numbers in the table
    bad_images: list[BadRow]  # the rows of images that cannot be used
    wordless: list[str]  # locations of captions that are not scored
    num_repeated_rows: int
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))  # of captions
    unit: str = "words"
    num_truncated: int | None = None
    num_unknown: int = 0  # tokens of characters that the tokenizer does not know
    num_shared: int | None = None  # images that are also in the validation data
    bad_val_rows: list[BadRow] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.pairs) + len(self.pairs.bad)

    @property
    def problems(self) -> list[BadRow]:
        return self.pairs.in_order([*self.pairs.bad, *self.bad_images])

    @property
    def is_trainable(self) -> bool:
        """Whether a run with the default --max_bad_share would skip the problems and train."""
        share = TrainingConfig.max_bad_share
        return (
            len(self.pairs.bad) <= share * self.num_rows
            and self.pairs.unreadable_share <= share
            and len(self.bad_images) <= share * len(self.pairs)
        )

    @property
    def usable_images(self) -> list[ImageFacts]:
        return [facts for facts in self.images if facts.reason is None]

    @property
    def num_repeated_images(self) -> int:
        """Images with the same content as another file."""
        return _num_repeated(facts.digest for facts in self.usable_images)


def _num_repeated(values: Iterable[Hashable]) -> int:
    return sum(count - 1 for count in Counter(values).values())


def validate(args: list[str]) -> int:
    """Read every row and every image once, report problems, and return the exit status."""
    config = cli.parse(
        ValidateConfig, args, prog="python -m lora_engine validate",
        description="Read every row and image of a data set and list those that cannot be used.",
    )
    config.check()
    findings = _examine(config)
    print(printable(_summary(config, findings)))
    if config.json is not None:
        with replaced_file(config.json) as new:
            text = json.dumps(_as_json(config, findings), indent=1, ensure_ascii=False)
            new.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return PROBLEMS if findings.problems or findings.bad_val_rows else 0


# --- reading --------------------------------------------------------------------------------


def _examine(config: ValidateConfig) -> Findings:
    pairs = config.read(config.data, max_bad_share=1.0)
    if config.split is not None:
        pairs = named_split(pairs, config.split)
    images = list(_read_images(pairs.images, config.num_workers))
    findings = Findings(
        pairs,
        images,
        _rows_of_bad_images(pairs, images),
        _wordless(pairs),
        _num_repeated(zip(pairs.captions(), pairs.image_of_row.tolist())),
    )
    _measure_captions(findings, config)
    if config.val_data is not None:
        _examine_val_data(findings, config)
    return findings


def _rows_of_bad_images(pairs: Pairs, images: Sequence[ImageFacts]) -> list[BadRow]:
    reasons = {number: facts.reason for number, facts in enumerate(images) if facts.reason}
    found = []
    for row, image in enumerate(pairs.image_of_row.tolist()):
        if image in reasons:
            location, path = pairs.location(row), pairs.images[image]
            is_named = location == path  # in formats without lines
            found.append(BadRow(location, f"{'' if is_named else f'{path}: '}{reasons[image]}"))
    return found


def _wordless(pairs: Pairs) -> list[str]:
    return [pairs.location(row) for row, text in enumerate(pairs.captions()) if not has_words(text)]


def _measure_captions(findings: Findings, config: ValidateConfig) -> None:
    """Count the words of captions, or the tokens if a model is given."""
    texts = findings.pairs.captions()
    if config.model is None:
        findings.lengths = np.array([len(text.split()) for text in texts], dtype=int)
        return
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    findings.unit = "tokens"
    findings.lengths, findings.num_unknown = tokenizer.count_tokens(texts)
    findings.num_truncated = int((findings.lengths > config.max_caption_tokens).sum())


def _examine_val_data(findings: Findings, config: ValidateConfig) -> None:
    """Check rows and images of the validation data; count images that are also in --data."""
    assert config.val_data is not None
    pairs = config.read(config.val_data, max_bad_share=1.0)
    images = list(_read_images(pairs.images, config.num_workers))
    findings.num_shared = len(set(pairs.images).intersection(findings.pairs.images))
    findings.bad_val_rows = pairs.in_order([*pairs.bad, *_rows_of_bad_images(pairs, images)])
    findings.wordless += _wordless(pairs)


def _read_images(images: ImageTable, num_workers: int | None) -> Iterator[ImageFacts]:
    """The facts of each image, in order. Raises LoadingStopped if a worker process dies."""
    num_workers = min(num_workers or num_processors(), max(len(images) // _CHUNK, 1))
    chunks = load(
        _ImageFiles(images),
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=num_workers if num_workers > 1 else 0,
    )
    with tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty()) as bar:
        for chunk in chunks:
            yield from chunk
            bar.update(len(chunk))


class _ImageFiles(Dataset):
    """Numbers of images -> `ImageFacts`."""

    def __init__(self, images: ImageTable) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> ImageFacts:
        try:
            data = self.images.read(number)
            return ImageFacts(open_image(data).size, content_digest(data))
        except ImageError as error:
            return ImageFacts(None, b"", error.reason)


# --- reporting ------------------------------------------------------------------------------


def _summary(config: ValidateConfig, findings: Findings) -> str:
    num_images, num_usable = len(findings.images), len(findings.usable_images)
    lines = [
        f"{findings.pairs.name}: {findings.num_rows:,} rows, {num_images:,} images",
        f"images      {num_usable:,} can be used, {num_images - num_usable:,} cannot",
    ]
    sizes = [facts.size for facts in findings.usable_images if facts.size is not None]
    if sizes:
        sizes.sort(key=np.prod)
        small, median, large = (
            f"{width} x {height}" for width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        )
        lines.append(f"sizes       {small} to {large} pixels, median {median}")
    if len(findings.lengths):
        low, median, high, top = np.quantile(findings.lengths, (0, 0.5, 0.95, 1)).astype(int)
        lines.append(
            f"captions    {low:,} to {top:,} {findings.unit}, median {median:,}, 95 % up to "
            f"{high:,}"
        )
        if findings.num_truncated is not None:
            lines[-1] += (
                f"; {findings.num_truncated:,} above --max_caption_tokens "
                f"{config.max_caption_tokens}"
            )
    if findings.num_unknown:
        share = findings.num_unknown / max(findings.lengths.sum(), 1)
        lines.append(
            f"unknown     {share:.2%} of the tokens stand for characters that the tokenizer does "
            f"not know (emoji, other scripts)"
        )
    lines.append(
        f"duplicates  {findings.num_repeated_rows:,} rows are the same as another row; "
        f"{findings.num_repeated_images:,} images have the same content as another file"
    )
    if findings.num_shared is not None:
        lines.append(
            f"shared      {findings.num_shared:,} images of {name_of(config.val_data)} are in "
            f"--data, too"
        )
    wordless = findings.wordless
    if wordless:
        lines.append(f"scores      {len(wordless):,} captions have no words to compare:")
        lines += [f"  {path_and_line}" for path_and_line in wordless[:MAX_SHOWN]]
    if findings.bad_val_rows:
        lines.append(f"validation  {len(findings.bad_val_rows):,} rows cannot be used:")
        lines += [f"  {bad}" for bad in findings.bad_val_rows[:MAX_SHOWN]]
    return "\n".join(lines + _problem_lines(config, findings))


def _problem_lines(config: ValidateConfig, findings: Findings) -> list[str]:
    problems = findings.problems
    if not problems:
        return [] if findings.bad_val_rows else ["no row has a problem"]
    lines = [
        f"problems    {len(problems):,} of {findings.num_rows:,} rows cannot be used; training "
        f"{'skips them' if findings.is_trainable else 'stops'} "
        f"(--max_bad_share {TrainingConfig.max_bad_share:g}):"
    ]
    lines += [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        where = f"are in {config.json}" if config.json else "are written by --json FILE"
        lines.append(f"  all {len(problems):,} {where}")
    return lines


def _as_json(config: ValidateConfig, findings: Findings) -> dict[str, Any]:
    lengths = Counter(findings.lengths.tolist())
    sizes = Counter(facts.size for facts in findings.usable_images)
    return {
        "data": paths_of(config.data),
        "num_rows": findings.num_rows,
        "num_images": len(findings.images),
        "num_usable_images": len(findings.usable_images),
        "num_repeated_rows": findings.num_repeated_rows,
        "num_repeated_images": findings.num_repeated_images,
        "num_shared_with_val_data": findings.num_shared,
        "caption_unit": findings.unit,
        "caption_lengths": {str(length): count for length, count in sorted(lengths.items())},
        "num_above_max_caption_tokens": findings.num_truncated,
        "image_sizes": [
            {"width": size[0], "height": size[1], "count": count}
            for size, count in sizes.most_common() if size
        ],
        "num_unknown_tokens": findings.num_unknown,
        "rows_without_words": findings.wordless,
        "val_data_problems": [str(bad) for bad in findings.bad_val_rows],
        "problems": [problem._asdict() for problem in findings.problems],
    }
