"""python -m lora_engine validate: whether a data set is fit to train on, row by row."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.caption_tokens import has_words
from lora_engine.commands.loading import check_writable
from lora_engine.config import TrainingConfig
from lora_engine.data.annotations import bad_row, checked_rows
from lora_engine.data.image_identity import content_digest
from lora_engine.data.images import ImageError, open_image, read_image_file
from lora_engine.data.rows import BadRow, CheckedRow, Row
from lora_engine.data.workers import load
from lora_engine.files import replaced_file
from lora_engine.models.pretrained import load_tokenizer
from lora_engine.terminal import printable

PROBLEMS = 1  # exit status: some rows cannot be used
MAX_SHOWN = 20  # problems on the terminal; --json has all
_CHUNK = 64  # images that a process is given at once


@dataclass(frozen=True)
class ValidateConfig:
    """Flags of `validate`."""

    data: str
    """Annotations to look at: a JSON list of {"text", "image"} rows."""
    val_data: str | None = None
    """Further annotations: are images of theirs among those of --data?"""
    model: str | None = None
    """Captioner, folder or Hub name, whose tokens captions are counted in. Default: words."""
    revision: str | None = None
    """Revision of a Hub name."""
    max_caption_tokens: int = 64
    """Captions longer than this are counted, as training would cut them; with --model."""
    json: str | None = None
    """Write all of it, each bad row among it, to this file."""
    num_workers: int | None = None
    """Processes that read images. Default: as many as processors."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value out of range."""
        for name in ("max_caption_tokens", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be 1 or more")
        check_writable("--json", self.json)


class ImageFacts(NamedTuple):
    """What reading an image tells: its (width, height) and content, or why it cannot be used."""

    size: tuple[int, int] | None
    digest: bytes
    reason: str | None = None


@dataclass
class Findings:
    """All that was found out about a data set."""

    num_rows: int = 0
    rows: list[CheckedRow] = field(default_factory=list)  # those that are well written
    problems: list[tuple[int, int, str]] = field(default_factory=list)  # (row, line, reason)
    images: dict[str, ImageFacts] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    wordless: list[CheckedRow] = field(default_factory=list)  # captions that scores leave out
    unit: str = "words"
    num_cut: int | None = None
    shared: int | None = None
    bad_val_rows: list[BadRow] = field(default_factory=list)
    wordless_val_rows: list[str] = field(default_factory=list)  # path:line

    @property
    def is_trainable(self) -> bool:
        """Whether a run with the default --max_bad_share skips what cannot be used."""
        num_rows, num_bad = self.num_rows, self.num_rows - len(self.rows)
        share = TrainingConfig.max_bad_share
        return (
            num_bad <= share * num_rows
            and len(self.problems) - num_bad <= share * len(self.rows)
        )

    @property
    def usable(self) -> list[ImageFacts]:
        return [facts for facts in self.images.values() if facts.reason is None]

    @property
    def num_repeated_rows(self) -> int:
        counts = Counter(checked.row for checked in self.rows)
        return sum(count - 1 for count in counts.values())

    @property
    def num_repeated_images(self) -> int:
        """Images whose content another file has, too."""
        counts = Counter(facts.digest for facts in self.usable)
        return sum(count - 1 for count in counts.values())


def validate(args: list[str]) -> int:
    """Read every row and every image once, and say what is wrong -> exit status."""
    config = cli.parse(
        ValidateConfig, args, prog="python -m lora_engine validate",
        description="Read every row and every image of a data set, and say what cannot be used.",
    )
    config.check()
    findings = Findings()
    for checked in checked_rows(config.data):
        findings.num_rows += 1
        if isinstance(checked.row, Row):
            findings.rows.append(checked)
        else:
            findings.problems.append((checked.number, checked.line, checked.complaint))
    rows = [checked.row for checked in findings.rows if isinstance(checked.row, Row)]
    findings.wordless = [
        checked for checked, row in zip(findings.rows, rows) if not has_words(row.text)
    ]
    _measure_captions(findings, [row.text for row in rows], config)
    paths = list(dict.fromkeys(row.image for row in rows))
    findings.images = dict(zip(paths, _read_images(paths, config.num_workers)))
    for checked, row in zip(findings.rows, rows):
        reason = findings.images[row.image].reason
        if reason is not None:
            findings.problems.append((checked.number, checked.line, f"{row.image}: {reason}"))
    findings.problems.sort()
    if config.val_data is not None:
        _compare(findings, config.val_data)
    print(printable(_told(config, findings)))
    if config.json is not None:
        with replaced_file(config.json) as new:
            text = json.dumps(_as_json(config, findings), indent=1, ensure_ascii=False)
            new.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    return PROBLEMS if findings.problems or findings.bad_val_rows else 0


def _compare(findings: Findings, val_data: str) -> None:
    """Note which images are in both files, and which rows of `val_data` cannot be used."""
    images = set()
    for checked in checked_rows(val_data):
        if not isinstance(checked.row, Row):
            findings.bad_val_rows.append(bad_row(val_data, checked))
            continue
        images.add(checked.row.image)
        if not has_words(checked.row.text):
            findings.wordless_val_rows.append(f"{val_data}:{checked.line}")
    findings.shared = len(images & findings.images.keys())


def _measure_captions(findings: Findings, texts: Sequence[str], config: ValidateConfig) -> None:
    if config.model is None:
        findings.lengths = np.array([len(text.split()) for text in texts], dtype=int)
        return
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    findings.unit = "tokens"
    findings.lengths = tokenizer.count_tokens(texts)
    findings.num_cut = int((findings.lengths > config.max_caption_tokens).sum())


# --- images ---------------------------------------------------------------------------------


def _read_images(paths: Sequence[str], num_workers: int | None) -> Iterator[ImageFacts]:
    """The facts of each image, in order. Raises LoadingStopped where a process died of one."""
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), max(len(paths) // _CHUNK, 1))
    chunks = load(
        _Facts(paths),
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=num_workers if num_workers > 1 else 0,
    )
    with tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty()) as bar:
        for chunk in chunks:
            yield from chunk
            bar.update(len(chunk))


