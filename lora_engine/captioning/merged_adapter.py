"""Captioners with an adapter merged into the tensors of their checkpoint.

For adapters that LoRA layers cannot hold: `adapter.beyond_lora`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.lora.adapter import Adapter
from lora_engine.lora.checkpoint_merge import Checkpoint, merged_tensors
from lora_engine.models import CaptioningModel
from lora_engine.models.families import FAMILIES
from lora_engine.models.pretrained import Captioner
from lora_engine.models.weights import read_checkpoint


def adapted_tensors(captioner: Captioner, adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the captioner's checkpoint that an adapter changes, as `merged_tensors`."""
    model, family = captioner.model, FAMILIES[captioner.family]
    return merged_tensors(adapter, Checkpoint(
        read_checkpoint(captioner.folder),
        model_class=type(model).__name__,
        tied_head=model.tied_head,
        head_biases=family.head_biases,
        transposed=model.lora_scope if model.fan_in_fan_out else "",
        other_names=family.other_names,
        unused=family.unused,
    ))


def with_tensors(captioner: Captioner, changed: Mapping[str, Tensor]) -> CaptioningModel:
    """A copy of the captioner's model with other tensors of its checkpoint; the rest is shared.

    The encoder is shared, too, unless it changes.
    """
    base, convert = captioner.model, FAMILIES[captioner.family].convert_state
    tensors = read_checkpoint(captioner.folder)
    before, after = convert(dict(tensors)), convert(tensors | dict(changed))
    names = [
        name for name in after if name not in before or not torch.equal(after[name], before[name])
    ]
    encoder = {id(parameter) for parameter in base.encoder.parameters()}
    changes_encoder = any(id(base.get_parameter(name)) in encoder for name in names)
    shared: dict[int, Any] = {} if changes_encoder else {id(base.encoder): base.encoder}
    shared |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    for name in names:
        tensor, (path, _, leaf) = after[name].to(base.get_parameter(name)), name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    return model
