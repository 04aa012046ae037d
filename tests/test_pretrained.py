"""Checkpoints at the door: every published way of storing them, and what bad ones are told."""

import json
import re
import shutil
import subprocess
import sys
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

from lora_engine.pretrained import PretrainedError, fingerprint, load_captioner


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
    assert captioner.fingerprint == expected.fingerprint


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
    assert captioner.fingerprint == expected.fingerprint
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
        assert captioner.fingerprint == load_captioner(blip_folder).fingerprint


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
    assert load_captioner(folder).fingerprint == load_captioner(captioner_folder).fingerprint


def test_the_unused_pooler_may_be_missing(vit_gpt2_folder, vit_gpt2):
    tensors = read(vit_gpt2)
    without = {name: t for name, t in tensors.items() if not name.startswith("encoder.pooler.")}
    assert len(without) == len(tensors) - 2
    rewrite(vit_gpt2, without)
    assert load_captioner(vit_gpt2).fingerprint == load_captioner(vit_gpt2_folder).fingerprint


# --- fingerprint, ids, pixels ---------------------------------------------------------------


def test_one_changed_weight_changes_the_fingerprint(captioner):
    model = captioner.model
    assert fingerprint(model) == captioner.fingerprint
    for parameter in (model.encoder.class_token, list(model.decoder.parameters())[-1]):
        entry = parameter.data.view(-1)[-1:]
        value = entry.clone()
        entry.copy_(torch.nextafter(value, value + 1))  # its very last bit
        assert fingerprint(model) != captioner.fingerprint
        entry.copy_(value)
    assert fingerprint(model) == captioner.fingerprint


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


# --- what bad checkpoints are told ----------------------------------------------------------


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


@pytest.mark.parametrize("part, model_type", [("decoder", "bert"), ("encoder", "swin")])
def test_an_encoder_decoder_of_other_parts_is_refused(vit_gpt2, part, model_type):
    config = json.loads((vit_gpt2 / "config.json").read_text())
    config[part] = {"model_type": model_type}
    (vit_gpt2 / "config.json").write_text(json.dumps(config))
    assert_refused(vit_gpt2, repr(model_type), "a ViT or DeiT encoder and a GPT-2 decoder")


def test_an_unknown_activation_is_refused(tmp_path):
    checkpoints.write_blip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_act"] = "mish"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, "activation 'mish' is not one of gelu")


def test_a_folder_that_is_not_there_is_told_so(tmp_path):
    for name in (tmp_path / "absent", "./absent", "absent"):
        assert_refused(name, "no model folder at", str(name))
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", "no model folder at")


def test_a_folder_without_configuration_is_told_so(tmp_path):
    assert_refused(tmp_path, f"{tmp_path} has no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\x00"])
def test_a_broken_configuration_is_told_so(blip, text):
    (blip / "config.json").write_text(text)
    assert_refused(blip, str(blip / "config.json"), "is not a configuration")


def test_missing_weights_are_told_so(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "neither model.safetensors nor pytorch_model.bin")


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, "model-00001-of-00002.safetensors is missing")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_told_so(blip, text):
    (blip / "model.safetensors").unlink()
    (blip / "model.safetensors.index.json").write_text(text)
    assert_refused(blip, str(blip / "model.safetensors.index.json"))


@pytest.mark.parametrize("kept_bytes", [0, 7, 5000])
def test_truncated_safetensors_are_told_so(folder, kept_bytes):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert_refused(folder, f"cannot read {path}", "fetch the file anew")


def test_a_truncated_bin_is_told_so(blip):
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
def test_a_folder_without_vocabulary_is_told_so(folder, kept):
    # transformers makes an empty tokenizer of it, and says nothing
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


def test_a_folder_without_preprocessor_is_told_so(folder):
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
    assert captioner.fingerprint == load_captioner(vit_gpt2_folder).fingerprint
    assert (captioner.name, captioner.revision) == ("some/captioner", "v1")
    assert [(name, revision) for name, revision, _ in calls] == [("some/captioner", "v1")] * 2
    assert "*.safetensors" in calls[0][2] and "*.safetensors" not in calls[1][2]
    assert not any(re.search("bin", pattern) for pattern in calls[0][2])


def test_importing_the_package_imports_neither_transformers_nor_torch():
    code = (
        "import sys, lora_engine\n"
        "print([n for n in ('torch', 'transformers', 'safetensors', 'matplotlib')"
        " if n in sys.modules])\n"
        "import lora_engine.pretrained, lora_engine.adapter, lora_engine.generation\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.splitlines() == ["[]", "False"]


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": "abc"}, "not a usable configuration"),
    ({"num_attention_heads": 0}, "0 attention heads"),
    ({"num_attention_heads": 3}, "3 attention heads do not divide a width of 64"),
    ({"patch_size": 0}, "describes no possible model"),
])
def test_impossible_numbers_in_a_configuration_are_told(blip_folder, tmp_path, changes, words):
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
