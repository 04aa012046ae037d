"""The frozen image encoder: a pre-norm Vision Transformer (arXiv:2010.11929) and its relatives.

One implementation serves BLIP's encoder and transformers' ViT, DeiT, CLIP (arXiv:2103.00020), BEiT
(arXiv:2106.08254) and DINOv2 (arXiv:2304.07193); `RENAMES` maps their names to the names here.
Query, key and value are one linear layer, as in BLIP: one matmul instead of three. Nothing here is
trained, and no published encoder has dropout.

Axes: B batch, P image tokens (class token, DeiT's distillation token or DINOv2's registers,
patches), D width, H heads, K head width.
"""

import re
from reprlib import repr as shortened
from typing import Any, Literal

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

# Regular expressions over Hugging Face's names below the encoder, and their replacements.
_LAYER = r"encoder\.layers?\.(\d+)\."
RENAMES = [
    (r"embeddings\.class_embedding", "class_token"),
    (r"embeddings\.(cls_token|distillation_token|register_tokens)", r"\1"),
    (r"embeddings\.(patch_embedding|patch_embeddings\.projection)\.", "patch_embedding."),
    (r"embeddings\.position_embeddings?(\.weight)?$", "position_embedding"),
    (r"pre_layrnorm\.", "pre_norm."),  # CLIP's spelling
    (rf"{_LAYER}(layernorm_before|layer_norm1)\.", r"layers.\1.norm1."),
    (rf"{_LAYER}(layernorm_after|layer_norm2)\.", r"layers.\1.norm2."),
    (rf"{_LAYER}norm([12])\.", r"layers.\1.norm\2."),
    (
        rf"{_LAYER}attention\.attention\.relative_position_bias\.relative_position_bias_table",
        r"layers.\1.position_bias",
    ),
    (r"encoder\.relative_position_bias\.relative_position_bias_table", "position_bias"),
    (rf"{_LAYER}attention\.attention\.(\w+)\.", r"layers.\1.\2."),
    (rf"{_LAYER}self_attn\.(qkv|projection)\.", r"layers.\1.\2."),
    (rf"{_LAYER}self_attn\.q_proj\.", r"layers.\1.query."),
    (rf"{_LAYER}self_attn\.k_proj\.", r"layers.\1.key."),
    (rf"{_LAYER}self_attn\.v_proj\.", r"layers.\1.value."),
    (rf"{_LAYER}(attention\.output\.dense|self_attn\.out_proj)\.", r"layers.\1.projection."),
    (rf"{_LAYER}(intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", r"layers.\1.fc1."),
    (rf"{_LAYER}(output\.dense|mlp\.fc2|mlp\.weights_out)\.", r"layers.\1.fc2."),
    (rf"{_LAYER}lambda_([12])$", r"layers.\1.scale\2"),
    (rf"{_LAYER}layer_scale([12])\.lambda1", r"layers.\1.scale\2"),
    (r"(layernorm|post_layernorm)\.", "norm."),
]


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block, each behind a norm.

    With `is_gated`, DINOv2's SwiGLU: the two halves of `fc1` are act(gate) * value. With
    `layer_scale`, a factor per channel scales what each block adds. `num_biases` is the length of
    the table of biases by relative position (0: none).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        eps: float,
        act: str,
        qkv_bias: bool,
        is_gated: bool = False,
        layer_scale: bool = False,
        num_biases: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.act = ACTIVATIONS[act]
        self.is_gated = is_gated
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, 2 * mlp_width if is_gated else mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.scale1 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if layer_scale else None
        self.position_bias = (
            nn.Parameter(torch.zeros(num_biases, num_heads)) if num_biases else None
        )

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (B, P, D) -> (B, P, D); `positions` (P, P) are rows of the table of biases."""
        bias = None if positions is None else self.biases(positions)[None]
        x = x + self.attention(self.norm1(x), bias)
        return x + self.feed_forward(self.norm2(x))

    def biases(self, positions: Tensor) -> Tensor:  # (P, P) -> (H, P, P)
        assert self.position_bias is not None
        return self.position_bias.T[:, positions]

    def attention(self, x: Tensor, bias: Tensor | None) -> Tensor:  # (B, P, D) -> (B, P, D)
        (qkv,) = project(x, self.qkv)
        q, k, v = rearrange(qkv, "b p (three h k) -> three b h p k", three=3, h=self.num_heads)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        (out,) = project(rearrange(context, "b h p k -> b p (h k)"), self.projection)
        return out if self.scale1 is None else out * self.scale1

    def feed_forward(self, x: Tensor) -> Tensor:  # (B, P, D) -> (B, P, D)
        (out,) = project(x, self.fc1)
        if self.is_gated:
            gate, value = out.chunk(2, dim=-1)
            out = self.act(gate) * value
        else:
            out = self.act(out)
        (out,) = project(out, self.fc2)
        return out if self.scale2 is None else out * self.scale2


class VisionTransformer(nn.Module):
    """Pixels (B, 3, height, width) -> features (B, P, D), the last layer, normed by `final_norm`.

    P is the number of patches + `num_class_tokens`. Tokens' positions are embedded for
    one image size (`positions` is "fixed"), for any size by interpolation ("bicubic" and
    "antialiased"), or not at all ("none"). With `has_position_bias`, each layer also has biases
    by relative position.
    """

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        image_size: tuple[int, int],
        patch_size: int,
        eps: float,
        act: str = "gelu",
        qkv_bias: bool = True,
        num_class_tokens: int = 1,
        positions: Literal["fixed", "bicubic", "antialiased", "none"] = "fixed",
        has_position_bias: bool = False,
        patch_bias: bool = True,
        pre_norm: bool = False,
        final_norm: bool = True,
        is_gated: bool = False,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.num_class_tokens = num_class_tokens
        self.positions = positions
        self.has_position_bias = has_position_bias
        self.patch_embedding = nn.Conv2d(
            3, width, kernel_size=patch_size, stride=patch_size, bias=patch_bias
        )
        self._set_image_size(image_size)
        self.class_token = nn.Parameter(torch.zeros(1, num_class_tokens, width))
        self.position_embedding = (
            None if positions == "none" else nn.Parameter(torch.zeros(1, self.num_tokens, width))
        )
        self.pre_norm = nn.LayerNorm(width, eps=eps) if pre_norm else None
        rows, columns = (2 * edge - 1 for edge in self.grid)  # distances of two patches
        num_biases = rows * columns + 3 if has_position_bias else 0
        self.layers = nn.ModuleList(
            EncoderLayer(
                width, num_heads, mlp_width, eps=eps, act=act, qkv_bias=qkv_bias,
                is_gated=is_gated, layer_scale=layer_scale, num_biases=num_biases,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=eps) if final_norm else None

    def _set_image_size(self, image_size: tuple[int, int]) -> None:
        patch_size = self.patch_embedding.kernel_size[0]
        self.image_size = image_size
        self.grid = image_size[0] // patch_size, image_size[1] // patch_size
        self.num_tokens = self.grid[0] * self.grid[1] + self.num_class_tokens

    def resize(self, image_size: tuple[int, int]) -> None:
        """Take images of another size, if positions can be interpolated; do it as DINOv2 does."""
        if image_size == self.image_size or self.positions not in ("bicubic", "antialiased"):
            return
        assert self.position_embedding is not None
        first, patches = self.position_embedding.split(
            [self.num_class_tokens, self.num_tokens - self.num_class_tokens], dim=1
        )
        patches = rearrange(patches, "b (y x) d -> b d y x", y=self.grid[0])
        self._set_image_size(image_size)
        patches = F.interpolate(
            patches, self.grid, mode="bicubic", antialias=self.positions == "antialiased"
        )
        together = torch.cat([first, rearrange(patches, "b d y x -> b (y x) d")], dim=1)
        self.position_embedding = nn.Parameter(together, requires_grad=False)

    def describe(self) -> dict[str, Any]:
        """What the features depend on besides the weights."""
        layer = self.layers[0]
        return {
            "num_heads": layer.num_heads,
            "eps": layer.norm1.eps,
            "activation": next(name for name, act in ACTIVATIONS.items() if act is layer.act),
        }

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixel_values), "b d y x -> b (y x) d")
        class_token = self.class_token.expand(len(patches), -1, -1).to(patches.dtype)
        x = torch.cat([class_token, patches], dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        positions = None
        if self.has_position_bias:
            positions = _with_class_token(self.grid, device=x.device)
        for layer in self.layers:
            x = layer(x, positions)
        return x if self.norm is None else self.norm(x)


def relative_positions(height: int, width: int, *, device: torch.device) -> Tensor:
    """Rows (P, P) of a table of (2 height - 1)(2 width - 1) biases, for each pair of P patches."""
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    y, x = y.flatten(), x.flatten()
    rows = y[:, None] - y + height - 1
    return rows * (2 * width - 1) + x[:, None] - x + width - 1


def _with_class_token(grid: tuple[int, int], *, device: torch.device) -> Tensor:
    """The same with BEiT's class token (P + 1, P + 1), whose biases are the last of the table.

    They are for class token to patch, patch to class token, and class token to itself.
    """
    first = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    positions = F.pad(relative_positions(*grid, device=device), (0, 0, 1, 0), value=first)
    positions = F.pad(positions, (1, 0, 0, 0), value=first + 1)
    positions[0, 0] = first + 2
    return positions


def from_config(config: Any, **differences: Any) -> VisionTransformer:
    """The encoder of a ViT-like configuration; `differences` are further arguments.

    Raises ValueError for a value that is out of range.
    """
    size = config.image_size
    if "mlp_width" not in differences:
        differences["mlp_width"] = whole_number(config, "intermediate_size", "width")
    settings = {
        "width": whole_number(config, "hidden_size", "width"),
        "num_layers": whole_number(config, "num_hidden_layers", "layers"),
        "num_heads": valid_num_heads(config.num_attention_heads, config.hidden_size),
        "image_size": valid_image_size(size if isinstance(size, (list, tuple)) else (size, size)),
        "patch_size": whole_number(config, "patch_size", "image_size"),
        "eps": fraction(config, "layer_norm_eps"),
        "act": valid_activation(config.hidden_act),
    }
    return VisionTransformer(**settings | differences)


def variant(config: Any) -> dict[str, Any]:
    """How a kind of encoder differs from what `from_config` assumes, as its further arguments.

    Raises ValueError for a value that is out of range.
    """
    kind = config.model_type
    if kind == "clip_vision_model":  # the decoder gets the last layer as it is
        return {"pre_norm": True, "final_norm": False, "patch_bias": False}
    if kind == "beit":
        return _beit_variant(config)
    if kind in ("dinov2", "dinov2_with_registers"):
        return _dinov2_variant(config)
    return {"qkv_bias": config.qkv_bias, "num_class_tokens": 2 if kind == "deit" else 1}


def _beit_variant(config: Any) -> dict[str, Any]:
    is_relative = config.use_relative_position_bias or config.use_shared_relative_position_bias
    if is_relative:
        _check_square(config)
    return {
        "positions": "fixed" if config.use_absolute_position_embeddings else "none",
        "has_position_bias": is_relative,
        "layer_scale": config.layer_scale_init_value > 0,
        "final_norm": not config.use_mean_pooling,
    }


def _check_square(config: Any) -> None:
    """Raises ValueError for other images: transformers interpolates positions as if square."""
    size = config.image_size
    if isinstance(size, (list, tuple)) and len(set(size)) > 1:
        raise ValueError(
            f"image size {shortened(size)}; expected the height to equal the width, as positions "
            f"of a {config.model_type} are interpolated on a square"
        )


def _dinov2_variant(config: Any) -> dict[str, Any]:
    _check_square(config)
    mlp_width = int(config.hidden_size * ratio(config, "mlp_ratio"))
    settings: dict[str, Any] = {
        "mlp_width": mlp_width,
        "qkv_bias": config.qkv_bias,
        "layer_scale": True,
        "positions": "bicubic",
    }
    if config.use_swiglu_ffn:  # two thirds, rounded up to a multiple of 8
        gated_width = (int(mlp_width * 2 / 3) + 7) // 8 * 8
        settings |= {"mlp_width": gated_width, "is_gated": True, "act": "silu"}
    if config.model_type == "dinov2_with_registers":
        num_registers = whole_number(config, "num_register_tokens", "positions")
        settings |= {"num_class_tokens": 1 + num_registers, "positions": "antialiased"}
    return settings


def convert_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors of an encoder under the names used here.

    Separate query, key and value become one tensor, and so do the class token and those behind it.
    A name that `RENAMES` does not know is kept.
    """
    state = rename(tensors, RENAMES)
    join_qkv(state)
    for name, num_axes in (("class_token", 3), ("position_embedding", 3)):
        while name in state and state[name].dim() < num_axes:  # CLIP's
            state[name] = state[name][None]
    registers, position_embedding = state.get("register_tokens"), state.get("position_embedding")
    if registers is not None and position_embedding is not None:  # registers have no position
        parts = position_embedding[:, :1], torch.zeros_like(registers), position_embedding[:, 1:]
        state["position_embedding"] = torch.cat(parts, dim=1)
    names = ("cls_token", "distillation_token", "register_tokens")
    tokens = [state.pop(name) for name in names if name in state]
    if tokens:
        state["class_token"] = torch.cat(tokens, dim=1)
    shared_bias = state.pop("position_bias", None)
    if shared_bias is not None:
        layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
        for name in (f"layers.{layer}.position_bias" for layer in layers):
            state[name] = shared_bias + state[name] if name in state else shared_bias
    return state


def rename(tensors: dict[str, Tensor], renames: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors by their new names: the first pattern that matches a name's beginning counts."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name, times = re.subn(f"^{pattern}", replacement, name)
            if times:
                break
        renamed[name] = tensor
    return renamed


def join_qkv(state: dict[str, Tensor]) -> None:
    """Replace a layer's `query`, `key` and `value` by one `qkv`, where all three are there."""
    queries = [name for name in state if re.search(r"\.query\.(weight|bias)$", name)]
    if not any(".key.bias" in name for name in state):
        # BEiT's keys have no bias: softmax ignores it, as it adds as much to all scores of a query.
        state |= {
            name.replace(".query.", ".key."): torch.zeros_like(state[name])
            for name in queries if name.endswith(".bias")
        }
    for query in queries:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in state for name in names):
            state[query.replace(".query.", ".qkv.")] = torch.cat([state.pop(n) for n in names])
