"""What comes after training: python -m lora_engine VERB, also installed as lora-engine."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from lora_engine import cli
from lora_engine.adapter import load_adapter, read_adapter
from lora_engine.captioning import Captioned, caption_images
from lora_engine.devices import resolve_device, resolve_dtype
from lora_engine.files import replaced_file
from lora_engine.images import find_images
from lora_engine.lora import cast_frozen, merge
from lora_engine.pretrained import FAMILIES, Captioner, load_captioner

UNREADABLE = 1  # some images have no caption


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
    captioner, prompt = _load(config)
    cast_frozen(captioner.model, dtype)
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


def _load(config: CaptionConfig) -> tuple[Captioner, str]:
    """The captioner with its adapter merged, and the prompt."""
    adapter = read_adapter(config.adapter) if config.adapter else None
    name = config.model or (adapter.base_model if adapter else None)
    if name is None:
        raise ValueError(
            "no model to caption with: give --adapter, --model, or both (an adapter that does "
            "not say its base model needs --model)"
        )
    revision = config.revision
    if revision is None and adapter is not None and config.model is None:
        revision = adapter.config.get("revision")  # of the base model that it names
    captioner = load_captioner(name, revision=revision)
    if adapter is None:
        return captioner, config.prompt or ""
    base_class = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    expected = FAMILIES[captioner.family].hugging_face_class
    if base_class not in (None, expected):
        raise ValueError(
            f"the adapter in {config.adapter} is for {base_class}, but {name} is {expected}; leave "
            f"--model out to use the adapter's own base ({adapter.base_model})"
        )
    made_for = adapter.provenance.get("base_fingerprint", captioner.fingerprint)
    if made_for != captioner.fingerprint:
        print(
            f"warning: {config.adapter} was trained on a base model with other weights than "
            f"{name} has; expect worse captions",
            file=sys.stderr,
        )
    load_adapter(captioner.model, adapter)
    merge(captioner.model)
    return captioner, adapter.prompt if config.prompt is None else config.prompt


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


VERBS = {"caption": caption}


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
