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
from pictures import json_lines, settings
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_engine.captioning.adapted_captioner import with_tensors
from lora_engine.captioning.generation import generate
from lora_engine.captioning.merging import export_merged
from lora_engine.data.pixels import normalize, to_pixels
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.lora.adapter import load_adapter, read_adapter
from lora_engine.lora.adapter_config import AdapterError
from lora_engine.models.pretrained import PretrainedError, load_captioner
from lora_engine.models.weights import read_checkpoint
from lora_engine.training.loop import train

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


def write(kind: str, path: Path) -> Path:
    encoder, preprocessor = KINDS[kind]
    path.mkdir(exist_ok=True)
    checkpoints.write_vit_gpt2(path, encoder=encoder)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return write(request.param, tmp_path_factory.mktemp(request.param))


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


@pytest.mark.parametrize("precision, bound", [("bf16", 0.02), ("int8", 0.05)])
def test_other_encoders_compute_in_other_precisions(folder, precision, bound):
    captioner = load_captioner(folder)
    encoder = FeatureEncoder(
        captioner, device=torch.device("cpu"), dtype=torch.float32, precision=precision
    )
    pixels = torch.randint(0, 256, (3, 3, *captioner.pixels.size), dtype=torch.uint8)
    features = encoder.unpack(encoder.encode(pixels))
    assert features.shape == (3, captioner.model.encoder.num_tokens, 64)
    assert torch.equal(encoder.unpack(encoder.encode(pixels[1:2])), features[1:2])
    assert 0 < encoder.relative_error(pixels) < bound


def test_a_captioner_of_another_encoder_trains_and_merges(data, tmp_path):
    """Losses of kept and of fresh features are equal; transformers loads the merged folder."""
    folder, runs = write("swin", tmp_path / "base"), {}
    for cache in ("memory", "off"):
        config = settings(folder, data, tmp_path / cache, max_steps=3, cache=cache)
        train(config)
        runs[cache] = [
            line["loss"] for line in json_lines(tmp_path / cache / "metrics.jsonl")
        ]
    assert runs["memory"] == runs["off"] and len(set(runs["off"])) > 2
    adapted = load_captioner(folder)
    load_adapter(adapted.model, read_adapter(tmp_path / "off" / "adapter"))
    pixels = np.stack([to_pixels(IMAGE, adapted.pixels)])
    assert export_merged(adapted, tmp_path / "merged", pixels=pixels).holds
    theirs = hugging_face(tmp_path / "merged")
    values = normalize(torch.from_numpy(pixels), adapted.pixels)
    input_ids = torch.randint(0, 300, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            adapted.model.head(adapted.model.decode(input_ids, adapted.model.encode(values))),
            hugging_face_logits(theirs, values, input_ids), rtol=1e-4, atol=1e-4,
        )


def test_other_position_embeddings_are_refused_where_they_are_interpolated(tmp_path):
    captioner = load_captioner(write("dinov2", tmp_path))
    name = "encoder.embeddings.position_embeddings"
    changed = {name: read_checkpoint(tmp_path)[name] + 1}
    with pytest.raises(AdapterError, match="replaces position embeddings, which are interpolated"):
        with_tensors(captioner, changed)


@pytest.mark.parametrize("kind, changes, words", [
    ("swin", {"window_size": 7}, r"stage 2 has 4 x 4 patches, fewer than a window of 7 x 7"),
    ("swin", {"num_heads": [2, 4]}, r"depths are \[1, 2, 2\], num_heads \[2, 4\]; expected"),
    ("beit", {"image_size": [64, 32]}, r"image size \[64, 32\]; expected the height to equal"),
    ("dinov2", {"image_size": [112, 56]}, r"image size \[112, 56\]; expected the height to equal"),
    ("dinov2", {"mlp_ratio": 10**6}, r"mlp_ratio is 1000000; expected a number above 0, up to 64"),
    ("clip", {"image_size": 32}, r"images of \(64, 64\), but the encoder .* takes \(32, 32\)"),
    ("clip", {"model_type": "convnext"}, "expected 'vit' or 'deit' or 'beit' or 'clip_vision_mod"),
])
def test_what_is_not_supported_is_said(tmp_path, kind, changes, words):
    write(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "clip" and "image_size" in changes:
        tensors = load_file(tmp_path / "model.safetensors")
        name = "encoder.embeddings.position_embedding.weight"
        tensors[name] = tensors[name][:5].clone()
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PretrainedError, match=words):
        load_captioner(tmp_path)


