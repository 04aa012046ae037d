"""Checkpoints of the published sizes with random weights: speed does not depend on the weights.

The sizes are from the published config.json files (Salesforce/blip-image-captioning-base,
nlpconnect/vit-gpt2-image-captioning), with transformers' class defaults for missing values.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

MODELS = ("blip", "vit_gpt2")

_BLIP: dict[str, Any] = {
    "text_config": {
        "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "encoder_hidden_size": 768, "is_decoder": True,
        "bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 384, "patch_size": 16, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
}
_VIT_GPT2: dict[str, Any] = {
    "encoder": {
        "model_type": "vit", "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "qkv_bias": True,
    },
    "decoder": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "add_cross_attention": True, "is_decoder": True,
        "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256,
    },
    "decoder_start_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256,
}
_SMALL_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 4}


def configuration(
    model: str, *, small: bool = False, dropout: float = 0.1
) -> BlipConfig | VisionEncoderDecoderConfig:
    """The configuration of `model`, one of MODELS; for `small` and `dropout`, see below."""
    if model == "blip":
        text, vision = dict(_BLIP["text_config"]), dict(_BLIP["vision_config"])
        if small:
            text |= _SMALL_WIDTHS | {"encoder_hidden_size": 64}
            vision |= _SMALL_WIDTHS | {"image_size": 64}
        return BlipConfig(text_config=text, vision_config=vision)
    parts = {**_VIT_GPT2, "encoder": dict(_VIT_GPT2["encoder"]),
             "decoder": dict(_VIT_GPT2["decoder"])}
    parts["decoder"] |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    if small:
        parts["encoder"] |= _SMALL_WIDTHS | {"image_size": 64}
        parts["decoder"] |= {"n_embd": 64, "n_layer": 2, "n_head": 4}
    return VisionEncoderDecoderConfig.from_dict(parts)


def write_checkpoint(
    model: str, folder: Path, *, small: bool = False, seed: int = 0, dropout: float = 0.1
) -> None:
    """Write `model`, one of MODELS, with random weights: config.json and model.safetensors.

    With `small`, two layers of width 64 on 64-pixel images, to try a benchmark. `dropout` applies
    to GPT-2's attention, embeddings and residuals (0.1 as published); BLIP has none.
    """
    torch.manual_seed(seed)
    kind: Any = BlipForConditionalGeneration if model == "blip" else VisionEncoderDecoderModel
    kind(configuration(model, small=small, dropout=dropout)).save_pretrained(folder)
