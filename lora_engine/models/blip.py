"""BLIP's captioner (arXiv:2201.12086): a Vision Transformer and a BERT-like causal decoder.

The decoder is post-norm BERT with a cross-attention in every layer. Its modules have Hugging Face's
paths (`text_decoder.bert.encoder.layer.0.attention.self.query`), so weights, LoRA targets and
adapters match by name; only the encoder is renamed (vit.py).

Axes: B images, N rows (a multiple of B), T caption tokens, P image tokens, D width, E width of the
features, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_engine.lora.layer import project
from lora_engine.lora.matmul import compute_dtype
from lora_engine.models import vit
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.attention import (
    KeyValueCache,
    LayerCache,
    causal_self_attention,
)
from lora_engine.models.config_values import (
    fraction,
    valid_activation,
    valid_num_heads,
    whole_number,
)
from lora_engine.models.cross_attention import cross_attention, low_rank_features
from lora_engine.models.embedding import Embedding
from lora_engine.models.vit import VisionTransformer

# The head's bias may be stored under either name, or under both; transformers ties them.
HEAD_BIASES = ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias")
UNUSED = r"text_decoder\.bert\.embeddings\.position_ids"  # an old buffer, 0, 1, 2, ...


class Attention(nn.Module):
    """Self- or cross-attention with its output projection, residual and norm."""

    def __init__(
        self,
        width: int,
        key_width: int,
        num_heads: int,
        *,
        eps: float,
        attention_dropout: float,
        hidden_dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.self = nn.ModuleDict({
            "query": nn.Linear(width, width),
            "key": nn.Linear(key_width, width),
            "value": nn.Linear(key_width, width),
        })
        self.output = nn.ModuleDict({
            "dense": nn.Linear(width, width),
            "LayerNorm": nn.LayerNorm(width, eps=eps),
        })

    @property
    def feature_layers(self) -> tuple[nn.Module, nn.Module]:
        """The layers of keys and values of a cross-attention."""
        return self.self["key"], self.self["value"]

    def forward(
        self,
        x: Tensor,
        features: Tensor | None,
        low_ranks: Sequence[Tensor | None],
        cache: LayerCache | None,
    ) -> Tensor:  # (N, T, D) -> (N, T, D)
        settings: dict[str, Any] = {
            "num_heads": self.num_heads,
            "scale": self.scale,
            "dropout": self.attention_dropout if self.training else 0.0,
            "cache": cache,
        }
        if features is None:
            heads = project(x, self.self["query"], self.self["key"], self.self["value"])
            context = causal_self_attention(*heads, **settings)
        else:
            (query,) = project(x, self.self["query"])
            context = cross_attention(
                query, features, self.feature_layers, low_ranks, **settings
            )
        (out,) = project(context, self.output["dense"])
        out = F.dropout(out, self.hidden_dropout, self.training)
        return self.output["LayerNorm"](x + out)


class DecoderLayer(nn.Module):
    def __init__(
        self, width: int, features_width: int, num_heads: int, mlp_width: int, *, act: str, **rest
    ) -> None:
        super().__init__()
        self.hidden_dropout = rest["hidden_dropout"]
        self.act = ACTIVATIONS[act]
        self.attention = Attention(width, width, num_heads, **rest)
        self.crossattention = Attention(width, features_width, num_heads, **rest)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = nn.ModuleDict({
            "dense": nn.Linear(mlp_width, width),
            "LayerNorm": nn.LayerNorm(width, eps=rest["eps"]),
        })

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        low_ranks: Sequence[Tensor | None],
        cache: LayerCache | None = None,
    ) -> Tensor:  # (N, T, D), (B, P, E) -> (N, T, D)
        x = self.attention(x, None, (), cache)
        x = self.crossattention(x, features, low_ranks, cache)
        (out,) = project(x, self.intermediate["dense"])
        (out,) = project(self.act(out), self.output["dense"])
        return self.output["LayerNorm"](x + F.dropout(out, self.hidden_dropout, self.training))


class Embeddings(nn.Module):
    def __init__(
        self, vocab_size: int, max_positions: int, width: int, *, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.word_embeddings = Embedding(vocab_size, width)
        self.position_embeddings = Embedding(max_positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, input_ids: Tensor, past: int) -> Tensor:  # (N, T) -> (N, T, D)
        positions = self.position_embeddings.weight[past : past + input_ids.shape[1]]
        x = self.LayerNorm(self.word_embeddings(input_ids) + positions)
        return F.dropout(x, self.dropout, self.training)


class TextDecoder(nn.Module):
    """Token ids and image features -> hidden states; `BlipCaptioner.head` computes logits.

    No argument has a default: with a wrong number of heads, for example, a checkpoint would load
    without an error and caption nonsense.
    """

    def __init__(
        self,
        *,
        width: int,
        features_width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        vocab_size: int,
        max_positions: int,
        eps: float,
        act: str,
        hidden_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.max_positions = max_positions
        layers = [
            DecoderLayer(
                width,
                features_width,
                num_heads,
                mlp_width,
                act=act,
                eps=eps,
                attention_dropout=attention_dropout,
                hidden_dropout=hidden_dropout,
            )
            for _ in range(num_layers)
        ]
        embeddings = Embeddings(vocab_size, max_positions, width, eps=eps, dropout=hidden_dropout)
        self.bert = nn.ModuleDict({
            "embeddings": embeddings,
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
        })
        transform = nn.ModuleDict({
            "dense": nn.Linear(width, width),
            "LayerNorm": nn.LayerNorm(width, eps=eps),
        })
        predictions = {"transform": transform, "decoder": nn.Linear(width, vocab_size)}
        self.cls = nn.ModuleDict({"predictions": nn.ModuleDict(predictions)})
        self.act = ACTIVATIONS[act]

    @property
    def layers(self) -> nn.ModuleList:
        return self.bert["encoder"]["layer"]

    def forward(self, input_ids: Tensor, features: Tensor, cache: KeyValueCache | None) -> Tensor:
        x = self.bert["embeddings"](input_ids, past=0 if cache is None else cache.length)
        features = features.to(compute_dtype(features))
        layers: list[Any] = list(self.layers)
        low_ranks = low_rank_features(
            features, [layer.crossattention.feature_layers for layer in layers], cache
        )
        for index, layer in enumerate(layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, features, low_ranks[index], use_reentrant=False)
            else:
                x = layer(x, features, low_ranks[index], None if cache is None else cache[index])
        return x

    @property
    def vocabulary(self) -> nn.Linear:
        return self.cls["predictions"]["decoder"]

    def head_input(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., D)
        transform = self.cls["predictions"]["transform"]
        (out,) = project(hidden, transform["dense"])
        return transform["LayerNorm"](self.act(out))


class BlipCaptioner(nn.Module):
    """BLIP for captioning; implements `protocol.CaptioningModel`."""

    lora_groups: Mapping[str, str] = {
        "attention": r".*\.(self\.(query|key|value)|(attention|crossattention)\.output\.dense)",
        "feed_forward": r".*\.layer\.\d+\.(intermediate|output)\.dense",
    }
    lora_scope = r"text_decoder\.bert\.encoder\.layer\..*"
    fan_in_fan_out = False
    tied_head = (
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.bert.embeddings.word_embeddings.weight",
    )

    def __init__(self, vision_model: VisionTransformer, text_decoder: TextDecoder) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.text_decoder = text_decoder

    @property
    def encoder(self) -> VisionTransformer:
        return self.vision_model

    @property
    def decoder(self) -> TextDecoder:
        return self.text_decoder

    def encode(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model(pixel_values)

    def decode(
        self, input_ids: Tensor, features: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        return self.text_decoder(input_ids, features, cache)

    @property
    def vocabulary(self) -> nn.Linear:
        return self.text_decoder.vocabulary

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.text_decoder.head_input(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return project(self.head_input(hidden), self.vocabulary)[0]


def from_config(config: Any) -> BlipCaptioner:
    """The model of a transformers `BlipConfig`; raises ValueError for a value out of range."""
    text = config.text_config
    decoder = TextDecoder(
        width=whole_number(text, "hidden_size", "width"),
        features_width=whole_number(config.vision_config, "hidden_size", "width"),
        num_layers=whole_number(text, "num_hidden_layers", "layers"),
        num_heads=valid_num_heads(text.num_attention_heads, text.hidden_size),
        mlp_width=whole_number(text, "intermediate_size", "width"),
        vocab_size=whole_number(text, "vocab_size", "vocabulary"),
        max_positions=whole_number(text, "max_position_embeddings", "positions"),
        eps=fraction(text, "layer_norm_eps"),
        act=valid_activation(text.hidden_act),
        hidden_dropout=fraction(text, "hidden_dropout_prob"),
        attention_dropout=fraction(text, "attention_probs_dropout_prob"),
    )
    return BlipCaptioner(vit.from_config(config.vision_config), decoder)


def special_ids(config: Any) -> tuple[int, int, int]:
    """(start, end, pad) of captions."""
    text = config.text_config  # BLIP does not use its eos_token_id: captions end with [SEP]
    pads = text.pad_token_id, getattr(config, "pad_token_id", None), text.sep_token_id
    return text.bos_token_id, text.sep_token_id, next(pad for pad in pads if pad is not None)


def convert_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of `BlipCaptioner`."""
    prefix = "vision_model."
    state = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    vision = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    state |= {prefix + k: v for k, v in vit.convert_names(vision).items()}
    state.pop("text_decoder.bert.embeddings.position_ids", None)  # an old buffer, 0, 1, 2, ...
    # The head's bias may be stored under two names.
    bias = state.pop("text_decoder.cls.predictions.bias", None)
    if bias is not None:
        state.setdefault("text_decoder.cls.predictions.decoder.bias", bias)
    return state
