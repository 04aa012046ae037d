"""The minimum number of floating-point operations of a training step.

A product of (M, K) and (K, N) counts as 2 M K N. Only matrix products count; norms, softmax,
activations and the optimizer take time, too, but do not count. Compared with the machine's best
measured rate, the distance from 1 is an upper bound of what could still be gained.

Axes: T caption tokens, P image tokens, D width, H heads, V vocabulary, R rank.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora_engine.lora.layer import LoRALinear
from lora_engine.models import CaptioningModel
from lora_engine.models.vit import VisionTransformer

Linear = nn.Linear | LoRALinear


def encoder_flops(model: CaptioningModel) -> int:
    """FLOPs of one image through the frozen encoder, forward.

    A layer takes the products of its four linear layers, 2 P (weights), and attention, 4 P P D.
    """
    encoder = model.encoder
    assert isinstance(encoder, VisionTransformer), "counted for a Vision Transformer"
    num_tokens, width = encoder.num_tokens, encoder.width
    num_patches = num_tokens - encoder.class_token.shape[1]
    patches = 2 * num_patches * encoder.patch_embedding.weight.numel()
    weights = sum(layer.weight.numel() for layer in _linears(encoder.layers))
    attention = 4 * num_tokens**2 * width * len(encoder.layers)
    return patches + 2 * num_tokens * weights + attention


def decoder_flops(model: CaptioningModel, num_tokens: int) -> int:
    """FLOPs of one caption of T = `num_tokens` inputs on kept features, forward and backward.

    Every token predicts the next. Padding is not counted, because it is avoidable. A layer takes

    - linear layers of tokens: 2 T (weights) forward, as much again for the gradient of the input,
      and nothing for that of the frozen weight. The first layer's input, the embedding, is frozen,
      too, so its query, key and value take no input gradient;
    - their adapters: 6 T R (in + out), less 2 T R in in the first layer;
    - causal self-attention: T (T + 1) / 2 pairs, 2 products forward and 4 backward;
    - cross-attention, whichever is less: keys and values of the features, which take no gradient,
      4 P D D, and attention onto them, 8 T P D; or absorbed, 8 T (H P D + D D);
    - adapters of keys and values, as the absorbed form has them: 4 P R D for U and its A of each
      layer, and 6 T R (D + H P) for each of keys and values.

    The vocabulary head (with BLIP's transform before it) is 4 T (weights).
    """
    layers: list[Any] = list(model.decoder.layers)
    num_heads, width = layers[0].crossattention.num_heads, model.vocabulary.in_features
    num_image_tokens = model.encoder.num_tokens
    assert model.encoder.width == width, "counted for features as wide as the decoder"
    total = 0
    for layer in layers:
        on_features = set(layer.crossattention.feature_layers)
        on_tokens = [linear for linear in _linears([layer]) if linear not in on_features]
        total += 4 * num_tokens * sum(linear.weight.numel() for linear in on_tokens)
        total += 6 * num_tokens * sum(map(_adapter_numel, on_tokens))
        total += 6 * num_tokens * (num_tokens + 1) * width
        total += min(
            4 * num_image_tokens * width * width + 8 * num_tokens * num_image_tokens * width,
            8 * num_tokens * (num_heads * num_image_tokens * width + width * width),
        )
        ranks = [linear.rank for linear in on_features if isinstance(linear, LoRALinear)]
        total += 4 * num_image_tokens * width * sum(ranks)
        if ranks:
            total += 12 * num_tokens * ranks[0] * (width + num_heads * num_image_tokens)
    total -= _first_input_gradient(layers[0], num_tokens)
    head = sum(linear.weight.numel() for linear in _head(model))
    return total + 4 * num_tokens * head


def _first_input_gradient(layer: Any, num_tokens: int) -> int:
    """The input gradient that the first layer's self-attention need not compute."""
    is_blip = hasattr(layer, "attention")
    linears = layer.attention.self.values() if is_blip else [layer.attn.c_attn]
    weights = sum(linear.weight.numel() for linear in linears)
    adapters = sum(
        linear.lora_A.numel() for linear in linears if isinstance(linear, LoRALinear)
    )
    return 2 * num_tokens * (weights + adapters)


def _head(model: CaptioningModel) -> Iterator[Linear]:
    return _linears([getattr(model.decoder, "cls", model.vocabulary)])


def _linears(modules: Iterable[nn.Module]) -> Iterator[Linear]:
    for module in modules:
        yield from (child for child in module.modules() if isinstance(child, Linear))


def _adapter_numel(linear: Linear) -> int:
    return linear.lora_A.numel() + linear.lora_B.numel() if isinstance(linear, LoRALinear) else 0
