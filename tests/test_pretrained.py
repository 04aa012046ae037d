"""Loading checkpoints: every published way of storing them, and errors for bad ones."""

import builtins
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import checkpoints
import huggingface_hub
import pytest
import torch
from checkpoints import (
    hugging_face,
    hugging_face_logits,
    random_pixels,
    write_one,
    write_shards,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lora_engine.data.pixels import PixelSettings
from lora_engine.models import pretrained
from lora_engine.models.families import FAMILIES
from lora_engine.models.model_folder import PretrainedError
from lora_engine.models.pixel_settings import PREPROCESSORS
from lora_engine.models.pretrained import build_from_config, load_captioner, load_tokenizer
from lora_engine.models.weights import fingerprint


@pytest.fixture
def folder(captioner_folder, tmp_path) -> Path:
    """A copy of each family's checkpoint, free to be changed."""
    return shutil.copytree(captioner_folder, tmp_path / "copy")


@pytest.fixture
def blip(blip_folder, tmp_path) -> Path:
    return shutil.copytree(blip_folder, tmp_path / "copy")


@pytest.fixture
def vit_gpt2(vit_gpt2_folder, tmp_path) -> Path:
    return shutil.copytree(vit_gpt2_folder, tmp_path / "copy")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def head_and_embedding(folder: Path) -> tuple[str, str]:
    return load_captioner(folder).model.tied_head


def base_of(folder: Path) -> str:
    return load_captioner(folder).fingerprints["base"]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def assert_equal_to_hugging_face(folder: Path) -> None:
    captioner = load_captioner(folder)
    pixels, input_ids = random_pixels(2), torch.randint(20, 200, (2, 6))
    with torch.no_grad():
        ours = captioner.model.head(captioner.model.decode(
            input_ids, captioner.model.encode(pixels)))
        theirs = hugging_face_logits(hugging_face(folder), pixels, input_ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- every way of storing weights -----------------------------------------------------------


def test_a_loaded_captioner_is_frozen_in_evaluation_mode_and_fp32(captioner):
    assert not captioner.model.training
    for parameter in captioner.model.parameters():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
        assert parameter.device.type == "cpu"


@pytest.mark.parametrize("write", [write_one, write_shards])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_safetensors_and_bin_whole_and_in_shards_load_alike(
    captioner_folder, folder, write, suffix
):
    tensors = read(folder)
    (folder / "model.safetensors").unlink()
    write(folder, tensors, suffix)
    captioner, expected = load_captioner(folder), load_captioner(captioner_folder)
    assert same_weights(captioner.model, expected.model)
    assert captioner.fingerprints["base"] == expected.fingerprints["base"]


def test_safetensors_are_read_before_bin_and_one_file_before_shards(blip):
    (blip / "pytorch_model.bin").write_bytes(b"not to be touched")
    (blip / "model.safetensors.index.json").write_bytes(b"not to be touched")
    load_captioner(blip)


def test_weights_stored_in_half_precision_become_fp32(folder):
    halves = {name: tensor.half() for name, tensor in read(folder).items()}
    rewrite(folder, halves)
    model = load_captioner(folder).model
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    head, _ = model.tied_head
    stored = next(halves[name] for name in model.tied_head if name in halves)
    assert torch.equal(model.get_parameter(head), stored.float())


@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_a_tied_head_is_one_tensor_however_it_is_stored(captioner_folder, folder, kept):
    expected = load_captioner(captioner_folder)
    head, embedding = expected.model.tied_head
    tensors = read(folder)
    shared = tensors.pop(head, tensors.pop(embedding, None))
    tensors |= {name: shared for name in {"embedding": [embedding], "head": [head],
                                          "both": [head, embedding]}[kept]}
    rewrite(folder, tensors)
    captioner = load_captioner(folder)
    assert captioner.model.get_parameter(head) is captioner.model.get_parameter(embedding)
    assert captioner.fingerprints["base"] == expected.fingerprints["base"]
    assert_equal_to_hugging_face(folder)


def test_an_untied_head_stays_apart(folder):
    head, embedding = head_and_embedding(folder)
    tensors = read(folder)
    tensors[embedding] = tensors.get(embedding, tensors.get(head))
    tensors[head] = tensors[embedding] + 0.1
    rewrite(folder, tensors)
    model = load_captioner(folder).model
    assert torch.equal(model.get_parameter(head), tensors[head])
    assert torch.equal(model.get_parameter(embedding), tensors[embedding])
    assert_equal_to_hugging_face(folder)


def test_blips_head_bias_may_be_stored_once_or_twice(blip_folder, blip):
    stem = "text_decoder.cls.predictions"
    tensors = read(blip)
    bias = tensors.pop(f"{stem}.bias", tensors.pop(f"{stem}.decoder.bias", None))
    assert bias.any()
    for names in ([f"{stem}.bias"], [f"{stem}.decoder.bias"],
                  [f"{stem}.bias", f"{stem}.decoder.bias"]):
        rewrite(blip, {name: t for name, t in tensors.items() if not name.endswith("ions.bias")
                       and not name.endswith("decoder.bias")} | {name: bias for name in names})
        captioner = load_captioner(blip)
        assert torch.equal(captioner.model.get_parameter(f"{stem}.decoder.bias"), bias)
        assert captioner.fingerprints["base"] == base_of(blip_folder)


def test_old_buffers_are_accepted(captioner_folder, folder):
    family = load_captioner(captioner_folder).family
    old = {"text_decoder.bert.embeddings.position_ids": torch.arange(96)[None]}
    if family != "blip":
        mask = torch.ones(1, 1, 96, 96, dtype=torch.uint8).tril()
        old = {
            f"decoder.transformer.h.{layer}.{attention}.{name}": value
            for layer in (0, 1) for attention in ("attn", "crossattention")
            for name, value in (("bias", mask), ("masked_bias", torch.tensor(-1e4)))
        }
    rewrite(folder, read(folder) | old)
    assert base_of(folder) == base_of(captioner_folder)


def test_the_unused_pooler_may_be_missing(vit_gpt2_folder, vit_gpt2):
    tensors = read(vit_gpt2)
    without = {name: t for name, t in tensors.items() if not name.startswith("encoder.pooler.")}
    assert len(without) == len(tensors) - 2
    rewrite(vit_gpt2, without)
    assert base_of(vit_gpt2) == base_of(vit_gpt2_folder)


# --- fingerprint, ids, pixels ---------------------------------------------------------------


def test_one_changed_weight_changes_the_fingerprint(captioner):
    model = captioner.model
    assert fingerprint(model) == captioner.fingerprints["base"]
    for parameter in (model.encoder.class_token, list(model.decoder.parameters())[-1]):
        entry = parameter.data.view(-1)[-1:]
        value = entry.clone()
        entry.copy_(torch.nextafter(value, value + 1))  # its very last bit
        assert fingerprint(model) != captioner.fingerprints["base"]
        entry.copy_(value)
    assert fingerprint(model) == captioner.fingerprints["base"]


def test_blip_starts_from_dec_and_stops_at_sep(blip_folder):
    tokenizer = load_captioner(blip_folder).tokenizer
    known = tokenizer.tokenizer
    assert tokenizer.start_id == len(known)  # [DEC], which the tokenizer does not know
    assert tokenizer.end_id == known.sep_token_id != 2  # the configuration's eos is not used
    assert tokenizer.pad_id == known.pad_token_id == 0
    assert tokenizer.max_positions == checkpoints.MAX_POSITIONS


def test_vit_gpt2_starts_stops_and_pads_with_one_id(vit_gpt2_folder):
    tokenizer = load_captioner(vit_gpt2_folder).tokenizer
    assert tokenizer.start_id == tokenizer.end_id == tokenizer.pad_id
    assert tokenizer.start_id == len(tokenizer.tokenizer) - 1


def test_start_token_may_stand_in_either_part_of_the_configuration(vit_gpt2):
    config = json.loads((vit_gpt2 / "config.json").read_text())
    config["decoder_start_token_id"], config["decoder"]["decoder_start_token_id"] = None, 7
    (vit_gpt2 / "config.json").write_text(json.dumps(config))
    assert load_captioner(vit_gpt2).tokenizer.start_id == 7


def test_pixel_settings_are_the_preprocessors(blip_folder, vit_gpt2_folder):
    blip, vit_gpt2 = (load_captioner(f).pixels for f in (blip_folder, vit_gpt2_folder))
    assert blip.size == vit_gpt2.size == (64, 64)
    assert (blip.resample, vit_gpt2.resample) == (3, 2)  # bicubic, bilinear
    assert blip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert vit_gpt2.std == (0.5, 0.5, 0.5)


# --- bad checkpoints ------------------------------------------------------------------------


def assert_refused(folder, *messages: str, **arguments) -> None:
    with pytest.raises(PretrainedError) as caught:
        load_captioner(folder, **arguments)
    for message in messages:
        assert message in str(caught.value)


def test_unknown_missing_and_misshapen_tensors_are_all_listed(folder):
    tensors = read(folder)
    names = sorted(name for name in tensors if "decoder" in name and name.endswith(".bias"))
    gone, wrong = names[0], names[1]
    shape = tuple(tensors[wrong].shape)
    del tensors[gone]
    rewrite(folder, tensors | {wrong: torch.zeros(5), "decoder.extra.weight": torch.zeros(1)})
    assert_refused(
        folder, str(folder), "unknown tensor decoder.extra.weight", f"missing tensor {gone}",
        f"{wrong} is (5,), config.json says {shape}",
    )


def test_an_unknown_tensor_of_the_encoder_is_refused(folder):
    prefix = "vision_model" if head_and_embedding(folder)[0].startswith("text") else "encoder"
    rewrite(folder, read(folder) | {f"{prefix}.surprise": torch.zeros(1)})
    assert_refused(folder, f"unknown tensor {prefix}.surprise")


def test_a_missing_query_of_the_encoder_is_missed(vit_gpt2):
    tensors = read(vit_gpt2)
    query = "encoder.encoder.layer.0.attention.attention.query.weight"
    del tensors[query]
    rewrite(vit_gpt2, tensors)
    assert_refused(vit_gpt2, "missing tensor encoder.layers.0.qkv.weight")


def test_a_missing_embedding_is_missed(folder):
    names = head_and_embedding(folder)
    rewrite(folder, {name: t for name, t in read(folder).items() if name not in names})
    assert_refused(folder, *(f"missing tensor {name}" for name in names))


def test_the_wrong_family_is_refused(blip_folder, vit_gpt2_folder):
    assert_refused(blip_folder, "model_type 'blip'", "VisionEncoderDecoderModel",
                   family="vision-encoder-decoder")
    assert_refused(vit_gpt2_folder, "'vision-encoder-decoder'", "BlipForConditionalGeneration",
                   family="blip")


def test_another_kind_of_model_is_refused(blip):
    edit_json(blip / "config.json", model_type="bert")
    assert_refused(blip, "model_type 'bert'", "'blip' or 'vision-encoder-decoder'")


def test_a_blip_that_does_not_caption_is_refused(blip):
    edit_json(blip / "config.json", architectures=["BlipForQuestionAnswering"])
    assert_refused(blip, "BlipForQuestionAnswering", "BlipForConditionalGeneration")


@pytest.mark.parametrize("part, model_type, expected", [
    ("decoder", "bert", "'gpt2'"), ("encoder", "convnext", "'vit' or 'deit' or 'beit'"),
])
def test_an_encoder_decoder_of_other_parts_is_refused(vit_gpt2, part, model_type, expected):
    config = json.loads((vit_gpt2 / "config.json").read_text())
    config[part] = {"model_type": model_type}
    (vit_gpt2 / "config.json").write_text(json.dumps(config))
    assert_refused(vit_gpt2, repr(model_type), f"expected {expected}")


def test_an_unknown_activation_is_refused(tmp_path):
    checkpoints.write_blip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_act"] = "mish"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "activation 'mish' is not one of gelu")


def test_a_folder_that_is_not_there_is_reported(tmp_path):
    for name in (tmp_path / "absent", "./absent", "absent"):
        assert_refused(name, "no model folder at", str(name))
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "no model folder at")


def test_a_folder_without_configuration_is_reported(tmp_path):
    assert_refused(tmp_path, f"{tmp_path} has no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\x00"])
