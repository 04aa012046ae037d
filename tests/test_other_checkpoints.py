"""Checkpoints beside the published two: other encoders, and other ways to store them.

transformers' VisionEncoderDecoderModel is the reference: equal features, logits and tokens.
"""

import json
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import hugging_face, hugging_face_logits, random_pixels
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_engine.captioning.generation import generate
from lora_engine.data.pixels import normalize, to_pixels
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.models.pretrained import PretrainedError, load_captioner

SQUARE = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
CROPPED = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
KINDS = {
    "beit": (
        {"model_type": "beit", "use_relative_position_bias": True, "use_mask_token": True},
        SQUARE | {"image_processor_type": "BeitImageProcessor"},
    ),
    "beit_shared": (
        {"model_type": "beit", "use_shared_relative_position_bias": True,
         "use_absolute_position_embeddings": True, "use_mean_pooling": False,
         "layer_scale_init_value": 0.0, "hidden_act": "gelu_fast"},
        SQUARE,
    ),
    "clip": (
        {"model_type": "clip_vision_model", "hidden_size": 48, "patch_size": 16},
        CROPPED | {"image_processor_type": "CLIPImageProcessor"},
    ),
    "dinov2": (  # published ones are trained on larger images than the preprocessor makes
        {"model_type": "dinov2", "image_size": 112, "patch_size": 14, "mlp_ratio": 2},
        CROPPED | {"image_processor_type": "BitImageProcessor",
                   "crop_size": {"height": 70, "width": 84}},
    ),
    "dinov2_registers": (
        {"model_type": "dinov2_with_registers", "patch_size": 8, "image_size": 80,
         "use_swiglu_ffn": True, "num_register_tokens": 3},
        SQUARE,
    ),
    "swin": (  # grids of 16, 8 and 4 patches
        {"model_type": "swin", "embed_dim": 24, "depths": [1, 2, 2], "num_heads": [2, 4, 8],
         "window_size": 4, "patch_size": 4, "image_size": 64, "use_absolute_embeddings": True},
        SQUARE,
    ),
    "swin_padded": (  # 13 x 9 and 7 x 5 patches
        {"model_type": "swin", "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "patch_size": 5, "image_size": [64, 44], "mlp_ratio": 2.5},
        SQUARE | {"size": {"height": 64, "width": 44}},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    encoder, preprocessor = KINDS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.write_vit_gpt2(path, encoder=encoder)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


IMAGE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
)


def test_features_logits_and_tokens_equal_hugging_faces(folder):
    from transformers import AutoImageProcessor

    captioner, theirs = load_captioner(folder), hugging_face(folder)
    model, tokenizer = captioner.model, captioner.tokenizer
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected_pixels = processor([IMAGE], return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(to_pixels(IMAGE, captioner.pixels))[None]
    torch.testing.assert_close(
        normalize(pixels, captioner.pixels), expected_pixels, rtol=1e-5, atol=1e-5
    )
    pixels = torch.cat([expected_pixels, torch.randn(2, *expected_pixels.shape[1:])])
    input_ids = torch.randint(0, 300, (3, 7))
    with torch.no_grad():
        features = model.encode(pixels)
        expected = theirs.encoder(pixels).last_hidden_state
        if theirs.encoder.config.hidden_size != 64:
            expected = theirs.enc_to_dec_proj(expected)
        assert expected.std() > 0.1
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.head(model.decode(input_ids, features)),
            hugging_face_logits(theirs, pixels, input_ids), rtol=1e-5, atol=1e-5,
        )
    assert model.encoder.num_tokens == features.shape[1]
    tokens = generate(
        model, features, prompt_ids=tokenizer.prompt_ids(""), end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id, max_new_tokens=8,
    )
    theirs_tokens = theirs.generate(
        pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=8
    )
    assert torch.equal(tokens, theirs_tokens)
