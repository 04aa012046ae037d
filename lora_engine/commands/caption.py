"""python -m lora_engine caption: images -> captions, on the screen and in files."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import tyro
from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.captioner import Captioned, Speaker
from lora_engine.captioning.generation import Sampling
from lora_engine.commands.loading import (
    CaptioningConfig,
    SkippedImages,
    check_writable,
    load_base,
    speaker_of,
)
from lora_engine.data.image_files import find_images
from lora_engine.files import replaced_file
from lora_engine.lora.adapter import read_adapter
from lora_engine.report.run_record import read_records
from lora_engine.terminal import escaped

UNREADABLE = 1  # exit status: some images have no caption


@dataclass(frozen=True)
class CaptionConfig(CaptioningConfig):
    """Flags of `caption`."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders of images, patterns such as "photos/**/*.jpg", or - for a list of files
    on stdin, one a line."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter folder, such as RUN/adapter; without one the base model captions. Given several
    times, all adapters caption, side by side."""
    out: str | None = None
    """Write the captions to this file, too: {"image", "caption"} JSON lines, or CSV where it ends
    in .csv. Images that it holds already are not captioned again."""
    txt: bool = False
    """Write each caption beside its image, into a .txt file. Images that have one are not captioned
    again."""
    overwrite: bool = False
    """Caption anew what --out and --txt hold already."""
    min_new_tokens: int = 0
    """Shortest caption, in tokens."""
    temperature: float | None = None
    """Draw words at this temperature instead of taking the most probable ones."""
    top_p: float = 1.0
    """Draw from the fewest words whose probabilities add up to this much."""
    seed: int = 0
    """Seed of what is drawn."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"--min_new_tokens is {self.min_new_tokens}; it must be from 0 to --max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature is {self.temperature}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature is None and self.top_p < 1:
            raise ValueError("--top_p is for drawing words: give --temperature 1, too")
        if self.temperature is not None and self.num_beams > 1:
            raise ValueError("--temperature draws words, --num_beams searches: give one of them")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}; it must be 0 or more")
        if not self.images:
            raise ValueError("no images to caption: name image files, or folders of images")
        if self.txt and len(self.adapter) > 1:
            raise ValueError("--txt holds one caption an image, but there are several --adapter")
        check_writable("--out", self.out)


def caption(args: list[str]) -> int:
    """Caption images, one line each on stdout -> exit status."""
    config = cli.parse(
        CaptionConfig, args, prog="python -m lora_engine caption",
        description="Caption images with a trained adapter.",
    )
    config.check()
    images = find_images(_listed(config.images))
    left = _without_caption(config, images)
    if len(left) < len(images):
        print(
            f"{len(images) - len(left)} of {len(images)} images have a caption already "
            f"(--overwrite makes new ones)",
            file=sys.stderr,
        )
    if not left:
        return 0
    outcomes = config.caption(
        _speakers(config),
        [images[number] for number in left],
        min_new_tokens=config.min_new_tokens,
        sampling=None if config.temperature is None else Sampling(
            config.temperature, config.top_p, config.seed
        ),
        numbers=left,
    )
    skipped = SkippedImages(config.out)
    # Files are opened when everything is loaded: what fails before that changes none.
    with ExitStack() as stack:
        writers = _open_writers(config, stack)
        for outcome in tqdm(
            outcomes, total=len(left), unit="image", disable=not sys.stderr.isatty()
        ):
            if outcome.captions:
                for write in writers:
                    write(outcome)
            else:
                skipped.add(outcome)
    skipped.finish()
    return UNREADABLE if skipped.lines else 0


def _listed(paths: Sequence[str]) -> list[str]:
    """The paths, with those on stdin in the place of "-"."""
    found: list[str] = []
    for path in paths:
        found += sys.stdin.read().splitlines() if path == "-" else [path]
    return [path for path in found if path.strip()]


def _speakers(config: CaptionConfig) -> list[Speaker]:
    adapters = [read_adapter(folder) for folder in config.adapter]
    captioner = load_base(config.model, config.revision, adapters)
    if not adapters:
        return [Speaker(captioner, config.prompt or "")]
    return [
        speaker_of(captioner, adapter, config.prompt, force=config.force) for adapter in adapters
    ]


