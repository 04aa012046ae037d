"""Attention of caption tokens onto the frozen features of their image, in two equivalent forms.

The projected form computes keys and values of all P image tokens, as other libraries do. The
absorbed form never does. With W_k,h and W_v,h (K, E) the rows of head h in W_k and W_v,

    scores_h = q_h W_k,h E^T        context_h = (softmax(scores_h) E) W_v,h^T + b_v,h

so a caption of T tokens costs T small products instead of P large ones: multi-query attention with
E as keys and values, like DeepSeek-V2's "absorbed" attention (arXiv:2405.04434, section 2.1.2). A
key bias would add q_h b_k,h, the same number for all keys, which the softmax ignores. LoRA on keys
and values, with U = dropout(E) A^T and s the scaling, adds s (q_h B_k,h) U_k^T to the scores and
s (probs U_v) B_v,h^T to the context. DoRA's factors c of the outputs multiply the queries, for
(c k) q = k (c q), and the context. E is frozen and gets no gradient.

Axes: B images, N = B * G rows (G rows per image), T caption tokens, P image tokens, E width of the
features, D width of the decoder, H heads, K head width, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_engine.lora.layer import is_plain, linear_parts, low_rank_inputs
from lora_engine.lora.matmul import (
    batched_matmul,
    frozen_linear,
    is_on_cpu,
    per_head_matmul,
    scaled_matmul,
    scaled_weight_gradient,
)
from lora_engine.models.attention import KeyValueCache, LayerCache, split_heads


class FeatureProjection(NamedTuple):
    """Keys or values as a function of the features: c (E W^T + scaling * U B^T) + b."""

    weight: Tensor  # (D, E)
    bias: Tensor | None  # (D,)
    low_rank: Tensor | None = None  # U (B, P, R)
    lora_B: Tensor | None = None  # (D, R)
    scaling: float = 1.0
    out_scale: Tensor | None = None  # c (D,), of DoRA

    def scaled_B(self) -> Tensor:
        """scaling * B (D, R)."""
        assert self.lora_B is not None
        return self.scaling * self.lora_B

    def chunk(self, count: int) -> "list[FeatureProjection]":
        """Split a fused layer by its outputs; the parts share its low-rank product U."""
        weights, biases, lora_Bs, out_scales = (
            [None] * count if x is None else x.chunk(count)
            for x in (self.weight, self.bias, self.lora_B, self.out_scale)
        )
        return [
            FeatureProjection(weight, bias, self.low_rank, lora_B, self.scaling, out_scale)
            for weight, bias, lora_B, out_scale in zip(weights, biases, lora_Bs, out_scales)
        ]


def low_rank_features(
    features: Tensor, layers: Sequence[Sequence[nn.Module]], cache: KeyValueCache | None = None
) -> list[list[Tensor | None]]:
    """U = dropout(E) A^T (B, P, R) of every key and value adapter of every layer, else None.

    One product and one dropout mask serve all layers: the features are one input, and a mask for
    each of 24 adapters would cost more than the attention itself on a CPU. With a cache, they are
    computed at the first call only.
    """
    if cache is not None and cache.low_ranks is not None:
        return cache.low_ranks
    flat = iter(low_rank_inputs(features, [layer for group in layers for layer in group]))
    low_ranks = [[next(flat) for _ in group] for group in layers]
    if cache is not None:
        cache.low_ranks = low_ranks
    return low_ranks


def cross_attention(
    query: Tensor,
    features: Tensor,
    layers: Sequence[nn.Module],
    low_ranks: Sequence[Tensor | None],
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    cache: LayerCache | None = None,
) -> Tensor:
    """Attention of `query` (N, T, D) onto `features` (B, P, E) -> (N, T, D).

    `layers` are the linear layers of keys and of values, or a single one that makes both;
    `low_ranks` is their row of `low_rank_features`. Layers that are not `is_plain` are called.
    There is no mask: every image has all of its P tokens. With a cache, keys and values, if any,
    are computed at the first call only, and the form is chosen by the caption's maximum length.
    """
    settings: dict[str, Any] = {
        "num_heads": num_heads, "scale": scale, "dropout": dropout, "cache": cache
    }
    if cache is not None and cache.record:
        cache.cross_attention_probs = attention_probs(
            query, features, layers, low_ranks, num_heads=num_heads, scale=scale
        )
    if all(is_plain(layer) for layer in layers):
        key, value = _feature_projections(layers, low_ranks, query.dtype)
        return attend(query, features, key, value, **settings)

    def keys_and_values() -> tuple[Tensor, Tensor]:
        outs = [layer(features).to(query.dtype) for layer in layers]
        keys, values = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
        return keys, values

    context = _projected(
        _by_image(query, features), keys_and_values, num_heads, scale, dropout, cache
    )
    return _by_row(context, query)


def attention_probs(
    query: Tensor,
    features: Tensor,
    layers: Sequence[nn.Module],
    low_ranks: Sequence[Tensor | None],
    *,
    num_heads: int,
    scale: float,
) -> Tensor:
    """The probabilities (N, H, T, P), fp32, by which `cross_attention` weights the image tokens.

    It computes neither form's probabilities in one piece, so this repeats the projected form's.
    """
    if all(is_plain(layer) for layer in layers):
        key, _ = _feature_projections(layers, low_ranks, query.dtype)
        keys = _apply(key._replace(bias=None), features)
    else:
        keys = layers[0](features).to(query.dtype)[..., : query.shape[-1]]  # may make values, too
    queries = split_heads(_by_image(query, features), num_heads)
    scores = scale * queries @ split_heads(keys, num_heads).transpose(2, 3)
    return rearrange(scores.float().softmax(dim=-1), "b h (g t) p -> (b g) h t p", t=query.shape[1])


def attend(
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
    """`cross_attention` in the form that takes fewer operations."""
    num_rows, num_tokens, width = query.shape
    num_queries = num_rows // len(features) * (num_tokens if cache is None else cache.num_tokens)
    rows = _by_image(query, features)
    if key.out_scale is not None:  # there are fewer queries than keys
        rows, key = rows * key.out_scale, key._replace(out_scale=None)
    if absorbs(
        (num_queries, width), features.shape[1:], num_heads,
        with_backward=torch.is_grad_enabled(), on_cpu=is_on_cpu(features),
    ):
        context = absorbed(rows * scale, features, key, value, num_heads, dropout)
    else:
        def keys_and_values() -> tuple[Tensor, Tensor]:
            unbiased = key._replace(bias=None)  # a key bias changes nothing
            return _apply(unbiased, features), _apply(value, features)

        context = _projected(rows, keys_and_values, num_heads, scale, dropout, cache)
    return _by_row(context, query)


def _feature_projections(
    layers: Sequence[nn.Module], low_ranks: Sequence[Tensor | None], dtype: torch.dtype
) -> Sequence[FeatureProjection]:
    """Those of keys and values."""
    projections = []
    for layer, low_rank in zip(layers, low_ranks, strict=True):
        parts = linear_parts(layer, dtype)
        lora_B = None if low_rank is None else parts.lora_B
        projections.append(FeatureProjection(
            parts.weight, parts.bias, low_rank, lora_B, parts.scaling, parts.out_scale
        ))
    return projections if len(projections) == 2 else projections[0].chunk(2)


def _by_image(query: Tensor, features: Tensor) -> Tensor:
    """(B G, T, D) -> (B, G T, D): the rows of an image see the same features."""
    return rearrange(query, "(b g) t d -> b (g t) d", b=len(features))


def _by_row(context: Tensor, query: Tensor) -> Tensor:
    return rearrange(context, "b (g t) d -> (b g) t d", t=query.shape[1])


def absorbs(
    query_shape: Sequence[int],
    features_shape: Sequence[int],
    num_heads: int,
    *,
    with_backward: bool,
    on_cpu: bool = True,
) -> bool:
    """Whether the absorbed form takes fewer operations for queries (T, D) of features (P, E).

    On a GPU the answer is no: the projected form has more operations, but in a quarter fewer
    kernels, all of whose matrices are aligned (no GPU has measured it yet).
    """
    if not on_cpu:
        return False
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
    """Scaled queries (B, T, D) -> context (B, T, D), without keys and values.

    DoRA's factors of the keys, if any, are in the queries.
    """
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
        low_rank = torch.einsum("mhk,hkr->mhr", query, key.scaled_B().unflatten(0, heads))
        scores = scores + batched_matmul(by_image(low_rank), key.low_rank)
    # Kernels sum in fp32 whatever the dtype. With that of the scores they are one kernel instead of
    # three; without it autocast would choose fp32.
    probs = torch.softmax(scores, dim=-1, dtype=scores.dtype)
    probs = F.dropout(probs, dropout)

    context = by_head(batched_matmul(probs, features.transpose(1, 2)))  # (B T, H, E)
    context = per_head_matmul(context, W_v.transpose(1, 2))  # (B T, H, K)
    if value.low_rank is not None:
        low_rank = by_head(batched_matmul(probs, value.low_rank.transpose(1, 2)))
        lora_B = value.scaled_B().unflatten(0, heads)
        context = context + torch.einsum("mhr,hkr->mhk", low_rank, lora_B)
    if value.out_scale is not None:
        context = context * value.out_scale.unflatten(0, heads)
    if value.bias is not None:
        bias = value.bias.unflatten(0, heads)  # (H, K)
        if dropout:  # the probabilities of a query then no longer sum to 1
            bias = bias * by_head(probs.sum(dim=-1, keepdim=True))
        context = context + bias
    return rearrange(context, "(b t) h k -> b t (h k)", b=num_images)


def _projected(
    query: Tensor,
    keys_and_values: Callable[[], tuple[Tensor, Tensor]],
    num_heads: int,
    scale: float,
    dropout: float,
    cache: LayerCache | None,
) -> Tensor:
    """Queries (B, T, D) -> context (B, T, D), by keys and values (B, P, D) of the image tokens."""
    if cache is not None and cache.cross_attention is not None:
        keys, values = cache.cross_attention
    else:
        keys, values = (split_heads(x, num_heads) for x in keys_and_values())
        if cache is not None:
            cache.cross_attention = keys, values
    context = F.scaled_dot_product_attention(
        split_heads(query, num_heads), keys, values, scale=scale, dropout_p=dropout
    )
    return rearrange(context, "b h t k -> b t (h k)")


def _apply(projection: FeatureProjection, features: Tensor) -> Tensor:
    """Keys or values (B, P, D); in place where possible, as they are large."""
    weight, bias, low_rank, lora_B, scaling, out_scale = projection
    if out_scale is not None:
        outs = _apply(projection._replace(bias=None, out_scale=None), features)
        return outs * out_scale if bias is None else torch.addcmul(bias, outs, out_scale)
    rows = features.flatten(0, 1)
    if low_rank is not None and not is_on_cpu(features):
        rows = _AdaptedFeatures.apply(rows, low_rank.flatten(0, 1), weight, bias, lora_B, scaling)
        return rows.unflatten(0, features.shape[:2])
    rows = frozen_linear(rows, weight)
    if bias is not None:
        rows.add_(bias)
    if low_rank is not None:
        rows.addmm_(low_rank.flatten(0, 1), projection.scaled_B().T)
    return rows.unflatten(0, features.shape[:2])


class _AdaptedFeatures(torch.autograd.Function):
    """E W^T + b + scaling * U B^T, with gradients of U and B, by two kernels in each direction.

    Autograd would scale in kernels of their own.
    """

    @staticmethod
    def forward(ctx, E: Tensor, U: Tensor, W: Tensor, b: Tensor | None, B: Tensor, scaling: float):
        ctx.save_for_backward(U, B)
        ctx.scaling = scaling
        return frozen_linear(E, W, b).addmm_(U, B.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        U, B = ctx.saved_tensors
        dU = scaled_matmul(gradient, B, ctx.scaling)
        return None, dU, None, None, scaled_weight_gradient(gradient, U, ctx.scaling), None
