"""ViT + GPT-2: transformers' VisionEncoderDecoderModel of a vision encoder and a GPT-2.

The encoder is one of `ENCODERS` (vit.py, swin.py).

The decoder is pre-norm GPT-2 with a cross-attention in every block. Its modules have Hugging Face's
paths (`decoder.transformer.h.0.attn.c_attn`), so weights, LoRA targets and adapters match by name.
`convert_state` transposes GPT-2's Conv1D weights (in, out) to those of `nn.Linear` (out, in); the
fused `c_attn` stays one linear layer.

Axes: B images, N rows (a multiple of B), T caption tokens, P image tokens, D width, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_engine.lora.layer import project
from lora_engine.lora.matmul import compute_dtype
from lora_engine.models import swin, vit
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
from lora_engine.models.protocol import CaptioningModel
from lora_engine.models.swin import SwinTransformer
from lora_engine.models.vit import VisionTransformer

# The model types of encoders.
ENCODERS = (
    "vit", "deit", "beit", "clip_vision_model", "dinov2", "dinov2_with_registers", "swin",
)
# Tensors of encoders that captions do not depend on, and buffers of old checkpoints.
_UNUSED = re.compile(
    r"pooler\..*|post_layernorm\..*|embeddings\.(mask_token|position_ids)|.*relative_position_index"
)
UNUSED = (
    rf"encoder\.(vision_model\.)?({_UNUSED.pattern})|.*\.(attn|crossattention)\.(masked_)?bias"
)
# transformers 5 names the modules of encoders differently from their checkpoints.
_LAYERS = tuple(
    (rf"(encoder\..*)\.{stored}\.", rf"\1.{module}.")
    for stored, module in (
        (r"attention\.(?:attention|self)\.query", "attention.q_proj"),
        (r"attention\.(?:attention|self)\.key", "attention.k_proj"),
        (r"attention\.(?:attention|self)\.value", "attention.v_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    )
)
OTHER_NAMES = (_LAYERS, (*_LAYERS, (r"encoder\.encoder\.layer\.", "encoder.layers.")))


class Attention(nn.Module):
    """Self-attention (`c_attn`: query, key, value) or cross-attention (`q_attn`: query; `c_attn`:
    key, value).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        is_cross: bool,
        scale: float,
        attention_dropout: float,
        residual_dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.c_attn = nn.Linear(width, (2 if is_cross else 3) * width)
        if is_cross:
            self.q_attn = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, width)

    @property
    def feature_layers(self) -> tuple[nn.Module]:
        """The layer of keys and values of a cross-attention."""
        return (self.c_attn,)

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
            (heads,) = project(x, self.c_attn)
            context = causal_self_attention(*heads.chunk(3, dim=-1), **settings)
        else:
            (query,) = project(x, self.q_attn)
            context = cross_attention(
                query, features, self.feature_layers, low_ranks, **settings
            )
        (out,) = project(context, self.c_proj)
        return F.dropout(out, self.residual_dropout, self.training)


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        act: str,
        eps: float,
        **rest,
    ) -> None:
        super().__init__()
        self.residual_dropout = rest["residual_dropout"]
        self.act = ACTIVATIONS[act]
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, is_cross=False, **rest)
        self.ln_cross_attn = nn.LayerNorm(width, eps=eps)
        self.crossattention = Attention(width, num_heads, is_cross=True, **rest)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({
            "c_fc": nn.Linear(width, mlp_width),
            "c_proj": nn.Linear(mlp_width, width),
        })

    def forward(
        self,
        x: Tensor,
        features: Tensor,
        low_ranks: Sequence[Tensor | None],
        cache: LayerCache | None = None,
    ) -> Tensor:  # (N, T, D), (B, P, D) -> (N, T, D)
        x = x + self.attn(self.ln_1(x), None, (), cache)
        x = x + self.crossattention(self.ln_cross_attn(x), features, low_ranks, cache)
        (out,) = project(self.ln_2(x), self.mlp["c_fc"])
        (out,) = project(self.act(out), self.mlp["c_proj"])
        return x + F.dropout(out, self.residual_dropout, self.training)


class GPT2Decoder(nn.Module):
    """Token ids and image features -> hidden states; `ViTGPT2Captioner.head` computes logits.

    `scale_by_width` and `scale_by_layer` are GPT-2's two ways to scale attention scores: by
    1 / sqrt(head width), and by 1 / (layer number + 1).
    """

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        vocab_size: int,
        max_positions: int,
        eps: float,
        act: str,
        embedding_dropout: float,
        attention_dropout: float,
        residual_dropout: float,
        scale_by_width: bool,
        scale_by_layer: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.max_positions = max_positions
        self.embedding_dropout = embedding_dropout
        scale = (width // num_heads) ** -0.5 if scale_by_width else 1.0
        blocks = [
            Block(
                width,
                num_heads,
                mlp_width,
                act=act,
                eps=eps,
                scale=scale / (index + 1) if scale_by_layer else scale,
                attention_dropout=attention_dropout,
                residual_dropout=residual_dropout,
            )
            for index in range(num_layers)
        ]
        self.transformer = nn.ModuleDict({
            "wte": Embedding(vocab_size, width),
            "wpe": Embedding(max_positions, width),
            "h": nn.ModuleList(blocks),
            "ln_f": nn.LayerNorm(width, eps=eps),
        })
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.transformer["h"]

    def forward(self, input_ids: Tensor, features: Tensor, cache: KeyValueCache | None) -> Tensor:
        past = 0 if cache is None else cache.length
        positions = self.transformer["wpe"].weight[past : past + input_ids.shape[1]]
        x = self.transformer["wte"](input_ids) + positions
        x = F.dropout(x, self.embedding_dropout, self.training)
        features = features.to(compute_dtype(features))
        blocks: list[Any] = list(self.layers)
        low_ranks = low_rank_features(
            features, [block.crossattention.feature_layers for block in blocks], cache
        )
        for index, block in enumerate(blocks):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, features, low_ranks[index], use_reentrant=False)
            else:
                x = block(x, features, low_ranks[index], None if cache is None else cache[index])
        return self.transformer["ln_f"](x)