@pytest.mark.parametrize("model_type", ["blip-2", "git", "llava", "bert"])
def test_other_captioners_are_answered_with_what_is_supported(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(PretrainedError, match=(
        f"model_type '{model_type}', which is not a captioner supported here; "
        "expected 'blip' or 'vision-encoder-decoder' "
        r"\(BlipForConditionalGeneration, VisionEncoderDecoderModel\)$"
    )):
        load_captioner(tmp_path)


# --- other ways to store a checkpoint -------------------------------------------------------


@pytest.fixture
def copy(captioner_folder, tmp_path) -> Path:
    return shutil.copytree(captioner_folder, tmp_path / "copy")


@pytest.mark.parametrize("before, within", [
    ("module.", ""), ("_orig_mod.", ""), ("module._orig_mod.", ""), ("", "_orig_mod."),
])
def test_names_of_wrapped_modules_are_accepted(captioner_folder, copy, before, within):
    """As DistributedDataParallel and torch.compile, of the whole model or a part, name them."""
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {before + name.replace("decoder.", f"decoder.{within}", 1): tensor
         for name, tensor in tensors.items()}, copy / "model.safetensors",
    )
    fingerprints = load_captioner(captioner_folder).fingerprints
    assert load_captioner(copy).fingerprints == fingerprints


def test_older_names_and_buffers_of_encoders_are_accepted(tmp_path):
    """CLIP's encoder used to be one level deeper, and BEiT stored its indices."""
    for kind, prefix, buffer in (
        ("clip", "encoder.vision_model.", "embeddings.position_ids"),
        ("beit", "encoder.",
         "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"),
    ):
        folder = write(kind, tmp_path / kind)
        expected = load_captioner(folder).fingerprints
        tensors = {
            name.replace("encoder.", prefix, 1) if name.startswith("encoder.") else name: tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        tensors[prefix + buffer] = torch.arange(9)
        save_file(tensors, folder / "model.safetensors")
        assert load_captioner(folder).fingerprints == expected


def test_a_name_with_and_without_a_wrapper_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    name = next(iter(tensors))
    tensors[f"_orig_mod.{name}"] = tensors[name].clone()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(PretrainedError, match="with and without _orig_mod"):
        load_captioner(copy)


@pytest.mark.parametrize("generation, expected", [({"pad_token_id": 5}, 5), ({}, "end")])
def test_a_pad_token_is_looked_up_in_generation_config_then_is_the_end(
    copy, generation, expected
):
    config = json.loads((copy / "config.json").read_text())
    for part in (config, config.get("decoder", {}), config.get("text_config", {})):
        part["pad_token_id"] = None
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_captioner(copy).tokenizer
    assert tokenizer.pad_id == (tokenizer.end_id if expected == "end" else expected)


@pytest.mark.parametrize("decoder", [
    {"n_layer": 1, "n_embd": 96, "n_head": 6, "activation_function": "gelu_fast"},
    {"activation_function": "swish", "n_inner": 40, "scale_attn_by_inverse_layer_idx": True},
    {"activation_function": "tanh", "reorder_and_upcast_attn": True},
])
def test_other_gpt2s_decode_as_hugging_faces(tmp_path, decoder):
    checkpoints.write_vit_gpt2(tmp_path, decoder=decoder)
    model, theirs = load_captioner(tmp_path).model, hugging_face(tmp_path)
    pixels, input_ids = random_pixels(2), torch.randint(0, 300, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(
            model.head(model.decode(input_ids, model.encode(pixels))),
            hugging_face_logits(theirs, pixels, input_ids), rtol=1e-5, atol=1e-5,
        )
