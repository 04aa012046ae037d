"""Values of a configuration, read with limits: a wrong one is a ValueError that names it."""

from reprlib import repr as shortened
from typing import Any

from lora_engine.models.activations import ACTIVATIONS

# Larger than any captioner. Beyond these limits, building the layers alone takes long.
LIMITS = {
    "width": 2**16, "layers": 500, "vocabulary": 2**22, "positions": 2**20, "image_size": 2**13,
}


def whole_number(config: Any, name: str, kind: str) -> int:
    """An integer from 1 to the limit of its `kind`."""
    value, most = getattr(config, name), LIMITS[kind]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{name} is {shortened(value)}; expected a whole number from 1 to {most:,}"
        )
    return value


def fraction(config: Any, name: str) -> float:
    """A number in [0, 1): an epsilon or a dropout probability."""
    value = getattr(config, name)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(
            f"{name} is {shortened(value)}; expected a number that is at least 0 and below 1"
        )
    return value


def ratio(config: Any, name: str) -> float:
    """A number above 0, up to 64: how many times as wide the feed-forward blocks are."""
    value = getattr(config, name)
    if type(value) not in (int, float) or not 0 < value <= 64:
        raise ValueError(f"{name} is {shortened(value)}; expected a number above 0, up to 64")
    return value


def valid_image_size(size: Any) -> tuple[int, int]:
    """(height, width)."""
    most = LIMITS["image_size"]
    if len(size) != 2 or not all(type(edge) is int and 1 <= edge <= most for edge in size):
        raise ValueError(
            f"image size {shortened(size)}; expected height and width from 1 to {most:,}"
        )
    return size[0], size[1]


def valid_num_heads(value: Any, width: int) -> int:
    """A number of heads that divides the width."""
    if type(value) is not int or value < 1 or width % value:
        raise ValueError(
            f"{shortened(value)} attention heads do not divide a width of {width}"
        )
    return value


def valid_activation(name: str) -> str:
    """A key of `ACTIVATIONS`."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation {shortened(name)} is not one of {', '.join(ACTIVATIONS)}")
    return name