class _Facts(Dataset):
    """What reading each image tells."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> ImageFacts:
        return _read_image(self.paths[number])


def _read_image(path: str) -> ImageFacts:
    try:
        data = read_image_file(path)
        return ImageFacts(open_image(data).size, content_digest(data))
    except ImageError as error:
        return ImageFacts(None, b"", error.reason)


# --- what is told ---------------------------------------------------------------------------


def _told(config: ValidateConfig, findings: Findings) -> str:
    images, usable = findings.images, findings.usable
    lines = [
        f"{config.data}: {findings.num_rows:,} rows, {len(images):,} images",
        f"images      {len(usable):,} can be used, {len(images) - len(usable):,} cannot",
    ]
    if usable:
        sizes = sorted((facts.size for facts in usable if facts.size), key=np.prod)
        small, middle, large = sizes[0], sizes[len(sizes) // 2], sizes[-1]
        lines.append(
            f"sizes       {_size(small)} to {_size(large)} pixels, median {_size(middle)}"
        )
    if len(findings.lengths):
        low, middle, most, high = np.quantile(findings.lengths, (0, 0.5, 0.95, 1)).astype(int)
        cut = ""
        if findings.num_cut is not None:
            cut = f"; {findings.num_cut:,} above --max_caption_tokens {config.max_caption_tokens}"
        lines.append(
            f"captions    {low:,} to {high:,} {findings.unit}, median {middle:,}, 95 % up to "
            f"{most:,}{cut}"
        )
    lines.append(
        f"duplicates  {findings.num_repeated_rows:,} rows say again what another one says; "
        f"{findings.num_repeated_images:,} images have the content of another file"
    )
    if findings.shared is not None:
        lines.append(f"shared      {findings.shared:,} images of {config.val_data} are among these")
    wordless = [f"{config.data}:{row.line}" for row in findings.wordless]
    wordless += findings.wordless_val_rows
    if wordless:
        lines.append(f"scores      {len(wordless):,} captions have no words to compare:")
        lines += [f"  {place}" for place in wordless[:MAX_SHOWN]]
    if findings.bad_val_rows:
        lines.append(f"validation  {len(findings.bad_val_rows):,} rows cannot be used:")
        lines += [f"  {bad}" for bad in findings.bad_val_rows[:MAX_SHOWN]]
    problems = findings.problems
    if not problems:
        return "\n".join([*lines, "no row has a problem"])
    verdict = "skips them" if findings.is_trainable else "stops"
    lines.append(
        f"problems    {len(problems):,} of {findings.num_rows:,} rows cannot be used; training "
        f"{verdict} (--max_bad_share {TrainingConfig.max_bad_share:g}):"
    )
    lines += [
        f"  {config.data}:{line}: row {number}: {reason}"
        for number, line, reason in problems[:MAX_SHOWN]
    ]
    if len(problems) > MAX_SHOWN:
        where = "are" if config.json else "with --json FILE are"
        lines.append(f"  all {len(problems):,} {where} in {config.json or 'that file'}")
    return "\n".join(lines)


def _size(size: tuple[int, int] | None) -> str:
    assert size is not None
    return f"{size[0]} x {size[1]}"


def _as_json(config: ValidateConfig, findings: Findings) -> dict[str, Any]:
    sizes = [facts.size for facts in findings.usable]
    return {
        "data": str(Path(config.data)),
        "num_rows": findings.num_rows,
        "num_images": len(findings.images),
        "num_usable_images": len(findings.usable),
        "num_repeated_rows": findings.num_repeated_rows,
        "num_repeated_images": findings.num_repeated_images,
        "num_shared_with_val_data": findings.shared,
        "caption_unit": findings.unit,
        "caption_lengths": {str(k): v for k, v in sorted(Counter(
            findings.lengths.tolist()).items())},
        "num_above_max_caption_tokens": findings.num_cut,
        "image_sizes": [
            {"width": size[0], "height": size[1], "count": count}
            for size, count in Counter(sizes).most_common() if size
        ],
        "lines_without_words": [checked.line for checked in findings.wordless],
        "val_data_lines_without_words": findings.wordless_val_rows,
        "val_data_problems": [str(bad) for bad in findings.bad_val_rows],
        "problems": [
            {"row": number, "line": line, "reason": reason}
            for number, line, reason in findings.problems
        ],
    }
