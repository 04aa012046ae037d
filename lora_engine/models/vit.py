"""The frozen image encoder: a pre-norm Vision Transformer (arXiv:2010.11929), also DeiT's.

One implementation serves BLIP's encoder and transformers' ViT and DeiT; `RENAMES` maps their names
to the names here. Query, key and value are one linear layer, as in BLIP: one matmul instead of
three. Nothing here is trained, and neither published encoder has dropout.

Axes: B batch, P image tokens (class token, DeiT's distillation token, patches), D width, H heads,
K head width.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lora_engine.lora.layer import project
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.config_values import (
    fraction,
    valid_activation,
    valid_image_size,
    valid_num_heads,
    whole_number,
)

# Regular expressions over Hugging Face's names below the encoder, and their replacements.
RENAMES = {
    "blip": [
        (r"embeddings\.class_embedding", "class_token"),
        (r"embeddings\.patch_embedding\.", "patch_embedding."),
        (r"embeddings\.position_embedding", "position_embedding"),
        (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"layers.\1.norm\2."),
        (r"encoder\.layers\.(\d+)\.self_attn\.(qkv|projection)\.", r"layers.\1.\2."),
        (r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.", r"layers.\1.\2."),
        (r"post_layernorm\.", "norm."),
    ],
    "vit": [
        (r"embeddings\.(cls_token|distillation_token)", r"\1"),
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embedding."),
        (r"embeddings\.position_embeddings", "position_embedding"),
        (r"encoder\.layer\.(\d+)\.layernorm_before\.", r"layers.\1.norm1."),
        (r"encoder\.layer\.(\d+)\.layernorm_after\.", r"layers.\1.norm2."),
        (r"encoder\.layer\.(\d+)\.attention\.attention\.(\w+)\.", r"layers.\1.\2."),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.projection."),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.fc1."),
        (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.fc2."),
        (r"layernorm\.", "norm."),
    ],
}


class EncoderLayer(nn.Module):
    def __init__(
        self, width: int, num_heads: int, mlp_width: int, *, eps: float, act: str, qkv_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.act = ACTIVATIONS[act]
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, P, D) -> (B, P, D)
        (qkv,) = project(self.norm1(x), self.qkv)
        q, k, v = rearrange(qkv, "b p (three h k) -> three b h p k", three=3, h=self.num_heads)
        context = F.scaled_dot_product_attention(q, k, v)
        (out,) = project(rearrange(context, "b h p k -> b p (h k)"), self.projection)
        x = x + out
        (out,) = project(self.norm2(x), self.fc1)
        (out,) = project(self.act(out), self.fc2)
        return x + out


class VisionTransformer(nn.Module):
    """Pixels (B, 3, height, width) -> features (B, P, D), the normed last layer.

    P is the number of patches + `num_class_tokens` (1; DeiT has 2).
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
    ) -> None:
        super().__init__()
        self.image_size = image_size
        num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.num_tokens = num_patches + num_class_tokens
        self.width = width
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, num_class_tokens, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, self.num_tokens, width))
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_width, eps=eps, act=act, qkv_bias=qkv_bias)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=eps)

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
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def from_config(config: Any, **differences: Any) -> VisionTransformer:
    """The encoder of a ViT-like configuration; `differences` are further arguments.

    Raises ValueError for a value that is out of range.
    """
    size = config.image_size
    return VisionTransformer(
        width=whole_number(config, "hidden_size", "width"),
        num_layers=whole_number(config, "num_hidden_layers", "layers"),
        num_heads=valid_num_heads(config.num_attention_heads, config.hidden_size),
        mlp_width=whole_number(config, "intermediate_size", "width"),
        image_size=valid_image_size(size if isinstance(size, (list, tuple)) else (size, size)),
        patch_size=whole_number(config, "patch_size", "image_size"),
        eps=fraction(config, "layer_norm_eps"),
        act=valid_activation(config.hidden_act),
        **differences,
    )


def convert_names(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Hugging Face's tensors of an encoder (`layout` "blip" or "vit") under the names used here.

    Separate query, key and value become one tensor, and so do DeiT's two class tokens. A name that
    `RENAMES` does not know is kept.
    """
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES[layout]:
            name, times = re.subn(f"^{pattern}", replacement, name)
            if times:
                break
        renamed[name] = tensor
    if layout == "vit":
        for query in [name for name in renamed if re.search(r"^layers\.\d+\.query\.", name)]:
            names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(name in renamed for name in names):
                fused = torch.cat([renamed.pop(name) for name in names])
                renamed[query.replace(".query.", ".qkv.")] = fused
        tokens = [renamed.pop(n) for n in ("cls_token", "distillation_token") if n in renamed]
        if tokens:
            renamed["class_token"] = torch.cat(tokens, dim=1)
    return renamed
