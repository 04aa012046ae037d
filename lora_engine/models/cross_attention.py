"""Attention of caption tokens onto the frozen features of their image, in two equal forms.

The projected form makes keys and values of all P image tokens, as every library does. The absorbed
form never makes them. With the rows of head h, of K features each, in W_k and W_v,

    scores_h = (q_h W_k,h + b) E^T        context_h = (softmax(scores_h) E) W_v,h^T + b_v,h

so that a caption of T tokens costs T small products instead of P large ones: multi-query attention
with E for keys and values, as in DeepSeek-V2's "absorbed" attention (arXiv:2405.04434, section
2.1.2). The key bias adds the same to all scores of a query and leaves the softmax as it is. LoRA
on keys and values, with U = dropout(E) A^T, adds s (q_h B_k,h) U_k^T to the scores and
s (probs U_v) B_v,h^T to the context. Nothing here forms a gradient for E, which is frozen.

Axes: B images, N = B * G rows (G rows an image), T caption tokens, P image tokens, E width of the
features, D width of the decoder, H heads, K head width, R rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lora_engine.lora.dropout import dropout_mask, kept_part
from lora_engine.lora.layer import LoRALinear, linear_parts
from lora_engine.lora.matmul import batched_matmul, feature_matmul, frozen_linear, per_head_matmul
from lora_engine.models.attention import KeyValueCache, LayerCache, split_heads


class FeatureProjection(NamedTuple):
    """Keys or values as a function of the features: E W^T + b + U B^T, B being scaled already."""

    weight: Tensor  # (D, E)
    bias: Tensor | None  # (D,)
    low_rank: Tensor | None = None  # U (B, P, R)
    lora_B: Tensor | None = None  # (D, R)

    def chunk(self, count: int) -> "list[FeatureProjection]":
        """The parts of a fused layer; they share its low-rank product."""
        weights, biases, lora_Bs = (
            [None] * count if x is None else x.chunk(count)
            for x in (self.weight, self.bias, self.lora_B)
        )
        return [
            FeatureProjection(weight, bias, self.low_rank, lora_B)
            for weight, bias, lora_B in zip(weights, biases, lora_Bs)
        ]


def low_rank_features(
    features: Tensor, layers: Sequence[Sequence[nn.Module]], cache: KeyValueCache | None = None
) -> list[list[Tensor | None]]:
    """U = dropout(E) A^T (B, P, R) of every key and value adapter of every layer; else None.

    They are one product over all layers, and its dropout is one mask: the features are one input,
    and a mask for each of 24 adapters would cost more than the attention itself on a CPU. With a
    cache, they are formed at the first call only.
    """
    if cache is None:
        return _low_rank_features(features, layers)
    if cache.low_ranks is None:
        cache.low_ranks = _low_rank_features(features, layers)
    return cache.low_ranks


def _low_rank_features(
    features: Tensor, layers: Sequence[Sequence[nn.Module]]
) -> list[list[Tensor | None]]:
    adapters = [
        layer for group in layers for layer in group
        if isinstance(layer, LoRALinear) and not layer.merged
    ]
    if not adapters:
        return [[None] * len(group) for group in layers]
    A = torch.cat([adapter.matrices(features.dtype)[0] for adapter in adapters])
    assert len({adapter.dropout for adapter in adapters}) == 1, "one mask, one probability"
    dropout = adapters[0].dropout if adapters[0].training else 0.0
    rows = features.flatten(0, 1)
    if dropout:
        kept, kept_share = dropout_mask(rows, dropout)
        rows, A = kept_part(rows, kept), A / kept_share
    low_rank = feature_matmul(rows, A).unflatten(0, features.shape[:2])
    ranks = [adapter.rank for adapter in adapters]
    split = (part.contiguous() for part in low_rank.split(ranks, dim=-1))
    parts: dict[nn.Module, Tensor] = dict(zip(adapters, split))
    return [[parts.get(layer) for layer in group] for group in layers]


def feature_projection(
    layer: nn.Module, low_rank: Tensor | None, dtype: torch.dtype
) -> FeatureProjection:
    """The projection that a linear layer, adapted or not, makes of the features."""
    weight, bias, _, lora_B, scaling = linear_parts(layer, dtype)
    return FeatureProjection(
        weight, bias, low_rank, None if low_rank is None else scaling * lora_B
    )


def cross_attention(
    query: Tensor,
    features: Tensor,
    key: FeatureProjection,
    value: FeatureProjection,
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    cache: LayerCache | None = None,
) -> Tensor:
    """Attention of `query` (N, T, D) onto `features` (B, P, E) -> (N, T, D).

    There is no mask: every image has all of its P tokens. With a cache, keys and values, if any,
    are formed at the first call only, and what counts for the choice of the form is the length that
    the caption may reach.
    """
    num_rows, num_tokens, width = query.shape
    num_queries = num_rows // len(features) * (num_tokens if cache is None else cache.num_tokens)
    # The rows of one image see the same features: fold them into the token axis.
    query = rearrange(query, "(b g) t d -> b (g t) d", b=len(features))
    if absorbs(
        (num_queries, width), features.shape[1:], num_heads, with_backward=torch.is_grad_enabled()
    ):
        context = absorbed(query * scale, features, key, value, num_heads, dropout)
    else:
        context = _projected(query, features, key, value, num_heads, scale, dropout, cache)
    return rearrange(context, "b (g t) d -> (b g) t d", t=num_tokens)


def absorbs(
    query_shape: Sequence[int],
    features_shape: Sequence[int],
    num_heads: int,
    *,
    with_backward: bool,
) -> bool:
    """Whether the absorbed form takes fewer operations for queries (T, D) of features (P, E)."""
    num_queries, width = query_shape
    num_tokens, features_width = features_shape
    passes = 2 if with_backward else 1  # the features take no gradient, so not 3
    each_query = num_heads * num_tokens * features_width + width * features_width
    absorbed_flop = 4 * passes * num_queries * each_query
    attention_flop = 4 * passes * num_queries * num_tokens * width
    projected_flop = 4 * num_tokens * features_width * width + attention_flop
    return absorbed_flop < projected_flop


def absorbed(
    query: Tensor,
    features: Tensor,
    key: FeatureProjection,
    value: FeatureProjection,
    num_heads: int,
    dropout: float,
) -> Tensor:
    """Scaled queries (B, T, D) -> context (B, T, D), without keys and values."""
    num_images, heads = len(query), (num_heads, -1)
    query = rearrange(query, "b t (h k) -> (b t) h k", h=num_heads)
    W_k, W_v = key.weight.unflatten(0, heads), value.weight.unflatten(0, heads)  # (H, K, E)

    def by_image(rows: Tensor) -> Tensor:
        return rearrange(rows, "(b t) h x -> b (t h) x", b=num_images)

    def by_head(rows: Tensor) -> Tensor:
        return rearrange(rows, "b (t h) x -> (b t) h x", h=num_heads)

    queries = by_image(per_head_matmul(query, W_k))  # (B, T H, E)
    scores = batched_matmul(queries, features)  # (B, T H, P)
    if key.low_rank is not None:
        low_rank = torch.einsum("mhk,hkr->mhr", query, key.lora_B.unflatten(0, heads))
        scores = scores + batched_matmul(by_image(low_rank), key.low_rank)
    # In fp32 whatever the compute dtype. (A fused kernel would not have rounded the scores either.)
    probs = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probs = F.dropout(probs.to(scores.dtype), dropout)

    context = by_head(batched_matmul(probs, features.transpose(1, 2)))  # (B T, H, E)
    context = per_head_matmul(context, W_v.transpose(1, 2))  # (B T, H, K)
    if value.low_rank is not None:
        low_rank = by_head(batched_matmul(probs, value.low_rank.transpose(1, 2)))
        context = context + torch.einsum("mhr,hkr->mhk", low_rank, value.lora_B.unflatten(0, heads))
    if value.bias is not None:
        bias = value.bias.unflatten(0, heads)  # (H, K)
        if dropout:  # then the probabilities of a query no longer add up to 1
            bias = bias * by_head(probs.sum(dim=-1, keepdim=True))
        context = context + bias
    return rearrange(context, "(b t) h k -> b t (h k)", b=num_images)


def _projected(
    query: Tensor,
    features: Tensor,
    key: FeatureProjection,
    value: FeatureProjection,
    num_heads: int,
    scale: float,
    dropout: float,
    cache: LayerCache | None,
) -> Tensor:
    if cache is not None and cache.cross_attention is not None:
        keys, values = cache.cross_attention
    else:
        key = key._replace(bias=None)  # it would change nothing
        keys, values = (split_heads(_keys_or_values(features, p), num_heads) for p in (key, value))
        if cache is not None:
            cache.cross_attention = keys, values
    context = F.scaled_dot_product_attention(
        split_heads(query, num_heads), keys, values, scale=scale, dropout_p=dropout
    )
    return rearrange(context, "b h t k -> b t (h k)")


def _keys_or_values(features: Tensor, projection: FeatureProjection) -> Tensor:
    """Keys or values (B, P, D) of all image tokens, which are many: each pass over them counts."""
    weight, bias, low_rank, lora_B = projection
    rows = frozen_linear(features.flatten(0, 1), weight)
    if bias is not None:
        rows.add_(bias)
    if low_rank is not None:
        rows.addmm_(low_rank.flatten(0, 1), lora_B.T)
    return rows.unflatten(0, features.shape[:2])
