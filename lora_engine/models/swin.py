"""The frozen Swin encoder (arXiv:2103.14030): attention within windows, which shift by half.

Stages of layers; behind each stage but the last, every four neighboring patches become one of twice
the width. A layer's attention and feed-forward block are those of vit.py.

Axes: B batch, P image tokens (patches), D width, N windows of an image, L patches of a window, H
heads.
"""

import re
from collections.abc import Sequence
from reprlib import repr as shortened
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lora_engine.lora.layer import project
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.config_values import (
    fraction,
    ratio,
    valid_activation,
    valid_image_size,
    valid_num_heads,
    whole_number,
)
from lora_engine.models.vit import EncoderLayer, join_qkv, relative_positions, rename

# Regular expressions over Hugging Face's names below the encoder, with layers numbered as here.
_LAYER = r"layers\.(\d+)\."
RENAMES = [
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embedding."),
    (r"embeddings\.position_embeddings$", "position_embedding"),
    (r"embeddings\.norm\.", "patch_norm."),
    (rf"{_LAYER}layernorm_before\.", r"layers.\1.layer.norm1."),
    (rf"{_LAYER}layernorm_after\.", r"layers.\1.layer.norm2."),
    (rf"{_LAYER}attention\.self\.relative_position_bias_table", r"layers.\1.layer.position_bias"),
    (rf"{_LAYER}attention\.self\.(query|key|value)\.", r"layers.\1.layer.\2."),
    (rf"{_LAYER}attention\.output\.dense\.", r"layers.\1.layer.projection."),
    (rf"{_LAYER}intermediate\.dense\.", r"layers.\1.layer.fc1."),
    (rf"{_LAYER}output\.dense\.", r"layers.\1.layer.fc2."),
    (rf"{_LAYER}downsample\.norm\.", r"layers.\1.merge_norm."),
    (rf"{_LAYER}downsample\.reduction\.", r"layers.\1.merge."),
    (r"layernorm\.", "norm."),
]


class WindowedLayer(nn.Module):
    """A layer on a grid of patches, in windows of `window` x `window`, moved by `shift`.

    With `merges`, its outputs are a grid of half the height and width, and twice the width D.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        grid: tuple[int, int],
        window: int,
        shift: int,
        merges: bool,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        self.layer = EncoderLayer(
            width, num_heads, mlp_width, num_biases=(2 * window - 1) ** 2, **settings
        )
        self.merge_norm = nn.LayerNorm(4 * width) if merges else None
        self.merge = nn.Linear(4 * width, 2 * width, bias=False) if merges else None

    def forward(self, x: Tensor) -> Tensor:  # (B, P, D) -> (B, P, D) or (B, P / 4, 2 D)
        x = x + self._attention(self.layer.norm1(x))
        x = x + self.layer.feed_forward(self.layer.norm2(x))
        if self.merge_norm is None or self.merge is None:
            return x
        x = rearrange(x, "b (y x) d -> b y x d", y=self.grid[0])
        x = F.pad(x, (0, 0, 0, self.grid[1] % 2, 0, self.grid[0] % 2))
        x = rearrange(x, "b (y i) (x j) d -> b (y x) (j i d)", i=2, j=2)
        return project(self.merge_norm(x), self.merge)[0]

    def _attention(self, x: Tensor) -> Tensor:  # (B, P, D) -> (B, P, D)
        (height, width), window = self.grid, self.window
        x = rearrange(x, "b (y x) d -> b y x d", y=height)
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1:3]
        x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        x = rearrange(x, "b (y l) (x m) d -> (b y x) (l m) d", l=window, m=window)
        bias = self.layer.biases(relative_positions(window, window, device=x.device))[None]
        if self.shift:
            apart = self._apart(rows, columns, x.device)  # (N, L, L)
            bias = bias + apart[:, None] * -100.0
            bias = bias.repeat(len(x) // len(apart), 1, 1, 1)
        x = self.layer.attention(x, bias)
        x = rearrange(
            x, "(b y x) (l m) d -> b (y l) (x m) d", y=rows // window, x=columns // window, l=window
        )
        x = x.roll((self.shift, self.shift), dims=(1, 2))[:, :height, :width]
        return rearrange(x, "b y x d -> b (y x) d")

    def _apart(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Which pairs of patches only share a window because the grid was rolled -> (N, L, L)."""
        y, x = (
            sum((torch.arange(edge, device=device) >= edge - begin).long()
                for begin in (self.window, self.shift))
            for edge in (rows, columns)
        )
        regions = 3 * y[:, None] + x
        regions = rearrange(regions, "(y l) (x m) -> (y x) (l m)", l=self.window, m=self.window)
        return regions[:, None] != regions[:, :, None]


