"""Dropout's masks. On a CPU torch's own draw costs as much as the layer that it is for."""

import torch
from torch import Tensor

_NUM_LEVELS = 2**16


def dropout_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """Which elements of x dropout keeps, bool in its shape, and their share on average.

    On a CPU `probability` is rounded to a multiple of 1/65536: sixteen random bits an element are
    drawn four times as fast as `bernoulli_` does. From the global generator, in any case.
    """
    if x.device.type != "cpu":
        share = 1.0 - probability
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(share), share
    num_dropped = min(round(probability * _NUM_LEVELS), _NUM_LEVELS - 1)
    draw = _draw_op if torch.compiler.is_compiling() else _draw
    return draw(x, num_dropped), 1.0 - num_dropped / _NUM_LEVELS


def kept_part(x: Tensor, kept: Tensor | None) -> Tensor:
    """x with zeros in the place of what is dropped; None drops nothing."""
    return x if kept is None else torch.where(kept, x, 0.0)


def _draw(x: Tensor, num_dropped: int) -> Tensor:
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    levels = words.view(torch.int16)[: x.numel()]
    return (levels >= num_dropped - _NUM_LEVELS // 2).view(x.shape)


# For the compiler, which has no way to look at numbers of one width as those of another.
_draw_op = torch.library.custom_op(
    "lora_engine::draw_mask", _draw, mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded,),
)
_draw_op.register_fake(lambda x, num_dropped: torch.empty_like(x, dtype=torch.bool))