# --- where captions go ----------------------------------------------------------------------

Writer = Callable[[Captioned], None]


def _without_caption(config: CaptionConfig, images: Sequence[Path]) -> list[int]:
    """The numbers of the images whose caption --out or --txt lacks; without them all."""
    if config.txt:
        _check_no_name_twice(images)
    if config.overwrite or not (config.txt or config.out):
        return list(range(len(images)))
    done = _done(config.out)
    return [
        number for number, image in enumerate(images)
        if config.out and str(image) not in done
        or config.txt and not image.with_suffix(".txt").exists()
    ]


def _open_writers(config: CaptionConfig, stack: ExitStack) -> list[Writer]:
    """What writes an outcome, everywhere that it shall go."""
    names = list(config.adapter) if len(config.adapter) > 1 else []
    writers: list[Writer] = [lambda outcome: _print(outcome, names)]
    if config.txt:
        writers.append(_write_beside)
    if config.out is not None:
        done = set() if config.overwrite else _done(config.out)
        path = Path(config.out)
        if config.overwrite:
            path = stack.enter_context(replaced_file(path))
        else:
            _remove_cut_line(path)
        file = stack.enter_context(
            open(path, "a", encoding="utf-8", errors="backslashreplace", newline="")
        )
        is_csv = _is_csv(config.out)
        if is_csv and file.tell() == 0:
            columns = ["image", *(["adapter"] if names else []), "caption"]
            csv.writer(file).writerow(columns)
        write = _write_csv if is_csv else _write_json
        writers.append(
            lambda outcome: None if outcome.image in done else write(outcome, names, file)
        )
    return writers


def _said(outcome: Captioned, names: Sequence[str]) -> list[dict[str, str]]:
    """{"image", "caption"} of an outcome; with several adapters one for each, which names it."""
    if not names:
        return [{"image": outcome.image, "caption": outcome.captions[0].text}]
    return [
        {"image": outcome.image, "adapter": name, "caption": caption.text}
        for name, caption in zip(names, outcome.captions)
    ]


def _print(outcome: Captioned, names: Sequence[str]) -> None:
    for line in _said(outcome, names):
        line["caption"] = " ".join(line["caption"].split())
        tqdm.write("\t".join(map(escaped, line.values())), file=sys.stdout)
    sys.stdout.flush()


def _write_json(outcome: Captioned, names: Sequence[str], file: TextIO) -> None:
    for line in _said(outcome, names):
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _write_csv(outcome: Captioned, names: Sequence[str], file: TextIO) -> None:
    for line in _said(outcome, names):
        # On one line of the file, so that a line is an image.
        csv.writer(file).writerow(" ".join(cell.split()) for cell in line.values())
    file.flush()


def _write_beside(outcome: Captioned) -> None:
    with replaced_file(Path(outcome.image).with_suffix(".txt")) as new:
        new.write_text(outcome.captions[0].text + "\n", encoding="utf-8")


def _check_no_name_twice(images: Sequence[Path]) -> None:
    owners: dict[Path, Path] = {}
    for image in images:
        other = owners.setdefault(image.with_suffix(".txt"), image)
        if other != image:
            raise ValueError(
                f"--txt would write the captions of {other} and {image} into one file; rename one"
            )


def _is_csv(out: str) -> bool:
    return out.lower().endswith(".csv")


def _done(out: str | None) -> set[str]:
    """The images that a file of captions names, but for a last line that was cut short.

    Raises ValueError if it is another kind of file.
    """
    if out is None or not Path(out).exists():
        return set()
    try:
        if not _is_csv(out):
            return {line["image"] for line in read_records(out, image=str, caption=str)}
        whole = Path(out).read_text(encoding="utf-8").rpartition("\n")[0]
        return {row["image"] for row in csv.DictReader(whole.split("\n"))}
    except (ValueError, KeyError) as error:
        kind = "CSV with a column image" if _is_csv(out) else "JSON lines of captions"
        raise ValueError(
            f"--out {out} holds something else than {kind} ({error}); name another file, or "
            f"--overwrite it"
        ) from None


def _remove_cut_line(path: Path) -> None:
    """A line without an end would run into what is written behind it."""
    if path.exists():
        data = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