class SwinTransformer(nn.Module):
    """Pixels (B, 3, height, width) -> features (B, P, D) of the last stage, normed."""

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        image_size: tuple[int, int],
        patch_size: int,
        window: int,
        eps: float,
        act: str,
        qkv_bias: bool,
        has_positions: bool,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.patch_norm = nn.LayerNorm(width)
        grid = -(-image_size[0] // patch_size), -(-image_size[1] // patch_size)
        self.position_embedding = (
            nn.Parameter(torch.zeros(1, grid[0] * grid[1], width)) if has_positions else None
        )
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            if min(grid) < window:
                raise ValueError(
                    f"stage {stage} has {grid[0]} x {grid[1]} patches, fewer than a window of "
                    f"{window} x {window}; expected an image size or window_size that fits"
                )
            is_last = stage == len(depths) - 1
            for number in range(depth):
                self.layers.append(WindowedLayer(
                    width, heads, int(mlp_ratio * width), grid=grid, window=window,
                    shift=window // 2 if number % 2 and min(grid) > window else 0,
                    merges=number == depth - 1 and not is_last,
                    eps=eps, act=act, qkv_bias=qkv_bias,
                ))
            if not is_last:
                width, grid = 2 * width, ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        self.width, self.num_tokens = width, grid[0] * grid[1]
        self.norm = nn.LayerNorm(width, eps=eps)

    def describe(self) -> dict[str, Any]:
        """What the features depend on besides the weights."""
        layer = self.layers[0].layer
        return {
            "num_heads": [layer.layer.num_heads for layer in self.layers],
            "eps": layer.norm1.eps,
            "activation": next(name for name, act in ACTIVATIONS.items() if act is layer.act),
        }

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = self.image_size
        patch_size = self.patch_embedding.kernel_size[0]
        pixel_values = F.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
        x = self.patch_norm(rearrange(self.patch_embedding(pixel_values), "b d y x -> b (y x) d"))
        if self.position_embedding is not None:
            x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def from_config(config: Any) -> SwinTransformer:
    """The encoder of a transformers `SwinConfig`; raises ValueError for a value out of range."""
    width, size = whole_number(config, "embed_dim", "width"), config.image_size
    depths, heads = list(config.depths), list(config.num_heads)
    if not depths or len(depths) != len(heads) or not all(
        type(depth) is int and 1 <= depth <= 100 for depth in depths
    ) or len(depths) > 8:
        raise ValueError(
            f"depths are {shortened(depths)}, num_heads {shortened(heads)}; expected up to 8 "
            f"numbers each, of 1 to 100 layers"
        )
    return SwinTransformer(
        width=width,
        depths=depths,
        num_heads=[valid_num_heads(n, width * 2**stage) for stage, n in enumerate(heads)],
        mlp_ratio=ratio(config, "mlp_ratio"),
        image_size=valid_image_size(size if isinstance(size, (list, tuple)) else (size, size)),
        patch_size=whole_number(config, "patch_size", "image_size"),
        window=whole_number(config, "window_size", "image_size"),
        eps=fraction(config, "layer_norm_eps"),
        act=valid_activation(config.hidden_act),
        qkv_bias=config.qkv_bias,
        has_positions=config.use_absolute_embeddings,
    )


def convert_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors of a Swin under the names used here; unknown names are kept.

    Layers are numbered through all stages, and the last of a stage has its `downsample`.
    """
    found = {
        name: match for name in tensors
        if (match := re.match(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)\.)?", name))
    }
    depths: dict[int, int] = {}
    for match in found.values():
        stage, depth = int(match[1]), int(match[2] or 0) + 1
        depths[stage] = max(depths.get(stage, 0), depth)
    numbered = {}
    for name, tensor in tensors.items():
        if match := found.get(name):
            stage = int(match[1])
            layer = depths[stage] - 1 if match[2] is None else int(match[2])
            layer += sum(depth for earlier, depth in depths.items() if earlier < stage)
            name = f"layers.{layer}.{name[match.end():]}"
        numbered[name] = tensor
    state = rename(numbered, RENAMES)
    join_qkv(state)
    return state