def test_a_broken_configuration_is_reported(blip, text):
    (blip / "config.json").write_text(text)
    assert_refused(blip, str(blip / "config.json"), "is not a configuration")


def test_missing_weights_are_reported(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "neither model.safetensors nor pytorch_model.bin")


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, "model-00001-of-00002.safetensors is missing")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_reported(blip, text):
    (blip / "model.safetensors").unlink()
    (blip / "model.safetensors.index.json").write_text(text)
    assert_refused(blip, str(blip / "model.safetensors.index.json"))


@pytest.mark.parametrize("kept_bytes", [0, 7, 5000])
def test_truncated_safetensors_are_reported(folder, kept_bytes):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert_refused(folder, f"cannot read {path}", "download it again")


def test_a_truncated_bin_is_reported(blip):
    torch.save(read(blip), blip / "pytorch_model.bin")
    (blip / "model.safetensors").unlink()
    path = blip / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    assert_refused(blip, f"cannot read {path}")


class _Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint ran')",)


def test_a_bin_file_can_run_no_code(blip):
    (blip / "model.safetensors").unlink()
    torch.save({"payload": _Payload()}, blip / "pytorch_model.bin")
    assert_refused(blip, f"cannot read {blip / 'pytorch_model.bin'}")


def test_vocabulary_files_alone_make_the_same_tokenizer(captioner_folder, folder):
    (folder / "tokenizer.json").unlink()  # older folders have none
    ours, theirs = (load_captioner(f).tokenizer for f in (folder, captioner_folder))
    assert len(ours.tokenizer) == len(theirs.tokenizer)
    for caption in checkpoints.CAPTIONS:
        assert ours.prompt_ids(caption) == theirs.prompt_ids(caption)


