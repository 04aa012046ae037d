"""Attention of caption tokens onto the frozen features of their image.

This is the projected form: the features are projected to keys and values, once a layer and batch.

Axes: B images, N = B * G rows (G rows an image), T caption tokens, P image tokens, D width,
H heads, K head width.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lora_engine.models.attention import LayerCache, split_heads


def cross_attention(
    query: Tensor,
    features: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    cache: LayerCache | None = None,
) -> Tensor:
    """Attention of `query` (N, T, D) onto `features` (B, P, D of the encoder) -> (N, T, D).

    `project` makes keys and values (B, P, D) of the features. There is no mask: every image has
    all of its P tokens. With a cache, keys and values are formed at the first call only.
    """
    if cache is not None and cache.cross_attention is not None:
        key, value = cache.cross_attention
    else:
        key, value = (split_heads(x, num_heads) for x in project(features))
        if cache is not None:
            cache.cross_attention = key, value
    # The rows of one image share its keys and values: fold them into the token axis instead of
    # repeating 577 keys for each of them.
    num_tokens = query.shape[1]
    query = rearrange(query, "(b g) t (h k) -> b h (g t) k", b=key.shape[0], h=num_heads)
    context = F.scaled_dot_product_attention(query, key, value, scale=scale, dropout_p=dropout)
    return rearrange(context, "b h (g t) k -> (b g) t (h k)", t=num_tokens)
