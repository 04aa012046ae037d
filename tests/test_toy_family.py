"""A captioner family of a few lines goes all the way through: nothing else knows the families."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import checkpoints
import pytest
import torch
from pictures import settings
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_engine import __main__ as verbs
from lora_engine.lora.adapter import load_adapter, read_adapter
from lora_engine.models.attention import KeyValueCache, causal_self_attention
from lora_engine.models.families import FAMILIES, Family
from lora_engine.models.pretrained import PretrainedError, load_captioner
from lora_engine.models.protocol import CaptioningModel, Decoder, Encoder
from lora_engine.stopping import Interrupted
from lora_engine.training.loop import train

# --- the family -----------------------------------------------------------------------------


class ToyEncoder(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.image_size, self.num_tokens = (size, size), 4
        self.patches = nn.Conv2d(3, width, kernel_size=size // 2, stride=size // 2)
        self.layers = nn.ModuleList([nn.Linear(width, width)])

    def describe(self) -> dict:
        return {}

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, 3, size, size) -> (B, 4, D)
        return self.layers[0](self.patches(pixel_values).flatten(2).transpose(1, 2)).tanh()


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        qkv = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(causal_self_attention(*qkv, num_heads=2, scale=0.2, cache=cache))
        return x + self.mlp(x).relu()


class ToyDecoder(nn.Module):
    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.max_positions, self.gradient_checkpointing = 100, False
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(ToyBlock(width) for _ in range(2))
        self.head = nn.Linear(width, vocab_size)


class ToyCaptioner(nn.Module):
    lora_groups = {"attention": r".*\.(qkv|out)", "feed_forward": r".*\.mlp"}
    lora_scope = r"decoder\.layers\..*"
    tied_head = ("decoder.head.weight", "decoder.embedding.weight")
    fan_in_fan_out = False

    def __init__(self, encoder: ToyEncoder, decoder: ToyDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def vocabulary(self) -> nn.Linear:
        return self.decoder.head

    def encode(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values)

    def decode(self, input_ids: Tensor, features: Tensor, cache=None) -> Tensor:
        images = features.mean(dim=1).repeat_interleave(len(input_ids) // len(features), dim=0)
        x = self.decoder.embedding(input_ids) + images[:, None]
        for index, block in enumerate(self.decoder.layers):
            x = block(x, None if cache is None else cache[index])
        return x

    def head_input(self, hidden: Tensor) -> Tensor:
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return self.vocabulary(hidden)


TOY = Family(
    name="toy",
    from_config=lambda config: ToyCaptioner(
        ToyEncoder(config.width, config.size), ToyDecoder(config.width, config.vocab_size)
    ),
    convert_state=dict,
    special_ids=lambda config: (config.start, config.end, config.pad),
)


# --- all the way through --------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy-captioner", TOY)


@pytest.fixture
def folder(blip_folder, tmp_path) -> Path:
    """A checkpoint of a model type that transformers does not know."""
    path = tmp_path / "toy"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(blip_folder / name, path)
    tokenizer = load_captioner(blip_folder).tokenizer
    config = {
        "model_type": "toy-captioner", "width": 32, "size": checkpoints.IMAGE_SIZE,
        "vocab_size": tokenizer.start_id + 1,
        "start": tokenizer.start_id, "end": tokenizer.end_id, "pad": tokenizer.pad_id,
    }
    (path / "config.json").write_text(json.dumps(config))
    model = TOY.from_config(type("Config", (), config))
    save_file(model.state_dict(), path / "model.safetensors")
    return path


def test_a_toy_is_a_captioning_model(folder):
    captioner = load_captioner(folder, family="toy-captioner")
    model = captioner.model
    assert isinstance(model, CaptioningModel)
    assert isinstance(model.encoder, Encoder) and isinstance(model.decoder, Decoder)
    assert captioner.hugging_face_class is None
    tokens, features = torch.randint(20, 90, (2, 5)), model.encode(torch.randn(1, 3, 64, 64))
    cache = KeyValueCache(num_tokens=5)
    steps = [model.decode(token, features, cache) for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model.decode(tokens, features))


def test_other_families_are_named_where_one_is_refused(folder, blip_folder):
    with pytest.raises(PretrainedError, match=r"(?s)'toy-captioner'.*recipes.finetune"):
        load_captioner(folder, family="blip")
    with pytest.raises(PretrainedError, match=r"expected 'toy-captioner' \(toy\)"):
        load_captioner(blip_folder, family="toy-captioner")


def test_code_of_a_toy_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_toy.ToyConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_toy.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(PretrainedError, match="auto_map"):
        load_captioner(folder)


def test_a_toy_trains_resumes_captions_evaluates_merges_and_reports(
    command, folder, data, tmp_path, monkeypatch
):
    """A run that was interrupted and resumed ends with the same adapter, to the bit."""
    configs = [
        settings(folder, data, tmp_path / run, prompt="a picture of", max_steps=6)
        for run in ("run", "again")
    ]
    train(configs[0], family="toy-captioner")

    calls, decode = [], ToyCaptioner.decode

    def interrupt(model, *args):
        if model.training:
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
        return decode(model, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ToyCaptioner, "decode", interrupt)
        train(configs[1])
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()]
    train(dataclasses.replace(configs[1], resume="newest"))
    adapters = [tmp_path / run / "adapter" for run in ("run", "again")]
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in adapters]
    assert weights[0] == weights[1]
    card = (adapters[0] / "README.md").read_text()
    assert "recipes.finetune" in card and "transformers" not in card

    image = data / "images" / "val_00.png"
    status, out, err = command(verbs.run_verb, "caption", "--adapter", adapters[0], image)
    assert status == 0 and "val_00.png" in out, err
    status, out, err = command(
        verbs.run_verb, "evaluate", "--adapter", adapters[0], "--data", data / "val.json"
    )
    assert status == 0 and "CIDEr" in out, err
    status, out, err = command(
        verbs.run_verb, "merge", "--adapter", adapters[0], "--out", tmp_path / "merged"
    )
    assert status == 0 and "merged 6 weights" in out and "transformers" not in out, err
    status, out, err = command(verbs.run_verb, "report", tmp_path / "run")
    assert status == 0 and (tmp_path / "run" / "report.html").exists(), err

    adapted, merged = load_captioner(folder), load_captioner(tmp_path / "merged")
    load_adapter(adapted.model, read_adapter(adapters[0]))
    adapted.model.eval()
    tokens, pixels = torch.randint(20, 90, (2, 5)), torch.randn(2, 3, 64, 64)
    logits = [c.model.head(c.model.decode(tokens, c.model.encode(pixels)))
              for c in (adapted, merged)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged.model.decoder.layers[0].qkv.weight,
                              load_captioner(folder).model.decoder.layers[0].qkv.weight)