@pytest.mark.parametrize("kept", ["tokenizer_config.json", None])
def test_a_folder_without_vocabulary_is_reported(folder, kept):
    # transformers silently makes an empty tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json",
                 "merges.txt"):
        if name != kept:
            (folder / name).unlink(missing_ok=True)
    assert_refused(folder, f"{folder} has no usable tokenizer", "tokenizer.json")


def test_a_tokenizer_of_another_model_is_refused(blip, vit_gpt2_folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(vit_gpt2_folder / name, blip / name)
    (blip / "vocab.txt").unlink()
    assert_refused(blip, "no usable tokenizer", "401 ids, the model 234")


def test_a_folder_without_preprocessor_is_reported(folder):
    (folder / "preprocessor_config.json").unlink()
    assert_refused(folder, "no usable preprocessor_config.json")


def test_a_preprocessor_that_crops_to_the_size_is_accepted(vit_gpt2):
    edit_json(vit_gpt2 / "preprocessor_config.json", image_processor_type="DeiTImageProcessor",
              size={"height": 73, "width": 73}, crop_size={"height": 64, "width": 64},
              do_center_crop=True)
    pixels = load_captioner(vit_gpt2).pixels
    assert (pixels.resize, pixels.crop, pixels.size) == ((73, 73), (64, 64), (64, 64))


@pytest.mark.parametrize("size, messages", [
    (32, ["(32, 32)", "(64, 64)"]),
    ({"shortest_edge": 64}, ["no usable preprocessor_config.json", "shortest edge only"]),
])
def test_a_preprocessor_of_another_size_is_refused(folder, size, messages):
    edit_json(folder / "preprocessor_config.json", size=size)
    assert_refused(folder, *messages)


# --- the preprocessor, as transformers reads it ---------------------------------------------


def hugging_faces_pixels(folder: Path) -> PixelSettings:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    size, crop = processor.size, processor.crop_size
    return PixelSettings(
        resize=size.shortest_edge or (size.height, size.width),
        resample=int(processor.resample),
        crop=(crop.height, crop.width) if processor.do_center_crop else None,
        rescale_factor=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )


def with_image_size(folder: Path, size: tuple[int, int]) -> None:
    """Change the encoder's image size in the configuration, whatever its weights."""
    config = json.loads((folder / "config.json").read_text())
    part = config["vision_config" if config["model_type"] == "blip" else "encoder"]
    part["image_size"] = size[0] if size[0] == size[1] else list(size)
    (folder / "config.json").write_text(json.dumps(config))


def pixels_of(folder: Path) -> PixelSettings:
    config = pretrained._read_config(folder, None)
    with torch.device("meta"):
        model = pretrained._build(folder, config)
    return pretrained._read_pixels(folder, FAMILIES[config.model_type], model)


def random_preprocessor(rng: random.Random) -> dict:
    name = rng.choice(list(PREPROCESSORS))
    kind = rng.choice([
        {"image_processor_type": name}, {"image_processor_type": name + "Fast"},
        {"image_processor_type": name + "Pil"},
        {"feature_extractor_type": name.replace("ImageProcessor", "FeatureExtractor")},
    ])
    sizes = [None, 96, [80, 112], {"height": 64, "width": 48}, {"shortest_edge": 72}]
    choices = {
        "size": sizes, "crop_size": [None, 64, {"height": 40, "width": 72}],
        "do_center_crop": [None, True, False], "resample": [None, 0, 2, 3],
        "image_mean": [None, [0.1, 0.2, 0.3]], "image_std": [None, [1, 0.5, 2.0]],
        "do_normalize": [None, True, False], "do_rescale": [None, True, False],
        "rescale_factor": [None, 0.5, 1 / 127.5], "default_to_square": [None, True, False],
        "do_convert_rgb": [True],
    }
    return kind | {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.5}


def test_the_preprocessor_is_read_as_transformers_reads_it(blip):
    """Every kind and spelling, with class defaults for missing settings."""
    rng = random.Random(0)
    compared = set()
    for number in range(120):
        given = random_preprocessor(rng)
        (blip / "processor_config.json").unlink(missing_ok=True)
        (blip / "preprocessor_config.json").write_text(json.dumps(given))
        if number % 5 == 0:  # as newer versions store it, and this one counts
            (blip / "processor_config.json").write_text(json.dumps({"image_processor": given}))
            (blip / "preprocessor_config.json").write_text("{}")
        try:
            expected = hugging_faces_pixels(blip)
        except (ValueError, AttributeError, TypeError):  # no fixed size, or a null
            with pytest.raises(PretrainedError):
                pixels_of(blip)
            continue
        with_image_size(blip, expected.size)
        assert pixels_of(blip) == expected, given
        compared.add(expected)
    assert len(compared) > 40


def test_a_preprocessor_without_a_name_is_the_models_own(folder, captioner_folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
    if "blip" in captioner_folder.name:
        assert pixels_of(folder) == hugging_faces_pixels(folder)
    else:
        assert_refused(folder, "image_processor_type is 'None'; expected one of BlipImage")


@pytest.mark.parametrize("changes, message", [
    ({"image_processor_type": "AutoModel"}, "image_processor_type is 'AutoModel'; expected one of"),
    ({"image_processor_type": ["BlipImageProcessor"]}, "expected one of"),
    ({"size": 10**9}, "image size (1000000000, 1000000000); expected height and width"),
    ({"size": -1}, "image size (-1, -1)"), ({"size": True}, "image size (True, True)"),
    ({"size": [64, 64, 64]}, "image size [64, 64, 64]"), ({"size": {"height": 64}}, "image size"),
    ({"image_mean": [float("nan")] * 3}, "mean or std is [nan, nan, nan]; expected three numbers"),
    ({"image_std": 0.5}, "mean or std is 0.5"), ({"image_std": [0, 1, 1]}, "no std of 0"),
    ({"resample": "2"}, "resample is '2'"), ({"resample": 99}, "resample=99 is not a Pillow"),
    ({"rescale_factor": 10**400}, "rescale_factor 1000"),
    ({"do_resize": False}, "do_resize is not true"),
    ({"do_center_crop": True}, "image size (None, None)"),
])
def test_impossible_pixel_settings_are_reported(blip, changes, message):
    edit_json(blip / "preprocessor_config.json", **changes)
    assert_refused(blip, "no usable preprocessor_config.json", message)


# --- hostile folders ------------------------------------------------------------------------

EVIL = {
    "config.json": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
    "generation_config.json": {"AutoModel": "evil.Evil"},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Evil"},
    "processor_config.json": {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "special_tokens_map.json": {"AutoTokenizer": "evil.Evil"},
}


@pytest.fixture
def nothing_reaches_out(monkeypatch):
    """Fails on reading stdin, opening a socket or calling the Hub's client."""
    def refuse(*arguments, **_):
        raise SystemExit(f"reached out: {arguments}")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(sys.stdin, "read", refuse, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", refuse, raising=False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # As online: offline, transformers would not even try.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("hf_hub_download", "snapshot_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, refuse)


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """The file that an evil.py writes when it is run."""
    mark = tmp_path / "code was run"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return mark


def write_evil(folder: Path, mark: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w')\nclass Evil:\n"
        f"    @classmethod\n    def from_pretrained(cls, *args, **kwargs): return cls()\n"
    )


def test_an_honest_folder_loads_without_reaching_out(captioner_folder, nothing_reaches_out):
    load_captioner(captioner_folder)
    load_tokenizer(captioner_folder)


@pytest.mark.parametrize("repository", ["", "stranger/repo--"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("name", EVIL)
def test_a_folder_that_names_code_is_refused_by_the_files_name(
    folder, evil, nothing_reaches_out, name, depth, repository
):
    write_evil(folder, evil)
    settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    auto_map = json.loads(json.dumps(EVIL[name]).replace("evil.Evil", f"{repository}evil.Evil"))
    nested: dict = {"auto_map": auto_map}
    for level in range(depth):
        nested = {"image_processor": nested} if level % 2 else {"parts": [nested]}
    (folder / name).write_text(json.dumps(settings | nested))
    for load in (load_captioner, load_tokenizer, build_from_config):
        with pytest.raises(PretrainedError, match=f"{name} has auto_map, which names Python code"):
            load(folder)
    assert not evil.exists()


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoModel", "AutoTokenizer", "pipeline",
                                  "Trainer", "models", "BertModel", ["BertTokenizer"], 5])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_is_only_ever_a_tokenizer(folder, evil, nothing_reaches_out, file, name):
    """AutoTokenizer would call any transformers class, and some of them may run code."""
    write_evil(folder, evil)
    edit_json(folder / file, tokenizer_class=name)
    assert_refused(folder, "tokenizer" if file == "tokenizer_config.json" else "")
    assert not evil.exists()


@pytest.mark.parametrize("changes", [
    {"model_max_length": "many"}, {"padding_side": 5}, {"unk_token": "nowhere"},
])
def test_a_tokenizer_that_fails_in_use_is_refused_when_it_is_loaded(blip, changes):
    edit_json(blip / "tokenizer_config.json", **changes)
    assert_refused(blip, "no usable tokenizer")


def test_a_panic_of_the_tokenizers_library_is_an_error_like_others(vit_gpt2):
    """Its exception derives from BaseException only."""
    edit_json(vit_gpt2 / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model = json.loads((vit_gpt2 / "tokenizer.json").read_text())["model"]
    edit_json(vit_gpt2 / "tokenizer.json", model=model | {"continuing_subword_prefix": "x" * 99})
    assert_refused(vit_gpt2, "no usable tokenizer")


def test_another_configuration_file_cannot_stand_in(blip, evil, nothing_reaches_out):
    write_evil(blip, evil)
    config = json.loads((blip / "config.json").read_text())
    other = config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (blip / "config.4.0.0.json").write_text(json.dumps(other))
    edit_json(blip / "config.json", configuration_files=["config.4.0.0.json"])
    load_captioner(blip)
    assert not evil.exists()


def test_the_parts_of_a_configuration_reach_nothing(vit_gpt2, nothing_reaches_out):
    config = json.loads((vit_gpt2 / "config.json").read_text())
    config["encoder"] = {"model_type": "detr", "backbone": "stranger/backbone",
                         "use_pretrained_backbone": True}
    (vit_gpt2 / "config.json").write_text(json.dumps(config))
    assert_refused(vit_gpt2, "encoder is 'detr'")


FILES = [
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json", "sentencepiece.model", "chat_template.jinja",
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "huge"])
def test_only_regular_files_of_bounded_size_are_read(blip, nothing_reaches_out, name, kind):
    path = blip / name
    if name.startswith(("model", "pytorch_model")):
        (blip / "model.safetensors").unlink()
    path.unlink(missing_ok=True)
    if kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**42)  # sparse
        assert_refused(blip, f"{path} has 4,398,046,511,104 bytes")
        return
    {"device": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()
    assert_refused(blip, f"{path} is not a regular file")


def test_a_shard_that_is_not_a_regular_file_is_named(blip):
    (blip / "model.safetensors").unlink()
    os.mkfifo(blip / "shard.safetensors")
    (blip / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    assert_refused(blip, f"{blip / 'shard.safetensors'} is not a regular file")


@pytest.mark.parametrize("part, changes, message", [
    ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a"),
    ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number"),
    ("text_config", {"hidden_size": -64}, "hidden_size is -64"),
    ("text_config", {"hidden_size": 10**400}, "config.json"),
    ("text_config", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ("text_config", {"max_position_embeddings": 10**12}, "max_position_embeddings is 100"),
    ("text_config", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5; expected a number"),
    ("text_config", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ("text_config", {"hidden_act": ["gelu"]}, "config.json"),
    ("text_config", {"bos_token_id": -1}, "start, end and pad tokens"),
    ("text_config", {"sep_token_id": 10**9}, "expected three ids below"),
    ("vision_config", {"image_size": 10**9}, "image size (1000000000, 1000000000)"),
    ("vision_config", {"image_size": 0}, "image size (0, 0)"),
    ("vision_config", {"patch_size": -16}, "patch_size is -16"),
    ("vision_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    (None, {"model_type": ["blip"]}, "model_type ['blip'], which is not a captioner"),
    (None, {"model_type": {"a": 1}}, "model_type {'a': 1}"),
    (None, {"architectures": 5}, "architectures 5"),
    (None, {"architectures": {"a": "b"}}, "architectures {'a': 'b'}"),
    (None, {"text_config": [1]}, "config.json"),
    (None, {"text_config": None, "vision_config": None}, "do not fit"),
])
def test_a_configuration_out_of_range_is_an_error_at_once(blip, part, changes, message):
    config = json.loads((blip / "config.json").read_text())
    (config if part is None else config[part]).update(changes)
    (blip / "config.json").write_text(json.dumps(config))
    assert_refused(blip, str(blip), message)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json",
                                  "tokenizer_config.json", "model.safetensors.index.json"])
def test_deeply_nested_json_is_an_error(blip, name):
    if "index" in name:
        (blip / "model.safetensors").unlink()
    (blip / name).write_text('{"a": ' * 10**5 + "1" + "}" * 10**5)
    assert_refused(blip, str(blip / name))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_not_floating_point_are_refused(folder, dtype):
    tensors = read(folder)
    name = next(name for name in tensors if name.endswith("h.0.mlp.c_proj.weight")
                or name.endswith("layer.0.output.dense.weight") and "text_decoder" in name)
    rewrite(folder, tensors | {name: tensors[name].to(dtype)})
    assert_refused(folder, f"{name} is {dtype}, expected float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_weight_that_is_not_finite_is_refused_by_name(folder, value):
    tensors = read(folder)
    name = next(name for name in tensors if "decoder" in name and name.endswith(".bias"))
    tensors[name] = tensors[name].double()
    tensors[name][3] = value
    rewrite(folder, tensors)
    assert_refused(folder, f"{name} holds NaN, infinity")


def test_finite_weights_whose_sum_overflows_are_accepted(blip):
    name = "text_decoder.bert.encoder.layer.0.output.dense.bias"
    tensors = read(blip)
    rewrite(blip, tensors | {name: torch.full_like(tensors[name], 3e38)})
    load_captioner(blip)


def test_matrices_that_cannot_be_joined_are_reported(vit_gpt2):
    query = "encoder.encoder.layer.0.attention.attention.query.weight"
    rewrite(vit_gpt2, read(vit_gpt2) | {query: torch.zeros(3, 5)})
    assert_refused(vit_gpt2, "do not fit their configuration")


def test_a_bin_file_cannot_claim_more_than_it_holds(blip):
    (blip / "model.safetensors").unlink()
    path = blip / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1, dtype=torch.half).expand(10**7, 10**7)}, path)
    assert_refused(blip, "its tensors exceed the file's size")
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as stored:
        members = {info.filename: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name, data in members.items():
            compressed.writestr(name, data)
    assert_refused(blip, "it is compressed")
    for value in ({"a": torch.zeros(2).to_sparse()}, {"a": torch.empty(2, device="meta")},
                  {5: torch.zeros(2)}, [torch.zeros(2)]):
        torch.save(value, path)
        assert_refused(blip, f"cannot read {path}")


@pytest.mark.parametrize("name", ["a\0b", "x" * 10**5, "\ud800/b"])
def test_an_impossible_name_is_reported(name):
    with pytest.raises(PretrainedError):
        load_captioner(name)


# --- the Hub --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    LocalEntryNotFoundError("cannot find the files on the Hub, and no network"),
    OSError("network is unreachable"),
])
def test_a_hub_name_without_network_says_how_to_use_a_folder(monkeypatch, error):
    def raise_error(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_error)
    assert_refused(
        "some/captioner", "no folder 'some/captioner' here",
        "cannot be fetched at revision main", "network",
        "hf download some/captioner --local-dir", "--model", revision="main",
    )


def test_a_hub_name_loads_what_was_fetched_with_bin_only_where_needed(
    monkeypatch, vit_gpt2_folder, vit_gpt2
):
    torch.save(read(vit_gpt2), vit_gpt2 / "pytorch_model.bin")
    (vit_gpt2 / "model.safetensors").unlink()
    calls = []

    def fetch(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(vit_gpt2)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    captioner = load_captioner("some/captioner", revision="v1")
    assert captioner.fingerprints["base"] == base_of(vit_gpt2_folder)
    assert (captioner.name, captioner.revision) == ("some/captioner", "v1")
    assert [(name, revision) for name, revision, _ in calls] == [("some/captioner", "v1")] * 2
    assert "*.safetensors" in calls[0][2] and "*.safetensors" not in calls[1][2]
    assert not any(re.search("bin", pattern) for pattern in calls[0][2])


def test_no_package_is_imported_before_it_is_needed(blip_folder):
    """torch._dynamo takes as long as the rest of torch: captioning does without it."""
    code = (
        "import sys, lora_engine\n"
        "print([n for n in ('torch', 'transformers', 'safetensors', 'matplotlib')"
        " if n in sys.modules])\n"
        "import lora_engine.models.pretrained, lora_engine.lora.adapter\n"
        "import lora_engine.captioning.generation\n"
        "print('transformers' in sys.modules)\n"
        "import torch\n"
        "from lora_engine.captioning.captioner import caption_features\n"
        "from lora_engine.captioning.generation_settings import GenerationSettings\n"
        f"captioner = lora_engine.models.pretrained.load_captioner({str(blip_folder)!r})\n"
        "features = torch.zeros(1, 5, captioner.model.encoder.width)\n"
        "caption_features(captioner, features, GenerationSettings(max_new_tokens=1))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.splitlines() == ["[]", "False", "False"]


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": "abc"}, "not a usable configuration"),
    ({"num_attention_heads": 0}, "0 attention heads"),
    ({"num_attention_heads": 3}, "3 attention heads do not divide a width of 64"),
    ({"patch_size": 0}, "does not describe a valid model"),
])
def test_impossible_numbers_in_a_configuration_are_reported(blip_folder, tmp_path, changes, words):
    folder = tmp_path / "model"
    shutil.copytree(blip_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match=words):
        load_captioner(folder)


def test_a_bin_file_of_more_than_tensors_is_refused(blip_folder, tmp_path):
    """BLIP's own release wraps its tensors: {"model": {...}}."""
    folder = tmp_path / "model"
    shutil.copytree(blip_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="more than named tensors"):
        load_captioner(folder)
