"""python -m lora_engine caption: images -> captions, on the screen and in files."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro
from tqdm import tqdm

from lora_engine import cli
from lora_engine.adapter import read_adapter
from lora_engine.batches import default_num_workers
from lora_engine.captioning import Captioned, Speaker, caption_images
from lora_engine.commands.loading import (
    check_at_least_1,
    check_writable,
    load_base,
    place,
    speaker_of,
)
from lora_engine.devices import resolve_device, resolve_dtype
from lora_engine.generation import Sampling
from lora_engine.images import find_images

UNREADABLE = 1  # exit status: some images have no caption


@dataclass(frozen=True)
class CaptionConfig:
    """Flags of `caption`."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders of images, patterns such as "photos/**/*.jpg", or - for a list of files
    on stdin, one a line."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter folder, such as RUN/adapter; without one the base model captions. Given several
    times, all adapters caption, side by side."""
    model: str | None = None
    """Base model: folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub name."""
    out: str | None = None
    """Write the captions to this file, too: {"image", "caption"} JSON lines, or CSV where it ends
    in .csv. Images that it holds already are not captioned again."""
    txt: bool = False
    """Write each caption beside its image, into a .txt file. Images that have one are not captioned
    again."""
    overwrite: bool = False
    """Caption anew what --out and --txt hold already."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int = 30
    """Longest caption, in tokens."""
    min_new_tokens: int = 0
    """Shortest caption, in tokens."""
    temperature: float | None = None
    """Draw words at this temperature instead of taking the most probable ones."""
    top_p: float = 1.0
    """Draw from the fewest words whose probabilities add up to this much."""
    seed: int = 0
    """Seed of what is drawn."""
    batch_size: int = 16
    """Images at a time."""
    prompt: str | None = None
    """Words to continue. Default: the prompt that the adapter was trained with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format of matrix products; auto: bf16 (else fp16) on CUDA, else fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; default: CUDA if there is one."""
    num_workers: int | None = None
    """Processes that load images. Default: half of the processors, at most 8, beside a GPU; else 0.
    """

    def check(self) -> None:
        check_at_least_1(self, "num_beams", "max_new_tokens", "batch_size")
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
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers is {self.num_workers}; it must be 0 or more")
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
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    with ExitStack() as stack:
        writers, left = _open_writers(config, images, stack)
        if len(left) < len(images):
            print(
                f"{len(images) - len(left)} of {len(images)} images have a caption already "
                f"(--overwrite makes new ones)",
                file=sys.stderr,
            )
        if not left:
            return 0
        speakers = _speakers(config)
        place(speakers, device, dtype)
        sampling = None
        if config.temperature is not None:
            sampling = Sampling(config.temperature, config.top_p)
        outcomes = caption_images(
            speakers,
            [images[number] for number in left],
            batch_size=config.batch_size,
            num_workers=default_num_workers(device, config.num_workers),
            device=device,
            dtype=dtype,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            sampling=sampling,
            seed=config.seed,
            numbers=left,
        )
        num_failed = 0
        for outcome in tqdm(
            outcomes, total=len(left), unit="image", disable=not sys.stderr.isatty()
        ):
            if outcome.captions:
                for write in writers:
                    write(outcome)
            else:
                num_failed += 1
                print(f"skipped {outcome.image}: {outcome.reason}", file=sys.stderr)
    if num_failed:
        print(f"{num_failed} images could not be read", file=sys.stderr)
    return UNREADABLE if num_failed else 0


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
    return [speaker_of(captioner, adapter, config.prompt) for adapter in adapters]


# --- where captions go ----------------------------------------------------------------------

Writer = Callable[[Captioned], None]


def _open_writers(
    config: CaptionConfig, images: Sequence[Path], stack: ExitStack
) -> tuple[list[Writer], list[int]]:
    """What writes an outcome wherever it shall go, and the numbers of the images that lack one."""
    names = list(config.adapter) if len(config.adapter) > 1 else []
    writers: list[Writer] = [lambda outcome: _print(outcome, names)]
    left = set()
    if config.txt:
        _check_no_name_twice(images)
        left |= {
            number for number, image in enumerate(images)
            if config.overwrite or not image.with_suffix(".txt").exists()
        }
        writers.append(_write_beside)
    if config.out is not None:
        path = Path(config.out)
        is_csv = path.suffix.lower() == ".csv"
        done = set() if config.overwrite else _done(path, is_csv)
        left |= {number for number, image in enumerate(images) if str(image) not in done}
        file = stack.enter_context(open(
            path, "w" if config.overwrite else "a", encoding="utf-8", errors="backslashreplace",
            newline="",
        ))
        columns = ["image", *(["adapter"] if names else []), "caption"]
        if is_csv and file.tell() == 0:
            csv.writer(file).writerow(columns)
        write = _write_csv if is_csv else _write_json
        writers.append(
            lambda outcome: None if outcome.image in done else write(outcome, names, file)
        )
    if not (config.txt or config.out):
        left = set(range(len(images)))
    return writers, sorted(left)


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
        tqdm.write("\t".join(line.values()), file=sys.stdout)
    sys.stdout.flush()


def _write_json(outcome: Captioned, names: Sequence[str], file: TextIO) -> None:
    for line in _said(outcome, names):
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _write_csv(outcome: Captioned, names: Sequence[str], file: TextIO) -> None:
    csv.writer(file).writerows(line.values() for line in _said(outcome, names))
    file.flush()


def _write_beside(outcome: Captioned) -> None:
    path = Path(outcome.image).with_suffix(".txt")
    path.write_text(outcome.captions[0].text + "\n", encoding="utf-8")


def _check_no_name_twice(images: Sequence[Path]) -> None:
    owners: dict[Path, Path] = {}
    for image in images:
        other = owners.setdefault(image.with_suffix(".txt"), image)
        if other != image:
            raise ValueError(
                f"--txt would write the captions of {other} and {image} into one file; rename one"
            )


def _done(path: Path, is_csv: bool) -> set[str]:
    """The images that a file of captions names; a last line that was cut short is removed.

    Raises ValueError if it is another kind of file.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = whole.decode("utf-8").splitlines()
        if is_csv:
            rows = list(csv.DictReader(lines))
        else:
            rows = [json.loads(line) for line in lines]
        done = {row["image"] for row in rows if row["caption"] is not None}
    except (ValueError, KeyError, TypeError) as error:
        kind = "CSV with the columns image and caption" if is_csv else "JSON lines of captions"
        raise ValueError(
            f"--out {path} holds something else than {kind} ({error}); name another file, or "
            f"--overwrite it"
        ) from None
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return done
