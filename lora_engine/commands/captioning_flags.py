"""What the captioning commands share: flags, and lists of skipped images."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from lora_engine.captioning.captioner import (
    Captioned,
    by_encoder,
    caption_images,
    side_by_side,
)
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.config import Range, check_ranges
from lora_engine.data.image_table import ImageTable
from lora_engine.data.packed_strings import encoded
from lora_engine.data.rows import MAX_ROWS_SHOWN, BadRow
from lora_engine.data.workers import default_num_workers
from lora_engine.devices import (
    disable_tf32,
    dtype_name,
    resolve_device,
    resolve_dtype,
    set_threads,
    use_device,
)
from lora_engine.features.precision import cast_weights
from lora_engine.features.source import open_features
from lora_engine.features.store import cache_folder
from lora_engine.files import replaced_file
from lora_engine.models.pretrained import Captioner
from lora_engine.models.weights import fingerprint
from lora_engine.ranks import Ranks, check_equal
from lora_engine.terminal import printable
from lora_engine.version import __version__

# These may differ between machines: only the content of the files that they name must be equal.
_OF_A_MACHINE = frozenset((
    "model", "adapter", "data", "images", "image_root", "out", "coco_out", "cache_dir", "device",
    "num_threads", "num_workers",
))


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """The flags of every command that captions images."""

    model: str | None = None
    """Base model: a folder or a Hub name. Default: the model that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub model."""
    batch_size: Annotated[int, Range(ge=1)] = 16
    """Images per batch."""
    prompt: str | None = None
    """Words for the captions to continue, not repeated in them. Default: the prompt that the
    adapter was trained with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of matmuls. auto: bf16 (fp16 on older GPUs) on CUDA, otherwise fp32."""
    encoder_precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Number format of the image encoder. auto: that of --precision; bf16 and int8 (on a CPU) are
    faster and less exact. Give the one of the training run to use the features that it kept."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: CUDA if available."""
    cache: Literal["auto", "off", "memory", "disk"] = "auto"
    """Where image features are kept. disk: in --cache_dir, which training uses too, so that images
    encoded before are not encoded again; auto: on disk from 16 images on, where that is faster than
    encoding; off and memory: not beyond this command."""
    cache_dir: str | None = None
    """Folder for features, best on a local disk. Default: $XDG_CACHE_HOME/lora_engine or
    ~/.cache/lora_engine."""
    cache_dtype: Literal["fp32", "bf16", "int8"] | None = None
    """Number format of kept features. Default: fp32 with --precision fp32, otherwise bf16."""
    cache_limit_gb: Annotated[float, Range(ge=0)] = 50.0
    """Maximum size of the cache folder."""
    num_workers: Annotated[int | None, Range(ge=0)] = None
    """Workers of each process that load images. Default with a GPU: half of the processors, divided
    by the processes of the machine, at most 8; otherwise 0."""
    num_threads: Annotated[int | None, Range(ge=1, le=1024)] = None
    """Threads of each process on a CPU. Default: PyTorch's choice, usually all processors, divided
    by the processes of the machine."""
    worker_timeout: Annotated[float, Range(ge=1)] = 300.0
    """Seconds to wait for images before the command gives up."""
    force: bool = False
    """Accept a base model whose weights, configuration, tokenizer or preprocessor differ from those
    that the adapter was trained on."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value out of range."""
        check_ranges(self)

    def device_of(self, ranks: Ranks) -> torch.device:
        """The device of this process. Raises ValueError if it does not exist."""
        return resolve_device(
            self.device, local_rank=ranks.local_rank, local_size=ranks.local_size
        )

    def take_share(self, ranks: Ranks) -> None:
        """Use this process' device, and its share of the machine's threads."""
        use_device(self.device_of(ranks))
        set_threads(self.num_threads, ranks.local_size)

    def check_same(self, images: ImageTable, ranks: Ranks) -> None:
        """Raises ValueError if a process has other settings or images than rank 0."""
        if ranks.size == 1:
            return
        device = self.device_of(ranks)
        settings = {
            f"--{name}": value for name, value in asdict(self).items()
            if name not in _OF_A_MACHINE
        }
        check_equal(ranks, {
            "lora_engine": __version__,
            "torch": torch.__version__,
            "kind of device": device.type,
            "compute dtype": dtype_name(resolve_dtype(self.precision, device)),
            "threads": torch.get_num_threads(),
            **settings,
            "number of images": len(images),
            "names of images": _digest(images),
        })

    @contextmanager
    def captions(
        self,
        captioners: Sequence[Captioner],
        images: ImageTable,
        settings: Sequence[GenerationSettings],
        *,
        ranks: Ranks,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Iterator[Captioned]]:
        """Captions of images by captioners, as the flags ask, while open.

        Those that share an encoder share its features. `settings` and `numbers` are those of
        `caption_images`. Raises ValueError if a process has other weights than rank 0.
        """
        device = self.device_of(ranks)
        groups = by_encoder(captioners)  # before anything is cast
        disable_tf32()  # as in training, whose features these may be
        for captioner in captioners:
            cast_weights(
                captioner.model, resolve_dtype(self.precision, device), self.encoder_precision
            )
            captioner.model.to(device)
        with ExitStack() as stack:
            by_group = [
                stack.enter_context(self._captions(
                    [captioners[number] for number in group], images, settings,
                    device=device, ranks=ranks, numbers=numbers,
                ))
                for group in groups
            ]
            if ranks.size > 1:  # nothing is written before all of them are ready
                check_equal(ranks, _weights(captioners))
            yield (
                side_by_side(results, groups, settings)
                for results in zip(*by_group, strict=True)
            )

    @contextmanager
    def _captions(
        self,
        captioners: Sequence[Captioner],
        images: ImageTable,
        settings: Sequence[GenerationSettings],
        *,
        device: torch.device,
        ranks: Ranks,
        numbers: Sequence[int] | None,
    ) -> Iterator[Iterator[Captioned]]:
        """Captions of images by captioners that share an encoder."""
        with (
            open_features(
                captioners[0],
                device=device,
                dtype=resolve_dtype(self.precision, device),
                num_images=len(images),
                cache=self.cache,
                cache_dir=cache_folder(self.cache_dir),
                cache_dtype=self.cache_dtype,
                cache_limit_bytes=self.cache_limit_gb * 1e9,
                encoder_precision=self.encoder_precision,
                used_once=True,
                ranks=ranks,
            ) as features,
            closing(caption_images(
                captioners,
                images,
                features=features,
                settings=settings,
                batch_size=self.batch_size,
                num_workers=default_num_workers(device, self.num_workers, ranks.local_size),
                timeout_s=self.worker_timeout,
                numbers=numbers,
                ranks=ranks,
            )) as captioned,
        ):
            yield captioned


