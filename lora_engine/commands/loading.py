"""What verbs share: a base model with the adapters that are asked for, and how they caption."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_engine.captioning.captioner import Captioned, Speaker, caption_images, with_adapter
from lora_engine.data.rows import MAX_ROWS_SHOWN, BadRow
from lora_engine.data.workers import default_num_workers
from lora_engine.devices import resolve_device, resolve_dtype
from lora_engine.files import replaced_file
from lora_engine.lora.adapter import Adapter
from lora_engine.lora.injection import cast_frozen
from lora_engine.models.pretrained import FAMILIES, Captioner, load_captioner
from lora_engine.terminal import printable


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """The flags of every verb that captions."""

    model: str | None = None
    """Base model: folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub name."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int = 30
    """Longest caption, in tokens."""
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
    worker_timeout: float = 300.0
    """Seconds to wait for images until the command ends."""
    force: bool = False
    """Use adapters even on a base model with other weights, configuration, tokenizer or
    preprocessor than they were trained on."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value out of range."""
        at_least = {"num_beams": 1, "max_new_tokens": 1, "batch_size": 1, "num_workers": 0,
                    "worker_timeout": 1}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"--{name} is {value}; it must be {lowest} or more")
        resolve_device(self.device)

    def caption(
        self, speakers: Sequence[Speaker], images: Sequence[str | Path], **settings
    ) -> Iterator[Captioned]:
        """Caption images as the flags say; `settings` are further ones of `caption_images`."""
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.precision, device)
        for speaker in speakers:
            cast_frozen(speaker.captioner.model, dtype)
            speaker.captioner.model.to(device)
        return caption_images(
            speakers,
            images,
            batch_size=self.batch_size,
            num_workers=default_num_workers(device, self.num_workers),
            timeout_s=self.worker_timeout,
            device=device,
            dtype=dtype,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            **settings,
        )


def load_base(
    model: str | None, revision: str | None, adapters: Sequence[Adapter]
) -> Captioner:
    """The captioner that is asked for, or the adapters' own base.

    Raises ValueError where nothing names a model, where adapters name different ones or one that
    depends on the current folder, and for an adapter of another family.
    """
    bases = {(adapter.base_model, adapter.config.get("revision")) for adapter in adapters}
    if model is None and len(bases) > 1:
        raise ValueError(
            f"the adapters were trained on different models "
            f"({', '.join(sorted(str(name) for name, _ in bases))}); give one with --model"
        )
    if model is None and bases:
        model, its_revision = bases.pop()
        revision = its_revision if revision is None else revision
        # A name without a machine's folders in it means a repository on the Hub.
        if model is not None and not Path(model).is_absolute() and Path(model).exists():
            raise ValueError(
                f"the adapter in {adapters[0].folder} names its base model {model!r}, which is also"
                f" a path in the current folder; give the folder with --model if it is the one, or "
                f"run this elsewhere to take {model!r} from the Hub"
            )
    if model is None:
        raise ValueError(
            "no model to load: give --adapter, --model, or both (an adapter that does not say its "
            "base model needs --model)"
        )
    captioner = load_captioner(model, revision=revision)
    expected = FAMILIES[captioner.family].hugging_face_class
    for adapter in adapters:
        base_class = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
        if base_class not in (None, expected):
            raise ValueError(
                f"the adapter in {adapter.folder} is for {base_class}, but {model} is {expected}; "
                f"leave --model out to use the adapter's own base ({adapter.base_model})"
            )
    return captioner


def check_base(captioner: Captioner, adapter: Adapter, *, force: bool) -> None:
    """Raises ValueError if the adapter was trained on another base; with `force` it is a warning.
    """
    complaint = adapter.foreign_base(captioner.name, captioner.fingerprints)
    if complaint is None:
        return
    if not force:
        raise ValueError(f"{complaint}; give its own base with --model, or --force it")
    print(printable(f"warning: {complaint}; expect worse captions"), file=sys.stderr)


def speaker_of(
    captioner: Captioner, adapter: Adapter, prompt: str | None, *, force: bool
) -> Speaker:
    """The captioner with an adapter, and that one's prompt unless another is given.

    Raises ValueError as `with_adapter` and `check_base` do.
    """
    adapted = with_adapter(captioner, adapter)
    check_base(captioner, adapter, force=force)
    return Speaker(adapted, adapter.prompt if prompt is None else prompt)


class SkippedImages:
    """Names the images that cannot be read, and lists them in skipped.jsonl beside `out`, behind
    rows of an annotation file that are skipped."""

    def __init__(self, out: str | None, bad_rows: Sequence[BadRow] = ()) -> None:
        self.path = None if out is None else Path(out).with_name("skipped.jsonl")
        self.lines: list[dict[str, str | None]] = [
            {"row": bad.place, "reason": bad.reason} for bad in bad_rows
        ]
        self.num_rows = len(bad_rows)
        for bad in bad_rows[:MAX_ROWS_SHOWN]:
            print(printable(f"skipped {bad}"), file=sys.stderr)

    def add(self, outcome: Captioned) -> None:
        print(printable(f"skipped {outcome.image}: {outcome.reason}"), file=sys.stderr)
        self.lines.append({"image": outcome.image, "reason": outcome.reason})

    def finish(self) -> None:
        """Say how many they are, and list them."""
        if not self.lines:
            return
        where = "" if self.path is None else f"; {self.path} lists them"
        counts = {
            "rows could not be used": self.num_rows,
            "images could not be read": len(self.lines) - self.num_rows,
        }
        told = [f"{number} {what}" for what, number in counts.items() if number]
        print(printable(f"{', '.join(told)}{where}"), file=sys.stderr)
        if self.path is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
            with replaced_file(self.path) as new:
                new.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(flag: str, path: str | None) -> None:
    """Say before the work, and not after it, that a file cannot be written there."""
    if path is None:
        return
    out = Path(path)
    if out.exists() and not out.is_file():
        raise ValueError(f"{flag} {out} is not a regular file; name one that may be replaced")
    if not out.parent.is_dir():
        raise ValueError(f"{flag} {out}: there is no folder {out.parent}; make it first")
