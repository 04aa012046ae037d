"""What verbs share: a base model and the adapters that are asked for, ready to caption."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_engine.adapter import Adapter
from lora_engine.captioning import Speaker, with_adapter
from lora_engine.lora import cast_frozen
from lora_engine.pretrained import FAMILIES, Captioner, load_captioner


def load_base(
    model: str | None, revision: str | None, adapters: Sequence[Adapter]
) -> Captioner:
    """The captioner that is asked for, or the adapters' own base.

    Raises ValueError where nothing names a model, where adapters name different ones, and for an
    adapter of another family.
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


def foreign_base(captioner: Captioner, adapter: Adapter) -> str | None:
    """Says so if the adapter was trained on other weights; not every adapter tells on which."""
    if adapter.provenance.get("base_fingerprint") in (None, captioner.fingerprint):
        return None
    return (
        f"{adapter.folder} was trained on a base model with other weights than {captioner.name} "
        f"has (a copy in another number format counts as such)"
    )


def speaker_of(captioner: Captioner, adapter: Adapter, prompt: str | None) -> Speaker:
    """The captioner with an adapter, and that one's prompt unless another is given.

    Warns of an adapter that was trained on other weights.
    """
    complaint = foreign_base(captioner, adapter)
    if complaint:
        print(f"warning: {complaint}; expect worse captions", file=sys.stderr)
    return Speaker(
        with_adapter(captioner, adapter), adapter.prompt if prompt is None else prompt
    )


def place(speakers: Sequence[Speaker], device: torch.device, dtype: torch.dtype) -> None:
    for speaker in speakers:
        cast_frozen(speaker.captioner.model, dtype)
        speaker.captioner.model.to(device)
        speaker.captioner.model.eval()


def check_at_least_1(config: object, *names: str) -> None:
    """Raises ValueError naming the first of these flags that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be 1 or more")


def check_writable(flag: str, path: str | None) -> None:
    """Say before the work, and not after it, that a file cannot be written there."""
    if path is None:
        return
    out = Path(path)
    if out.exists() and not out.is_file():
        raise ValueError(f"{flag} {out} is not a regular file; name one that may be replaced")
    if not out.parent.is_dir():
        raise ValueError(f"{flag} {out}: there is no folder {out.parent}; make it first")