def _weights(captioners: Sequence[Captioner]) -> dict[str, Any]:
    """What identifies the models: digests of the base and of each model, and prompts."""
    return {
        **captioners[0].fingerprints,
        "weights": [fingerprint(captioner.model) for captioner in captioners],
        "prompts": [captioner.prompt for captioner in captioners],
    }


def _digest(images: ImageTable) -> str:
    """A digest of the images' names without their folders."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(encoded(f"{os.path.basename(image)}\n"))
    return digest.hexdigest()[:12]


class SkippedImages:
    """Names the images that cannot be read, and lists them in skipped.jsonl next to `out`.

    Skipped rows of an annotation file come first.
    """

    def __init__(self, out: str | None, bad_rows: Sequence[BadRow] = ()) -> None:
        self.path = None if out is None else Path(out).with_name("skipped.jsonl")
        self.lines: list[dict[str, str | None]] = [
            {"row": bad.location, "reason": bad.reason} for bad in bad_rows
        ]
        self.num_rows = len(bad_rows)
        for bad in bad_rows[:MAX_ROWS_SHOWN]:
            print(printable(f"skipped {bad}"), file=sys.stderr)

    def add(self, outcome: Captioned) -> None:
        print(printable(f"skipped {outcome.image}: {outcome.reason}"), file=sys.stderr)
        self.lines.append({"image": outcome.image, "reason": outcome.reason})

    def finish(self) -> None:
        """Print their number and write the list."""
        if not self.lines:
            return
        where = "" if self.path is None else f"; {self.path} lists them"
        counts = {
            "rows could not be used": self.num_rows,
            "images could not be read": len(self.lines) - self.num_rows,
        }
        parts = [f"{number} {what}" for what, number in counts.items() if number]
        print(printable(f"{', '.join(parts)}{where}"), file=sys.stderr)
        if self.path is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            with replaced_file(self.path) as new:
                new.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(flag: str, path: str | None, *, inputs: Sequence[str] = ()) -> None:
    """Raises ValueError, before any work is done, if a file cannot be written at `path`, or would
    replace one of the `inputs`."""
    if path is None:
        return
    out = Path(path)
    if out.exists() and not out.is_file():
        raise ValueError(f"{flag} {out} is not a regular file; give one that may be replaced")
    if any(out.exists() and os.path.exists(path) and out.samefile(path) for path in inputs):
        raise ValueError(f"{flag} {out} would replace the data; give another file")
    if not out.parent.is_dir():
        raise ValueError(f"{flag} {out}: there is no folder {out.parent}; create it first")
