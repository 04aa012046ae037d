"""Causal self-attention of the decoders, and the cache that generation keeps.

Axes: N rows, T query tokens, S key tokens, D width, H heads, K head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass
class LayerCache:
    """The keys and values (N, H, S, K) that generation keeps of one layer.

    Self-attention's grow by a token per step and are reordered with the beams. Cross-attention's
    have one row per image, which all of its beams share, and are computed once, if at all.
    `num_tokens` is the maximum length of a row. With `record`, `cross_attention_probs` (N, H, T, P)
    are the probabilities of the last call, which are not computed otherwise.
    """

    num_tokens: int
    record: bool = False
    cross_attention_probs: Tensor | None = None
    self_attention: tuple[Tensor, Tensor] | None = None
    cross_attention: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens -> keys and values of all tokens."""
        if self.self_attention is not None:
            past_keys, past_values = self.self_attention
            keys = torch.cat([past_keys, keys], dim=2)
            values = torch.cat([past_values, values], dim=2)
        self.self_attention = keys, values
        return keys, values


class KeyValueCache:
    """The caches of a decoder's layers, and its adapters' low-rank features.

    `num_tokens` is the maximum length of a row, prompt included; `record` is that of `LayerCache`.
    """

    def __init__(self, num_tokens: int, *, record: bool = False) -> None:
        self.num_tokens = num_tokens
        self.record = record
        self.layers: dict[int, LayerCache] = {}
        self.low_ranks: list[list[Tensor | None]] | None = None  # cross_attention's U (B, P, R)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers.setdefault(layer, LayerCache(self.num_tokens, self.record))

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        past = self[0].self_attention
        return 0 if past is None else past[0].shape[2]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue the tokens of row `rows[i]`."""
        for layer in self.layers.values():
            if layer.self_attention is not None:
                keys, values = layer.self_attention
                layer.self_attention = keys[rows], values[rows]

    def keep_images(self, images: Tensor) -> None:
        """Drop the cross-attention caches of all images but these; for rows, see `reorder`."""
        for layer in self.layers.values():
            if layer.cross_attention is not None:
                keys, values = layer.cross_attention
                layer.cross_attention = keys[images], values[images]
        if self.low_ranks is not None:
            self.low_ranks = [
                [part if part is None else part[images] for part in parts]
                for parts in self.low_ranks
            ]


def split_heads(x: Tensor, num_heads: int) -> Tensor:  # (N, T, D) -> (N, H, T, K)
    return rearrange(x, "n t (h k) -> n h t k", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:  # (N, H, T, K) -> (N, T, D)
    return rearrange(x, "n h t k -> n t (h k)")


def causal_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    cache: LayerCache | None = None,
) -> Tensor:
    """Attention of each token (N, T, D) onto itself and earlier ones -> (N, T, D).

    Captions are padded on the right, so a valid token never sees padding, and the causal mask is
    enough. With a cache, T is a whole prompt on an empty cache, or one token.
    """
    query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
    if cache is not None:
        key, value = cache.append(key, value)
    # Without a cache a constant: comparing sizes would break torch.compile's graph.
    is_causal = cache is None or query.shape[2] > 1
    assert not is_causal or query.shape[2] == key.shape[2], "several tokens on a filled cache"
    context = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout
    )
    return merge_heads(context)
