"""Load a base model, and adapters merged into copies of it."""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.lora.adapter import (
    Adapter,
    beyond_lora,
    load_adapter,
    naming_base,
    read_adapter,
)
from lora_engine.lora.adapter_config import CONFIG_FILE, AdapterError
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.lora.checkpoint_merge import Checkpoint, merged_tensors
from lora_engine.lora.injection import merge
from lora_engine.lora.patterns import PatternError
from lora_engine.models import CaptioningModel
from lora_engine.models.families import FAMILIES
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.models.weights import read_checkpoint

logger = logging.getLogger(__name__)


def load_captioners(
    model: str | Path | None,
    adapters: Sequence[str | Path],
    *,
    family: str | None = None,
    revision: str | None = None,
    prompt: str | None = None,
    force: bool = False,
) -> tuple[Captioner, list[Captioner]]:
    """Load a base model -> its captioner, and one with each of the adapters.

    `adapters` are what `find_adapter` accepts. Without a `prompt`, each captioner continues the one
    that its adapter was trained with, and the base that of the first adapter. Raises ValueError as
    `load_base` and `with_adapter` do.
    """
    found = [read_adapter(find_adapter(name)) for name in adapters]
    base = load_base(model, found, family=family, revision=revision)
    base.prompt = prompt or ""
    if prompt is None and found:
        base.prompt = found[0].prompt
    return base, [with_adapter(base, adapter, prompt=prompt, force=force) for adapter in found]


def load_base(
    model: str | Path | None,
    adapters: Sequence[Adapter],
    *,
    family: str | None = None,
    revision: str | None = None,
) -> Captioner:
    """Load `model`, or else the base model that the adapters were trained on.

    Raises ValueError if nothing names a model, if the adapters name different ones or one that
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
        # A name that is no absolute path means a repository on the Hub.
        if model is not None and not Path(model).is_absolute() and Path(model).exists():
            raise ValueError(
                f"the adapter in {adapters[0].folder} names its base model {model!r}, which is also"
                f" a path in the current folder; to use that folder give it as the model (--model),"
                f" or run this elsewhere to load {model!r} from the Hub"
            )
    if model is None:
        raise ValueError(
            "no model to load: give a model (--model), an adapter (--adapter), or both (an adapter "
            "that does not name its base model needs a model)"
        )
    if Path(model, "metrics.jsonl").exists() or Path(model, CONFIG_FILE).exists():
        what = "of a run" if Path(model, "metrics.jsonl").exists() else "of an adapter"
        raise ValueError(f"{model} is the folder {what}; give it as the adapter (--adapter)")
    captioner = load_captioner(model, family=family, revision=revision)
    for adapter in adapters:
        base_class = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
        if base_class not in (None, captioner.hugging_face_class):
            raise ValueError(
                f"the adapter in {adapter.folder} is for {base_class}, but {model} is "
                f"{captioner.hugging_face_class or captioner.family}; omit the model to use the "
                f"adapter's own base model ({adapter.base_model})"
            )
    return captioner


def check_base(captioner: Captioner, adapter: Adapter, *, force: bool) -> None:
    """Raises AdapterError if the adapter was trained on another base; with `force` only warns."""
    complaint = adapter.foreign_base(captioner.name, captioner.fingerprints)
    if complaint is None:
        return
    if not force:
        raise AdapterError(
            f"{complaint}; load its own base model (--model), or accept this one with --force"
        )
    logger.warning(f"{complaint}; expect worse captions")


def with_adapter(
    captioner: Captioner, adapter: Adapter, *, prompt: str | None = None, force: bool = False
) -> Captioner:
    """A captioner with the adapter merged into its own copy of the weights; others are shared.

    So is the encoder, unless the adapter changes it. The captioner continues the adapter's prompt
    unless another one is given. Raises AdapterError if the adapter does not fit, and as
    `check_base`.
    """
    with naming_base(adapter, captioner.name):
        if beyond_lora(captioner.model, adapter):
            model = with_tensors(captioner, adapted_tensors(captioner, adapter))
        else:
            model = sharing_weights(captioner.model)
            load_adapter(model, adapter)
            merge(model)
    check_base(captioner, adapter, force=force)
    return dataclasses.replace(
        captioner, model=model, prompt=adapter.prompt if prompt is None else prompt
    )


def sharing_weights(model: CaptioningModel) -> CaptioningModel:
    """A copy of a model to inject adapters into: encoder and weights are those of `model`."""
    shared: dict[int, Any] = {id(model.encoder): model.encoder}
    shared |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- adapters that LoRA layers cannot hold (`adapter.beyond_lora`) ---------------------------


def adapted_tensors(captioner: Captioner, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the captioner's checkpoint that an adapter changes, as `merged_tensors`."""
    model, family = captioner.model, FAMILIES[captioner.family]
    checkpoint = Checkpoint(
        read_checkpoint(captioner.folder),
        model_class=type(model).__name__,
        tied_head=model.tied_head,
        head_biases=family.head_biases,
        transposed=model.lora_scope if model.fan_in_fan_out else "",
        other_names=family.other_names,
        unused=family.unused,
    )
    try:
        return merged_tensors(adapter, checkpoint)
    except PatternError as error:
        raise AdapterError(f"{adapter.folder / CONFIG_FILE}: {error}") from None


def with_tensors(captioner: Captioner, changed: Mapping[str, Tensor]) -> CaptioningModel:
    """A copy of the captioner's model with other tensors of its checkpoint; the rest is shared.

    The encoder is shared, too, unless it changes. Raises AdapterError if it changes position
    embeddings that were interpolated when the captioner was loaded.
    """
    base, convert = captioner.model, FAMILIES[captioner.family].convert_state
    tensors = read_checkpoint(captioner.folder)
    before, after = convert(dict(tensors)), convert(tensors | dict(changed))
    names = [
        name for name in after if name not in before or not torch.equal(after[name], before[name])
    ]
    if any(after[name].shape != base.get_parameter(name).shape for name in names):
        raise AdapterError(
            "the adapter replaces position embeddings, which are interpolated here for images of "
            "another size; merge it with PEFT (merge_and_unload, then save_pretrained), and use "
            "the result as --model"
        )
    encoder = {id(parameter) for parameter in base.encoder.parameters()}
    changes_encoder = any(id(base.get_parameter(name)) in encoder for name in names)
    shared: dict[int, Any] = {} if changes_encoder else {id(base.encoder): base.encoder}
    shared |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    for name in names:
        tensor, (path, _, leaf) = after[name].to(base.get_parameter(name)), name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    return model
