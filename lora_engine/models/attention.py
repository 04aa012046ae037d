"""Attention as both decoders use it: over the caption so far, with a cache for generation.

Axes: N rows, T query tokens, S key tokens, D width, H heads, K head width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass
class KeyValueCache:
    """What generation keeps between tokens: each layer's keys and values, (N, H, S, K).

    `self_attention` grows by a token a step and follows the beams; `cross_attention` has one row
    an image, is filled once and never reordered, because all beams of an image see the same one.
    """

    self_attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cross_attention: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return next(iter(self.self_attention.values()))[0].shape[2] if self.self_attention else 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens to a layer; returns all of its keys and values."""
        if layer in self.self_attention:
            past_keys, past_values = self.self_attention[layer]
            keys = torch.cat([past_keys, keys], dim=2)
            values = torch.cat([past_values, values], dim=2)
        self.self_attention[layer] = keys, values
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row `rows[i]` has been."""
        for layer, (keys, values) in self.self_attention.items():
            self.self_attention[layer] = keys[rows], values[rows]


def split_heads(x: Tensor, num_heads: int) -> Tensor:  # (N, T, D) -> (N, H, T, K)
    return rearrange(x, "n t (h k) -> n h t k", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:  # (N, H, T, K) -> (N, T, D)
    return rearrange(x, "n h t k -> n t (h k)")


def causal_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layer: int,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Attention of each token (N, T, D) onto itself and those before it -> (N, T, D).

    Captions are padded on the right, so that no valid token ever sees a pad and no mask is needed
    beside the causal one. With a cache, T is a whole prompt on an empty cache, or one token.
    """
    query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
    if cache is not None:
        key, value = cache.append(layer, key, value)
    is_causal = query.shape[2] > 1
    assert not is_causal or query.shape[2] == key.shape[2], "several tokens on a filled cache"
    context = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout
    )
    return merge_heads(context)
