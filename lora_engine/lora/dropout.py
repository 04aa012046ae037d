"""Dropout masks. On a CPU, torch's own draw would cost as much as the layer itself."""

import torch
from torch import Tensor

from lora_engine.lora.matmul import is_on_cpu

_NUM_LEVELS = 2**16


def dropout_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """A bool mask of the elements of x that dropout keeps, and the expected share that it keeps.

    Both devices use the global generator. On a CPU, `probability` is rounded to a multiple of
    1/65536: drawing sixteen random bits per element is four times as fast as `bernoulli_`.
    """
    if x.device.type != "cpu":
        share = 1.0 - probability
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(share), share
    num_dropped = min(round(probability * _NUM_LEVELS), _NUM_LEVELS - 1)
    draw = _draw_op if torch.compiler.is_compiling() else _draw
    return draw(x, num_dropped), 1.0 - num_dropped / _NUM_LEVELS


def kept_part(x: Tensor, kept: Tensor | None) -> Tensor:
    """x with zeros for dropped elements; a mask of None drops nothing."""
    if kept is None:
        return x
    # On a GPU `where` would first fill a tensor with the zero, by a kernel of its own. (A product
    # keeps NaN and makes infinity NaN, but these make the step's gradients not finite anyway.)
    return torch.where(kept, x, 0.0) if is_on_cpu(x) else x * kept


def add_kept_part(total: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """total += kept_part(x, kept), in place."""
    if is_on_cpu(x):
        return total.add_(kept_part(x, kept))
    return total.addcmul_(x, kept)


def _draw(x: Tensor, num_dropped: int) -> Tensor:
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    levels = words.view(torch.int16)[: x.numel()]
    return (levels >= num_dropped - _NUM_LEVELS // 2).view(x.shape)


# For torch.compile, which cannot reinterpret integers of one width as those of another.
_draw_op = torch.library.custom_op(
    "lora_engine::draw_mask", _draw, mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
_draw_op.register_fake(lambda x, num_dropped: torch.empty_like(x, dtype=torch.bool))