class ViTGPT2Captioner(nn.Module):
    """ViT + GPT-2 for captioning; implements `protocol.CaptioningModel`.

    `enc_to_dec_proj` connects an encoder and a decoder of different widths; it is frozen, and its
    outputs are the features.
    """

    lora_groups: Mapping[str, str] = {
        "attention": r".*\.(attn|crossattention)\.(c_attn|q_attn|c_proj)",
        "feed_forward": r".*\.mlp\.(c_fc|c_proj)",
    }
    lora_scope = r"decoder\.transformer\.h\..*"
    fan_in_fan_out = True  # Conv1D in transformers
    tied_head = ("decoder.lm_head.weight", "decoder.transformer.wte.weight")

    def __init__(
        self, encoder: VisionTransformer | SwinTransformer, decoder: GPT2Decoder
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        width = decoder.transformer["wte"].embedding_dim
        self.enc_to_dec_proj = (
            nn.Linear(encoder.width, width) if encoder.width != width else None
        )

    def encode(self, pixel_values: Tensor) -> Tensor:
        features = self.encoder(pixel_values)
        if self.enc_to_dec_proj is not None:
            (features,) = project(features, self.enc_to_dec_proj)
        return features

    def decode(
        self, input_ids: Tensor, features: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        return self.decoder(input_ids, features, cache)

    @property
    def vocabulary(self) -> nn.Linear:
        return self.decoder.lm_head

    def head_input(self, hidden: Tensor) -> Tensor:
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return project(hidden, self.vocabulary)[0]


def from_config(config: Any) -> ViTGPT2Captioner:
    """The model of a transformers `VisionEncoderDecoderConfig` of one of `ENCODERS` and a GPT-2.

    Raises ValueError for a value out of range.
    """
    encoder, decoder = config.encoder, config.decoder
    width = whole_number(decoder, "n_embd", "width")
    gpt2 = GPT2Decoder(
        width=width,
        num_layers=whole_number(decoder, "n_layer", "layers"),
        num_heads=valid_num_heads(decoder.n_head, width),
        mlp_width=4 * width if not decoder.n_inner else whole_number(decoder, "n_inner", "width"),
        vocab_size=whole_number(decoder, "vocab_size", "vocabulary"),
        max_positions=whole_number(decoder, "n_positions", "positions"),
        eps=fraction(decoder, "layer_norm_epsilon"),
        act=valid_activation(decoder.activation_function),
        embedding_dropout=fraction(decoder, "embd_pdrop"),
        attention_dropout=fraction(decoder, "attn_pdrop"),
        residual_dropout=fraction(decoder, "resid_pdrop"),
        scale_by_width=decoder.scale_attn_weights,
        scale_by_layer=decoder.scale_attn_by_inverse_layer_idx,
    )
    if encoder.model_type == "swin":
        return ViTGPT2Captioner(swin.from_config(encoder), gpt2)
    return ViTGPT2Captioner(vit.from_config(encoder, **vit.variant(encoder)), gpt2)


def fit_images(model: CaptioningModel, image_size: tuple[int, int]) -> None:
    """Let an encoder take images of this size, if transformers' does: a DINOv2."""
    if isinstance(model.encoder, VisionTransformer):
        model.encoder.resize(image_size)


def special_ids(config: Any) -> tuple[int, int, int]:
    """(start, end, pad) of captions; raises ValueError if the configuration lacks one."""
    def first(*names: str) -> int:
        for name in names:
            for part in (config, config.decoder):
                if getattr(part, name, None) is not None:
                    return getattr(part, name)
        raise ValueError(f"neither config.json nor its decoder part has {names[0]}")

    return (
        first("decoder_start_token_id", "bos_token_id"),
        first("eos_token_id"),
        first("pad_token_id", "eos_token_id"),
    )


def convert_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of `ViTGPT2Captioner`.

    Left out: what captions do not depend on, such as a ViT's pooler, and the causal masks that old
    GPT-2 checkpoints store as buffers.
    """
    prefix = "encoder."
    vision = {
        name: tensor for k, tensor in tensors.items() if k.startswith(prefix)
        # Older versions of transformers have CLIP's encoder one level deeper.
        and not _UNUSED.fullmatch(name := k.removeprefix(prefix).removeprefix("vision_model."))
    }
    is_swin = any(re.match(r"encoder\.layers\.\d+\.blocks\.", name) for name in vision)
    renamed = swin.convert_names(vision) if is_swin else vit.convert_names(vision)
    state = {prefix + name: tensor for name, tensor in renamed.items()}
    for name, tensor in tensors.items():
        if name.startswith(prefix) or re.search(r"\.(attn|crossattention)\.(masked_)?bias$", name):
            continue
        is_conv1d = re.search(r"\.h\.\d+\..*(c_attn|q_attn|c_proj|c_fc)\.weight$", name)
        state[name] = tensor.T.contiguous() if is_conv1d else tensor
    return state
