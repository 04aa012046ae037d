"""The frozen encoder in a lower precision than training: faster, and less exact.

bf16 rounds the weights and inputs of linear layers, and computes attention in bf16. int8 quantizes
the weights of linear layers once, with a scale for each output, and their inputs at every call,
with a scale for each image token (as in LLM.int8(), arXiv:2208.07339, but without keeping outliers
in floating point). Processors with VNNI multiply integers several times as fast. All else of an
int8 encoder stays in fp32.
"""

import copy
import logging
from typing import Literal

import torch
from torch import Tensor, nn

from lora_engine.devices import PRECISIONS, processor_supports
from lora_engine.lora.injection import cast_frozen
from lora_engine.models import CaptioningModel

logger = logging.getLogger(__name__)

EncoderPrecision = Literal["auto", "fp32", "bf16", "int8"]


def resolve_encoder_precision(
    precision: EncoderPrecision, device: torch.device, dtype: torch.dtype
) -> EncoderPrecision:
    """The precision of an encoder beside a decoder in `dtype`; "auto" is the decoder's own.

    Raises ValueError for int8 on a GPU. Warns where a processor computes in it slowly.
    """
    if not _is_own(precision, dtype):
        return "auto"
    if precision == "int8" and device.type != "cpu":
        raise ValueError(
            f"--encoder_precision int8 is for CPUs, and the device is {device}; give bf16"
        )
    is_reduced = precision in ("bf16", "int8")
    if device.type == "cpu" and is_reduced and not processor_supports(precision):
        logger.warning(
            f"--encoder_precision {precision}: this processor has no instructions for "
            f"{precision}, so the encoder is hardly faster than in fp32, or slower"
        )
    elif device.type == "cpu" and precision == "int8" and processor_supports("amx"):
        logger.warning(
            "--encoder_precision int8: this processor has AMX, with which bf16 is faster and "
            "closer to fp32 (benchmarks/LOG.md)"
        )
    return precision


def cast_weights(
    model: CaptioningModel, dtype: torch.dtype, precision: EncoderPrecision
) -> None:
    """Convert frozen weights to `dtype`, once; those of an encoder of another precision stay."""
    cast_frozen(model.decoder if _is_own(precision, dtype) else model, dtype)


def _is_own(precision: EncoderPrecision, dtype: torch.dtype) -> bool:
    """Whether the encoder's precision is another than the decoder's `dtype`."""
    return precision != "auto" and PRECISIONS.get(precision) != dtype


def in_precision(
    model: CaptioningModel, precision: EncoderPrecision, dtype: torch.dtype
) -> tuple[CaptioningModel, torch.dtype]:
    """A model with the encoder in `precision`, and the dtype of autocast to encode with.

    The model shares all that is not converted; "auto" is the model itself, in `dtype`.
    """
    if precision == "auto":
        return model, dtype
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(model.decoder)] = model.decoder  # type: ignore[assignment]
    model = copy.deepcopy(model, shared)
    if precision != "int8":
        cast_frozen(model.encoder, PRECISIONS[precision])
        return model, PRECISIONS[precision]
    for path, layer in list(model.encoder.named_modules()):
        if type(layer) is nn.Linear:
            model.encoder.set_submodule(path, Int8Linear(layer))
    return model, torch.float32


class Int8Linear(nn.Module):
    """A frozen linear layer on a CPU, with weights and inputs in int8.

    X W^T + b is approximated by (Q_x Q_w^T) * s_x s_w + b, where a row of X is Q_x s_x, and a row
    of W is Q_w s_w: the largest value of each row becomes 127.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight, scale = _quantized(base.weight.detach().float())
        self.register_buffer("weight", weight.T)  # (in, out)
        self.register_buffer("scale", scale[:, 0])  # (out,)
        self.register_buffer(
            "bias", scale.new_zeros(len(scale)) if base.bias is None else base.bias.detach().float()
        )

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out) in fp32
        rows, scale = _quantized(x.flatten(0, -2).float())
        out = torch._int_mm(rows, self.weight).float().mul_(scale)
        return torch.addcmul(self.bias, out, self.scale).unflatten(0, x.shape[:-1])


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, N) as int8, and their scales (M, 1)."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30).div_(127)
    return (rows / scale).round_().to(torch.int8), scale
