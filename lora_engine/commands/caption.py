"""python -m lora_engine caption: images -> captions, on stdout and in files.

Under torchrun the images are split across processes; the main one writes.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
import torch
import tyro
from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.adapted_captioner import load_captioners
from lora_engine.captioning.captioner import Captioned
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.commands.captioning_flags import CaptioningConfig, SkippedImages, check_writable
from lora_engine.commands.source_flags import SourceConfig
from lora_engine.data.image_files import find_images
from lora_engine.data.image_table import ImageTable
from lora_engine.data.rows import BadRow
from lora_engine.data.sources.parts import is_source
from lora_engine.data.subsets import named_split
from lora_engine.features.store import cache_folder
from lora_engine.files import replaced_file
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import Ranks, open_ranks
from lora_engine.report.run_record import read_records
from lora_engine.terminal import escaped

UNREADABLE = 1  # exit status: some images have no caption


@dataclass(frozen=True)
class CaptionConfig(GenerationSettings, CaptioningConfig, SourceConfig):
    """Flags of `caption`."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders of images, patterns such as "photos/**/*.jpg", or - to read one path per
    line from stdin; or data as for training: tars, Parquet, annotation files."""
    split: str | None = None
    """Split of a data set to caption. Default: all."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter: a run folder, an adapter folder, or owner/name on the Hub; without one, the base
    model captions. Repeat the flag to compare several adapters."""
    out: str | None = None
    """Also write the captions to this file: {"image", "caption"} JSON lines, or CSV if its name
    ends in .csv. Skips images that it already contains. With --num_return_sequences, JSON lines
    list all in "captions", CSV has a row for each."""
    txt: bool = False
    """Write each caption to a .txt file next to its image. Skips images that already have one."""
    overwrite: bool = False
    """Replace the captions that --out and --txt already contain."""

    def check(self) -> None:
        super().check()
        self.check_generation("--")
        if not self.images:
            raise ValueError("no images to caption: give image files or folders of images")
        if self.txt and len(self.adapter) > 1:
            raise ValueError("--txt takes one caption per image, but there are several --adapter")
        if self.txt and self.num_return_sequences > 1:
            raise ValueError(
                f"--txt takes one caption per image, but --num_return_sequences is "
                f"{self.num_return_sequences}: use --out"
            )


def caption(args: list[str]) -> int:
    """Caption images, one line each on stdout -> exit status."""
    with open_ranks() as ranks:
        config = cli.parse(
            CaptionConfig, args, prog="python -m lora_engine caption",
            description="Caption images with a trained adapter. Start it with torchrun to split "
                        "the images across processes.",
        )
        return _caption(config, ranks)


def _caption(config: CaptionConfig, ranks: Ranks) -> int:
    config.check()
    if ranks.is_main:
        check_writable("--out", config.out)
    config.take_share(ranks)
    paths = _listed(config.images, ranks)
    with ranks.machine_first():
        images, bad_rows = _images(config, paths)
    config.check_same(images, ranks)
    left = _left(config, images, ranks)
    if len(left) < len(images):
        print(
            f"{len(images) - len(left)} of {len(images)} images already have a caption "
            f"(--overwrite replaces them)",
            file=sys.stderr,
        )
    if not left:
        return 0
    captions = config.captions(
        _captioners(config),
        images.choose(np.array(left)),
        [config.generation],
        ranks=ranks,
        numbers=left,
    )
    skipped = SkippedImages(config.out if ranks.is_main else None, bad_rows)
    # Files are opened after everything has been loaded, so an earlier failure changes none.
    with captions as captioned, ExitStack() as stack:
        writers = _open_writers(config, stack) if ranks.is_main else []
        for result in tqdm(
            captioned, total=len(left), unit="image", disable=not sys.stderr.isatty()
        ):
            if result.captions:
                for write in writers:
                    write(result)
            else:
                skipped.add(result)
    skipped.finish()
    return UNREADABLE if skipped.lines else 0


def _images(
    config: CaptionConfig, paths: Sequence[str]
) -> tuple[ImageTable, Sequence[BadRow]]:
    """The images to caption, files or those of data sources, and rows that cannot be used."""
    sources = [path for path in paths if is_source(path)]
    if not sources and config.split is not None:
        raise ValueError(f"--split {config.split} is for data sets, not for {paths[0]}")
    if not sources:
        return ImageTable.of_files(map(str, find_images(paths))), []
    if len(sources) < len(paths):
        other = next(path for path in paths if path not in sources)
        raise ValueError(
            f"{sources[0]} is a data set and {other} is not: caption image files and data sets one "
            f"after the other"
        )
    if config.txt:
        raise ValueError(
            f"--txt writes beside image files, and {sources[0]} is a data set: use --out"
        )
    pairs = config.read(
        tuple(paths), index_folder=cache_folder(config.cache_dir), max_bad_share=1.0,
        needs_captions=False,
    )
    if config.split is not None:
        pairs = named_split(pairs, config.split)
    if not len(pairs):
        raise ValueError(f"{pairs.name}: no image that can be used, first {pairs.bad[0]}")
    return pairs.images, pairs.bad


def _listed(paths: Sequence[str], ranks: Ranks) -> list[str]:
    """The paths, with "-" replaced by the paths on stdin, which all processes have in common."""
    found: list[str] = []
    for path in paths:
        if path == "-":
            found += ranks.gather(sys.stdin.read().splitlines() if ranks.is_main else None)[0]
        else:
            found.append(path)
    return [path for path in found if path.strip()]


def _captioners(config: CaptionConfig) -> list[Captioner]:
    base, adapted = load_captioners(
        config.model, config.adapter, revision=config.revision, prompt=config.prompt,
        force=config.force,
    )
    return adapted or [base]


# --- where captions go ----------------------------------------------------------------------

Writer = Callable[[Captioned], None]


def _left(config: CaptionConfig, images: ImageTable, ranks: Ranks) -> list[int]:
    """The numbers of the images to caption, which the main process finds for all."""
    is_left = torch.zeros(len(images), dtype=torch.uint8)
    if ranks.is_main:
        is_left[_without_caption(config, images)] = 1
    return ranks.maximum(is_left).nonzero()[:, 0].tolist()


def _without_caption(config: CaptionConfig, images: ImageTable) -> list[int]:
    """The numbers of the images without a caption in --out or --txt; all if neither is given."""
    if config.txt:
        _check_no_name_twice(list(map(Path, images)))
    if config.overwrite or not (config.txt or config.out):
        return list(range(len(images)))
    done = _done(config.out)
    return [
        number for number, image in enumerate(images)
        if config.out and image not in done
        or config.txt and not Path(image).with_suffix(".txt").exists()
    ]


def _open_writers(config: CaptionConfig, stack: ExitStack) -> list[Writer]:
    """Open the files that captions go to -> functions that write a result, stdout first."""
    names = list(config.adapter) if len(config.adapter) > 1 else []
    writers: list[Writer] = [lambda result: _print(result, names)]
    if config.txt:
        writers.append(_write_beside)
    if config.out is not None:
        done = set() if config.overwrite else _done(config.out)
        path = Path(config.out)
        if config.overwrite:
            path = stack.enter_context(replaced_file(path))
        else:
            _remove_incomplete_line(path)
        file = stack.enter_context(
            open(path, "a", encoding="utf-8", errors="backslashreplace", newline="")
        )
        is_csv = _is_csv(config.out)
        if is_csv and file.tell() == 0:
            columns = ["image", *(["adapter"] if names else []), "caption"]
            csv.writer(file).writerow(columns)
        write = _write_csv if is_csv else _write_json
        writers.append(
            lambda result: None if result.image in done else write(result, names, file)
        )
    return writers


def _lines(result: Captioned, names: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """{"image"} of a result, with several adapters also {"adapter"}, and its captions."""
    if not names:
        return [({"image": result.image}, [caption.text for caption in result.captions])]
    num_each = len(result.captions) // len(names)
    texts = [caption.text for caption in result.captions]
    return [
        ({"image": result.image, "adapter": name}, texts[begin : begin + num_each])
        for name, begin in zip(names, range(0, len(texts), num_each))
    ]


def _cells(result: Captioned, names: Sequence[str]) -> Iterator[list[str]]:
    """A line for each caption, as cells without line breaks."""
    for line, texts in _lines(result, names):
        for text in texts:
            yield [*line.values(), " ".join(text.split())]


def _print(result: Captioned, names: Sequence[str]) -> None:
    for cells in _cells(result, names):
        tqdm.write("\t".join(map(escaped, cells)), file=sys.stdout)
    sys.stdout.flush()


def _write_json(result: Captioned, names: Sequence[str], file: TextIO) -> None:
    for line, texts in _lines(result, names):
        several = {"captions": texts} if len(texts) > 1 else {}
        line_of_all = {**line, "caption": texts[0], **several}
        file.write(json.dumps(line_of_all, ensure_ascii=False) + "\n")
    file.flush()


def _write_csv(result: Captioned, names: Sequence[str], file: TextIO) -> None:
    for cells in _cells(result, names):
        csv.writer(file).writerow(" ".join(cell.split()) for cell in cells)
    file.flush()


def _write_beside(result: Captioned) -> None:
    path = Path(result.image).with_suffix(".txt")
    try:
        with replaced_file(path) as new:
            new.write_text(result.captions[0].text + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"--txt: the caption of {result.image} cannot be written into {path.parent}: "
            f"{error.strerror}; --out writes all captions to one file elsewhere"
        ) from None


def _check_no_name_twice(images: Sequence[Path]) -> None:
    owners: dict[Path, Path] = {}
    for image in images:
        other = owners.setdefault(image.with_suffix(".txt"), image)
        if other != image:
            raise ValueError(
                f"--txt would write the captions of {other} and {image} to one file; rename one"
            )


def _is_csv(out: str) -> bool:
    return out.lower().endswith(".csv")


def _done(out: str | None) -> set[str]:
    """The images that a file of captions contains, except in an incomplete last line.

    Raises ValueError if it is another kind of file.
    """
    if out is None or not Path(out).exists():
        return set()
    try:
        if not _is_csv(out):
            return {line["image"] for line in read_records(out, image=str, caption=str)}
        complete = Path(out).read_text(encoding="utf-8").rpartition("\n")[0]
        return {row["image"] for row in csv.DictReader(complete.split("\n"))}
    except (ValueError, KeyError) as error:
        kind = "CSV with a column image" if _is_csv(out) else "JSON lines of captions"
        raise ValueError(
            f"--out {out} does not contain {kind} ({error}); give another file, or replace this "
            f"one with --overwrite"
        ) from None


def _remove_incomplete_line(path: Path) -> None:
    """Remove a last line without an end: the next line would be appended to it."""
    if path.exists():
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
