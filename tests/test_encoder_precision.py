"""The encoder in bf16 and int8: near fp32, the same whatever images come together."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_lines import plain
from pictures import json_lines, settings
from torch import nn

from lora_engine.config import TrainingConfig, changes_on_resume
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.precision import (
    Int8Linear,
    cast_weights,
    in_precision,
    resolve_encoder_precision,
)
from lora_engine.training.loop import train
from recipes import finetune

CPU = torch.device("cpu")
FP32 = torch.float32


def encoder_in(captioner, precision: str, **changes) -> FeatureEncoder:
    cast_weights(captioner.model, FP32, precision)
    return FeatureEncoder(captioner, device=CPU, dtype=FP32, precision=precision, **changes)


def pictures(captioner, number: int) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, *captioner.pixels.size), dtype=torch.uint8)


@pytest.mark.parametrize("precision, bound", [("fp32", 0.0), ("bf16", 0.01), ("int8", 0.03)])
def test_features_are_near_those_of_fp32(captioner, precision, bound):
    pixels = pictures(captioner, 3)
    exact = encoder_in(captioner, "auto").encode(pixels)
    encoder = encoder_in(captioner, precision)
    features = encoder.unpack(encoder.encode(pixels))
    expected = encoder.unpack(exact)
    error = ((features - expected).norm() / expected.norm()).item()
    assert features.dtype == FP32
    assert (error == 0) == (precision == "fp32") and error <= bound
    assert encoder.relative_error(pixels) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_image_has_the_same_features_beside_any_others(captioner, precision):
    encoder = encoder_in(captioner, precision)
    dark = pictures(captioner, 3) // torch.tensor([1, 16, 64], dtype=torch.uint8).view(3, 1, 1, 1)
    together = encoder.encode(dark)
    for number in range(3):
        assert torch.equal(encoder.encode(dark[number : number + 1])[0], together[number])


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_captioner_itself_stays_as_it_is(captioner, precision):
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    converted, _ = in_precision(captioner.model, precision, FP32)
    assert converted.decoder is captioner.model.decoder
    after = captioner.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("has_bias", [True, False])
def test_an_int8_layer_rounds_weights_by_output_and_inputs_by_token(has_bias):
    base = nn.Linear(32, 5, bias=has_bias)
    with torch.no_grad():
        base.weight.mul_(torch.tensor([1.0, 100.0, 1e-3, 0.0, 1.0])[:, None])  # one is all zero
    x = torch.randn(2, 7, 32) * torch.logspace(-3, 3, 7)[:, None]  # tokens of all sizes
    x[0, 0] = 0.0

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
        return (rows / scale).round() * scale

    expected = nn.functional.linear(rounded(x), rounded(base.weight), base.bias)
    torch.testing.assert_close(Int8Linear(base)(x), expected, rtol=1e-4, atol=1e-6)


def test_frozen_weights_of_another_precision_are_not_rounded(captioner):
    """With --precision bf16 an fp32 encoder keeps its weights, and an int8 one starts from them."""
    before = next(captioner.model.encoder.parameters()).clone()
    cast_weights(captioner.model, torch.bfloat16, "int8")
    linear = captioner.model.encoder.layers[0].fc1
    assert linear.weight.dtype == FP32
    assert torch.equal(next(captioner.model.encoder.parameters()), before)
    assert captioner.model.vocabulary.weight.dtype == torch.bfloat16


def test_the_precision_of_the_training_is_no_other_one(captioner):
    """With --precision bf16 --encoder_precision bf16 weights are cast once, as without the flag."""
    cast_weights(captioner.model, torch.bfloat16, "bf16")
    assert captioner.model.encoder.layers[0].fc1.weight.dtype == torch.bfloat16
    encoder = FeatureEncoder(captioner, device=CPU, dtype=torch.bfloat16, precision="bf16")
    assert encoder.converted is captioner.model


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_features_of_a_precision_have_a_key_of_their_own(captioner, precision):
    keys = [encoder_in(captioner, name).describe() for name in ("auto", precision)]
    assert keys[0] != keys[1]
    assert encoder_in(captioner, "fp32").describe() == keys[0]


@pytest.fixture(scope="module")
def run_in_int8(blip_folder, data, tmp_path_factory) -> TrainingConfig:
    config = settings(
        blip_folder, data, tmp_path_factory.mktemp("int8") / "run", encoder_precision="int8",
        cache="memory", log_every=1,
    )
    train(config)
    return config


def losses(folder: str) -> list[float]:
    return [line["loss"] for line in json_lines(Path(folder) / "metrics.jsonl")]


def test_kept_and_fresh_features_give_the_same_losses(run_in_int8, tmp_path):
    """So that every epoch trains on the same features, kept or not."""
    config = replace(run_in_int8, cache="off", output_path=str(tmp_path / "run"))
    train(config)
    assert losses(config.output_path) == losses(run_in_int8.output_path)
    exact = replace(config, encoder_precision="auto", output_path=str(tmp_path / "exact"))
    train(exact)
    assert losses(exact.output_path) != losses(config.output_path)
    assert losses(exact.output_path) == pytest.approx(losses(config.output_path), rel=0.05)


def test_a_run_says_how_exact_its_features_are(blip_folder, data, tmp_path, command):
    status, out, err = command(
        finetune.main, "--model", blip_folder, "--train_data_path", data / "train.json",
        "--val_data_path", data / "val.json", "--output_path", tmp_path / "run",
        "--max_steps", "1", "--encoder_precision", "int8", "--cache", "memory",
    )
    assert status == 0
    (percent,) = re.findall(
        r"the encoder computes in int8: relative error (\S+)% from fp32 \(the features of 4 images",
        plain(out + err),
    )
    assert 0 < float(percent) < 5


def test_a_run_is_resumed_in_its_precision(run_in_int8):
    before = json.loads(json.dumps(run_in_int8.as_dict()))
    with pytest.raises(ValueError, match=r"another --encoder_precision auto \(the run has int8\);"):
        changes_on_resume(before, replace(run_in_int8, encoder_precision="auto"))
    earlier = {k: v for k, v in before.items() if k != "encoder_precision"}
    assert not changes_on_resume(earlier, replace(run_in_int8, encoder_precision="auto"))


def test_int8_is_for_cpus():
    with pytest.raises(ValueError, match="int8 is for CPUs, and the device is cuda:0; give bf16"):
        resolve_encoder_precision("int8", torch.device("cuda", 0), torch.bfloat16)
    assert resolve_encoder_precision("bf16", torch.device("cuda", 0), torch.bfloat16) == "auto"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_processor_without_the_instructions_is_said(precision, monkeypatch, caplog):
    for name in ("avx512_bf16", "amx_tile", "vnni"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    assert resolve_encoder_precision(precision, CPU, FP32) == precision
    assert f"no instructions for {precision}" in caplog.text


@pytest.mark.parametrize("has_amx", [True, False])
def test_int8_where_bf16_is_faster_is_said(has_amx, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert resolve_encoder_precision("int8", CPU, FP32) == "int8"
    assert ("with which bf16 is faster" in caplog.text) == has_amx
