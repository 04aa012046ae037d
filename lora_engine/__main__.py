"""What comes after training: python -m lora_engine VERB, also installed as lora-engine."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import numpy as np
import tyro

from lora_engine import cli, lora
from lora_engine.adapter import Adapter, load_adapter, read_adapter
from lora_engine.captioning import Captioned, caption_images
from lora_engine.devices import resolve_device, resolve_dtype
from lora_engine.files import replaced_file
from lora_engine.images import PixelSettings, find_images, load_pixels, to_pixels
from lora_engine.merging import check_out, export_merged
from lora_engine.pretrained import FAMILIES, Captioner, load_captioner

UNREADABLE = 1  # some images have no caption

NUM_DRAWN = 4  # images that a merged model is compared on where none are given


@dataclass(frozen=True)
class CaptionConfig:
    """Flags of `caption`."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, or folders of images."""
    adapter: str | None = None
    """Adapter folder, such as RUN/adapter; without one the base model captions."""
    model: str | None = None
    """Base model: folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub name."""
    out: str | None = None
    """Write {"image", "caption"} JSON lines to this file, too."""
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


def caption(args: list[str]) -> int:
    """Caption images, one line each on stdout -> exit status."""
    config = cli.parse(
        CaptionConfig, args, prog="python -m lora_engine caption",
        description="Caption images with a trained adapter.",
    )
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be 1 or more")
    if not config.images:
        raise ValueError("no images to caption: name image files, or folders of images")
    if config.out is not None:
        _check_out(Path(config.out))
    images = find_images(config.images)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    adapter = read_adapter(config.adapter) if config.adapter else None
    captioner = _load(adapter, config.model, config.revision)
    prompt = config.prompt or ""
    if adapter is not None:
        complaint = _foreign_base(captioner, adapter)
        if complaint:
            print(f"warning: {complaint}; expect worse captions", file=sys.stderr)
        lora.merge(captioner.model)
        prompt = adapter.prompt if config.prompt is None else config.prompt
    lora.cast_frozen(captioner.model, dtype)
    captioner.model.to(device)
    outcomes = caption_images(
        captioner,
        images,
        batch_size=config.batch_size,
        prompt=prompt,
        device=device,
        dtype=dtype,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    if config.out is None:
        return _print_captions(outcomes, None)
    with replaced_file(config.out) as new, open(
        new, "w", encoding="utf-8", errors="backslashreplace"
    ) as file:
        return _print_captions(outcomes, file)


def _check_out(path: Path) -> None:
    """Say before the work, and not after it, that a file cannot be written there."""
    if path.exists() and not path.is_file():
        raise ValueError(f"--out {path} is not a regular file; name one that may be replaced")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")


def _print_captions(outcomes: Iterable[Captioned], file: TextIO | None) -> int:
    num_failed = 0
    for outcome in outcomes:
        if outcome.caption is None:
            num_failed += 1
            print(f"skipped {outcome.image}: {outcome.reason}", file=sys.stderr)
            continue
        print(f"{outcome.image}\t{' '.join(outcome.caption.split())}", flush=True)
        if file is not None:
            line = {"image": outcome.image, "caption": outcome.caption}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if num_failed:
        print(f"{num_failed} images could not be read", file=sys.stderr)
    return UNREADABLE if num_failed else 0


@dataclass(frozen=True)
class MergeConfig:
    """Flags of `merge`."""

    adapter: str
    """Adapter folder, such as RUN/adapter."""
    out: str
    """New folder for the merged model; nothing is ever overwritten."""
    model: str | None = None
    """Base model: folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub name."""
    images: tuple[str, ...] = ()
    """Image files, or folders of images, to compare captions on. Default: four drawn scenes."""
    force: bool = False
    """Merge even into a base model with other weights than the adapter was trained on."""


def merge(args: list[str]) -> int:
    """Fold an adapter into its base, as a plain Hugging Face folder -> exit status."""
    config = cli.parse(
        MergeConfig, args, prog="python -m lora_engine merge",
        description="Fold an adapter into its base model, as a folder that needs no PEFT.",
    )
    check_out(Path(config.out))
    images = find_images(config.images)
    adapter = read_adapter(config.adapter)
    captioner = _load(adapter, config.model, config.revision)
    complaint = _foreign_base(captioner, adapter)
    if complaint and not config.force:
        raise ValueError(f"{complaint}; give its own with --model, or --force the merge")
    if complaint:
        print(f"warning: {complaint}", file=sys.stderr)
    parity = export_merged(
        captioner,
        config.out,
        pixels=_pixels_to_compare(images, captioner.pixels),
        prompt=adapter.prompt,
    )
    num_merged = sum(1 for _ in lora.lora_layers(captioner.model))
    print(
        f"merged {num_merged} weights of {captioner.name} with {config.adapter}\n"
        f"compared with base and adapter apart: {parity}\n"
        f"merged model  {config.out}\n"
        f"to load it    transformers.{FAMILIES[captioner.family].hugging_face_class}"
        f".from_pretrained({config.out!r})"
    )
    if adapter.prompt:
        print(f"its prompt    {adapter.prompt!r}: the folder does not say so, generation needs it")
    return 0


def _pixels_to_compare(images: Sequence[Path], settings: PixelSettings) -> np.ndarray:
    if images:
        return np.stack([load_pixels(image, settings) for image in images])
    from lora_engine.demo.scenes import draw, scene_at

    scenes = [draw(scene_at(index, seed=0)) for index in range(NUM_DRAWN)]
    return np.stack([to_pixels(scene, settings) for scene in scenes])


# --- a captioner with its adapter -----------------------------------------------------------


def _load(adapter: Adapter | None, model: str | None, revision: str | None) -> Captioner:
    """The captioner that is asked for, or the adapter's own base; with the adapter, not merged.

    Raises ValueError where neither names a model, and for an adapter of another family.
    """
    name = model or (adapter.base_model if adapter else None)
    if name is None:
        raise ValueError(
            "no model to load: give --adapter, --model, or both (an adapter that does not say its "
            "base model needs --model)"
        )
    if revision is None and adapter is not None and model is None:
        revision = adapter.config.get("revision")  # of the base model that it names
    captioner = load_captioner(name, revision=revision)
    if adapter is None:
        return captioner
    base_class = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    expected = FAMILIES[captioner.family].hugging_face_class
    if base_class not in (None, expected):
        raise ValueError(
            f"the adapter in {adapter.folder} is for {base_class}, but {name} is {expected}; leave "
            f"--model out to use the adapter's own base ({adapter.base_model})"
        )
    load_adapter(captioner.model, adapter)
    return captioner


def _foreign_base(captioner: Captioner, adapter: Adapter) -> str | None:
    """Says so if the adapter was trained on other weights; not every adapter tells on which."""
    if adapter.provenance.get("base_fingerprint") in (None, captioner.fingerprint):
        return None
    return (
        f"{adapter.folder} was trained on a base model with other weights than {captioner.name} "
        f"has (a copy in another number format counts as such)"
    )


VERBS = {"caption": caption, "merge": merge}


def run_verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        for name, verb in VERBS.items():
            print(f"  {name:<10} {(verb.__doc__ or '').split(' -> ')[0]}")
        print("\npython -m lora_engine VERB --help tells a verb's flags")
        return 0 if args else cli.USAGE_ERROR
    if args[0] not in VERBS:
        raise ValueError(f"there is no verb {args[0]!r}; known: {', '.join(VERBS)}")
    return VERBS[args[0]](args[1:])


def main() -> None:
    sys.exit(cli.run(run_verb))


if __name__ == "__main__":
    main()
