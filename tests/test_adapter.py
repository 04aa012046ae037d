"""Adapter folders: exchange with PEFT in both directions, and what is refused."""

import json
import os
import shutil
import warnings
from pathlib import Path

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import hugging_face, hugging_face_logits, random_pixels
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_engine.data.captions import IGNORED, collate_captions
from lora_engine.lora import adapter as adapter_module
from lora_engine.lora import patterns
from lora_engine.lora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora_engine.lora.injection import inject, lora_layers, lora_parameters, merge
from lora_engine.models.pretrained import Captioner, load_captioner

# PEFT still looks up an old name in transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BOTH_GROUPS = ["attention", "feed_forward"]
PATTERNS = {
    "rank_pattern": {r".*\.1\..*(query|c_attn)": 5},
    "alpha_pattern": {r"0\.(mlp\.c_fc|intermediate\.dense)": 3},
}


def adapted(folder: Path, **settings) -> Captioner:
    """A captioner with random adapters, B included."""
    captioner = load_captioner(folder)
    settings = {"rank": 4, "alpha": 10, "dropout": 0.0} | settings
    inject(captioner.model, settings.pop("targets", BOTH_GROUPS), **settings)
    for name, matrix in lora_parameters(captioner.model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(matrix, std=0.1)
    return captioner


def save(captioner: Captioner, folder: Path, **settings) -> Path:
    save_adapter(
        captioner.model, folder, base_model=captioner.name,
        hugging_face_class=captioner.hugging_face_class, **settings,
    )
    return folder


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return random_pixels(2), torch.randint(20, 200, (2, 6), generator=generator)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    pixels, input_ids = inputs()
    return model.head(model.decode(input_ids, model.encode(pixels)))


@torch.no_grad()
def pefts_logits(model: torch.nn.Module) -> torch.Tensor:
    return hugging_face_logits(model.eval(), *inputs())


def load_with_peft(folder: Path, adapter_folder: Path, **settings) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing keys, of fan_in_fan_out, of unknown settings
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        return PeftModel.from_pretrained(hugging_face(folder), str(adapter_folder), **settings)


def make_with_peft(folder: Path, adapter_folder: Path, **settings) -> PeftModel:
    """An adapter as PEFT makes it, with random matrices, saved."""
    settings = {
        "r": 4, "lora_alpha": 10, "lora_dropout": 0.0,
        "target_modules": r".*(text_decoder\.bert|decoder\.transformer)\..*"
                          r"(query|value|intermediate\.dense|c_attn|c_fc)",
        "fan_in_fan_out": "GPT2" in (folder / "config.json").read_text(),
    } | settings
    model = get_peft_model(hugging_face(folder), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(adapter_folder))
    return model


# --- exchange with PEFT ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, PATTERNS, PATTERNS | {"use_rslora": True},
], ids=["plain", "rslora", "patterns", "patterns_rslora"])
def test_peft_loads_our_adapter_with_our_logits(captioner_folder, tmp_path, settings):
    captioner = adapted(captioner_folder, **settings)
    if settings:
        layers = [layer for _, layer in lora_layers(captioner.model)]
        kinds = {(layer.rank, layer.scaling) for layer in layers}
        assert len(kinds) == (3 if "rank_pattern" in settings else 1)
    theirs = load_with_peft(captioner_folder, save(captioner, tmp_path / "adapter"))
    base = logits(load_captioner(captioner_folder).model)
    assert (logits(captioner.model) - base).abs().max() > 0.05
    torch.testing.assert_close(
        logits(captioner.model), pefts_logits(theirs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("settings", [
    {}, {"use_rslora": True}, PATTERNS, PATTERNS | {"use_rslora": True},
    {"fan_in_fan_out": False},  # wrong in the file for one of the families; the module decides
    {"target_modules": ["query", "value", "c_attn", "q_attn", "no.such.module"]},
    {"target_modules": r".*(h|layer)\.\d\..*(c_proj|output\.dense)",
     "exclude_modules": r".*\.1\..*"},
], ids=["plain", "rslora", "patterns", "patterns_rslora", "fan_in_fan_out", "names", "excluded"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_we_load_pefts_adapter_with_pefts_logits(captioner_folder, tmp_path, settings):
    theirs = make_with_peft(captioner_folder, tmp_path, **settings)
    captioner = load_captioner(captioner_folder)
    base = logits(captioner.model)
    plan = load_adapter(captioner.model, tmp_path)
    their_matrices = [p for name, p in theirs.named_parameters() if "lora_" in name]
    assert plan.num_trainable == sum(matrix.numel() for matrix in their_matrices)
    assert (logits(captioner.model) - base).abs().max() > 0.05
    torch.testing.assert_close(
        logits(captioner.model), pefts_logits(theirs), rtol=1e-5, atol=1e-5
    )


def test_our_adapter_loads_into_the_same_model(captioner_folder, tmp_path):
    ours = adapted(captioner_folder, **PATTERNS, use_rslora=True, dropout=0.2)
    again = load_captioner(captioner_folder)
    load_adapter(again.model, save(ours, tmp_path / "adapter"))
    matrices = lora_parameters(ours.model)
    assert lora_parameters(again.model).keys() == matrices.keys()
    for name, matrix in lora_parameters(again.model).items():
        assert torch.equal(matrix, matrices[name]) and matrix.requires_grad
    for (_, a), (_, b) in zip(lora_layers(ours.model), lora_layers(again.model)):
        assert (a.rank, a.dropout) == (b.rank, b.dropout)
        assert b.scaling == pytest.approx(a.scaling, rel=1e-12)


def test_dropout_can_be_replaced_for_further_training(captioner_folder, tmp_path):
    folder = save(adapted(captioner_folder, dropout=0.2), tmp_path / "adapter")
    for dropout, expected in ((None, 0.2), (0.0, 0.0), (0.5, 0.5)):
        model = load_captioner(captioner_folder).model
        load_adapter(model, folder, dropout=dropout)
        assert {layer.dropout for _, layer in lora_layers(model)} == {expected}


def test_a_merged_model_saves_the_same_adapter(captioner_folder, tmp_path):
    captioner = adapted(captioner_folder)
    before = load_file(save(captioner, tmp_path / "a") / WEIGHTS_FILE)
    merge(captioner.model)
    after = load_file(save(captioner, tmp_path / "b") / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_saved_configuration_is_complete_and_pefts_own_class_reads_it(captioner_folder, tmp_path):
    captioner = adapted(captioner_folder, **PATTERNS)
    folder = save(captioner, tmp_path / "adapter", revision="v1")
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config | {
        "peft_type": "LORA", "r": 4, "lora_alpha": 10, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": captioner.family != "blip", "inference_mode": True,
        "init_lora_weights": True, "lora_bias": False, "modules_to_save": None,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "revision": "v1", "task_type": None, "use_dora": False, "use_rslora": False,
        "base_model_name_or_path": str(captioner_folder),
        "auto_mapping": {
            "base_model_class": captioner.hugging_face_class,
            "parent_library": "transformers",
        },
    } == config
    assert config["target_modules"] == [path for path, _ in lora_layers(captioner.model)]
    assert set(config["rank_pattern"].values()) == {5}
    assert set(config["alpha_pattern"].values()) == {3}
    theirs = LoraConfig.from_pretrained(str(folder))
    assert theirs.target_modules == set(config["target_modules"])


def test_saved_matrices_have_pefts_keys_and_shapes(captioner_folder, tmp_path):
    ours = load_file(save(adapted(captioner_folder), tmp_path / "ours") / WEIGHTS_FILE)
    paths = [path for path, _ in lora_layers(adapted(captioner_folder).model)]
    make_with_peft(captioner_folder, tmp_path / "theirs", target_modules=paths)
    theirs = load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    assert all(matrix.dtype == torch.float32 for matrix in ours.values())


def test_twenty_adamw_steps_give_pefts_losses(captioner_folder, tmp_path):
    captioner = adapted(captioner_folder)
    theirs = load_with_peft(
        captioner_folder, save(captioner, tmp_path / "adapter"), is_trainable=True
    )
    tokens = captioner.tokenizer.encode(checkpoints.CAPTIONS)
    pixels = random_pixels(len(tokens))
    features = captioner.model.encode(pixels)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for model in (captioner.model, theirs)
    ]
    ours_losses, their_losses = [], []
    for step in range(20):
        index = [(2 * step + i) % len(tokens) for i in range(4)]
        input_ids, targets = collate_captions(
            [tokens[i] for i in index], prompt_length=1, pad_id=captioner.tokenizer.pad_id
        )
        # Ours: sum over valid targets, divided by their number.
        predicted = captioner.model.head(captioner.model.decode(input_ids, features[index]))
        loss = F.cross_entropy(predicted.flatten(0, 1), targets.flatten(),
                               ignore_index=IGNORED, reduction="sum")
        ours_losses.append(loss / (targets != IGNORED).sum())
        # Theirs: the models' own losses with correct labels; BLIP shifts its labels itself.
        if captioner.family == "blip":
            end = torch.where(targets[:, -1:] == IGNORED, 0, targets[:, -1:])
            arguments = {"input_ids": torch.cat([input_ids, end], dim=1),
                         "labels": F.pad(targets, (1, 0), value=IGNORED)}
        else:
            arguments = {"decoder_input_ids": input_ids, "labels": targets}
        their_losses.append(theirs(pixel_values=pixels[index], **arguments).loss)
        for optimizer, losses in zip(optimizers, (ours_losses, their_losses)):
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1] = losses[-1].item()
    assert ours_losses[-1] < 0.8 * ours_losses[0]
    assert ours_losses == pytest.approx(their_losses, rel=1e-4)


# --- provenance and atomic writes -----------------------------------------------------------


def test_provenance_comes_back(captioner_folder, tmp_path):
    captioner = adapted(captioner_folder)
    provenance = {"base_fingerprint": captioner.fingerprints["base"], "prompt": "a photo of é"}
    read = read_adapter(save(captioner, tmp_path / "adapter", provenance=provenance))
    assert read.provenance == provenance
    assert read.prompt == "a photo of é" and read.base_model == str(captioner_folder)
    make_with_peft(captioner_folder, tmp_path / "theirs")
    assert read_adapter(tmp_path / "theirs").provenance == {}
    assert read_adapter(tmp_path / "theirs").prompt == ""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_adapter_replaces_the_old_one_and_nothing_else(blip_folder, tmp_path):
    folder = save(adapted(blip_folder), tmp_path / "adapter")
    (folder / "somebody's notes").touch()
    (folder / "photos").mkdir()
    save(adapted(blip_folder, rank=2), folder)
    assert {path.name for path in folder.iterdir()} == {
        CONFIG_FILE, WEIGHTS_FILE, "somebody's notes", "photos"
    }
    assert read_adapter(folder).config["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["matrices", "configuration", "rename"])
def test_an_interrupted_save_leaves_the_old_adapter_whole(
    blip_folder, tmp_path, monkeypatch, where, error
):
    folder = save(adapted(blip_folder), tmp_path / "adapter")
    before = contents(folder)
    new = adapted(blip_folder, rank=2)

    def interrupted(*arguments, **_):
        if where == "rename" and not str(arguments[0]).endswith(".new"):
            return rename(*arguments)
        raise error

    rename = Path.rename
    if where == "matrices":
        monkeypatch.setattr(adapter_module, "tensor_bytes", interrupted)
    else:
        name = {"configuration": "write_bytes", "rename": "rename"}[where]
        monkeypatch.setattr(Path, name, interrupted)
    with pytest.raises(type(error)):
        save(new, folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_saving_without_lora_layers_is_an_error(captioner, tmp_path):
    with pytest.raises(AdapterError, match="no LoRA layers"):
        save(captioner, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- keys of compiled models ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["in front", "behind the prefix", "within the path"])
def test_keys_written_after_compiling_load_alike(blip_folder, tmp_path, place):
    ours = adapted(blip_folder)
    folder = save(ours, tmp_path / "adapter")
    change = {
        "in front": lambda key: f"_orig_mod.{key}",
        "behind the prefix": lambda key: key.replace("model.text", "model._orig_mod.text"),
        "within the path": lambda key: key.replace(".layer.0.", ".layer.0._orig_mod."),
    }[place]
    rewrite(folder, lambda tensors: {change(key): value for key, value in tensors.items()})
    assert any("_orig_mod" in key for key in load_file(folder / WEIGHTS_FILE))
    again = load_captioner(blip_folder)
    load_adapter(again.model, folder)
    assert torch.equal(logits(again.model), logits(ours.model))


# --- refusals -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_by_us(blip_folder, tmp_path_factory) -> Path:
    return save(adapted(blip_folder), tmp_path_factory.mktemp("made") / "adapter")


@pytest.fixture
def folder(made_by_us, tmp_path) -> Path:
    """A BLIP adapter, free to be damaged."""
    return shutil.copytree(made_by_us, tmp_path / "adapter")


def rewrite(folder: Path, change) -> None:
    tensors = change(load_file(folder / WEIGHTS_FILE))
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS_FILE)


def configure(folder: Path, **changes) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def assert_refused(adapter_folder: Path, base_folder: Path, *messages: str) -> None:
    """Asserts an AdapterError with these words, and an unchanged model."""
    model = load_captioner(base_folder).model
    before = list(model.modules())
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, adapter_folder)
    for message in [str(adapter_folder), *messages]:
        assert message in str(caught.value)
    assert list(model.modules()) == before


QUERY = "text_decoder.bert.encoder.layer.1.attention.self.query"
KEY = f"base_model.model.{QUERY}.lora_A.weight"


@pytest.mark.parametrize("name, value", [
    ("target_parameters", ["x"]), ("trainable_token_indices", [3]),
    ("layer_replication", [[0, 1]]), ("init_lora_weights", "olora"), ("arrow_config", {}),
    ("use_qalora", True),
])
def test_other_kinds_of_adapter_are_refused(blip_folder, folder, name, value):
    configure(folder, **{name: value})
    assert_refused(folder, blip_folder, f"{name} is {value!r}; only LoRA, rsLoRA and DoRA")


def test_settings_of_how_it_was_made_do_not_matter(blip_folder, folder):
    configure(folder, init_lora_weights="gaussian", megatron_core="megatron.core", eva_config={},
              a_setting_of_a_later_peft=None)
    load_adapter(load_captioner(blip_folder).model, folder)


def test_a_pissa_adapter_made_by_peft_is_refused(blip_folder, tmp_path):
    """PEFT changes the base model's weights when it loads one."""
    make_with_peft(blip_folder, tmp_path, init_lora_weights="pissa")
    assert_refused(tmp_path, blip_folder, "init_lora_weights is 'pissa'")


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected \"LORA\". Train with LoRA"),
    ({"peft_type": "absent"}, 'has no "peft_type"; expected an adapter that PEFT or this engine'),
    ({"r": "absent"}, "r is None; expected a whole number from 1"),
    ({"r": 0}, "r is 0; expected a whole number from 1"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a finite number above 0"),
    ({"r": 8.5}, "r is 8.5"),
    ({"r": True}, "r is True; expected a whole number"),
    ({"r": 10**400}, "adapter_config.json: r is 1000"),
    ({"lora_alpha": True}, "lora_alpha is True; expected a finite number"),
    ({"lora_alpha": -1}, "lora_alpha is -1; expected a finite number"),
    ({"lora_alpha": 10**400}, "expected a finite number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
    ({"lora_alpha": 1e39}, "lora_alpha is 1e+39; expected a finite number"),
    ({"lora_dropout": 1.0}, "dropout is 1.0"),
    ({"lora_dropout": float("nan")}, "lora_dropout is nan; expected a number that is at least 0"),
    ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
    ({"lora_dropout": False}, "lora_dropout is False"),
    ({"use_rslora": "no"}, "use_rslora is 'no'; expected true or false"),
    ({"use_dora": "no"}, "use_dora is 'no'; expected true or false"),
    ({"bias": "some"}, "bias is 'some'; expected \"none\", \"all\" or \"lora_only\""),
    ({"modules_to_save": "cls"}, "modules_to_save is 'cls'; expected names or null"),
    ({"layers_to_transform": ["1"]}, "layers_to_transform is ['1']; expected numbers"),
    ({"layers_pattern": 5}, "layers_pattern is 5; expected names or null"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern is {'query': 0}"),
    ({"rank_pattern": {"query": True}}, "rank_pattern is {'query': True}"),
    ({"alpha_pattern": {"query": float("inf")}}, "alpha_pattern is {'query': inf}"),
    ({"exclude_modules": 5}, "exclude_modules is 5; expected names, a regular expression or null"),
    ({"target_modules": ["query", 5]}, "target_modules is ['query', 5]"),
    ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']; expected printable"),
    ({"base_model_name_or_path": "a\0b"}, r"base_model_name_or_path is 'a\x00b'"),
    ({"base_model_name_or_path": "\x1b[2J"}, "base_model_name_or_path is "),
    ({"base_model_name_or_path": "x" * 10**6}, "base_model_name_or_path is 'xxxxxxxxxxxx...x"),
    ({"revision": 5}, "revision is 5"),
    ({"revision": "../../../refs/main"}, "expected a branch, a tag or a commit"),
    ({"auto_mapping": "Blip"}, "auto_mapping is 'Blip'"),
    ({"auto_mapping": {"base_model_class": []}}, "auto_mapping is {'base_model_class': []}"),
    ({"rank_pattern": ["query"]}, "rank_pattern is ['query']; expected {pattern: number}"),
    ({"alpha_pattern": {"query": "8"}}, "alpha_pattern is {'query': '8'}"),
    ({"alpha_pattern": {"(": 8}}, "does not fit"),
    ({"target_modules": "("}, "does not fit"),
    ({"target_modules": None}, "target_modules does not cover"),
    ({"use_newest": True}, "use_newest is True, an unknown setting, perhaps of a newer PEFT; only"),
    ({"newest_config": {"a": 1}}, "newest_config is {'a': 1}, an unknown setting"),
    ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
])
def test_a_wrong_setting_is_refused(blip_folder, folder, changes, message):
    configure(folder, **changes)
    assert_refused(folder, blip_folder, message)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern, message", [
    ("(.?)" * 50 + "[a-z.]*" * 50 + "!|x", "takes more than"),
    ("(((.{0,999}){0,999}){0,999}){0,999}!|x", "takes more than"),
    ("a{99999999999}", "repeats too often"),
    ("((((a{999}){999}){999}){999}){999}", "repeats too often"),
    ("(" * 20_000 + ")" * 20_000, "has 40,000 characters"),
    ("(" * 4_000 + ")" * 4_000, "is not a regular expression"),
    ("(?R)", "is not a regular expression"),
])
def test_a_pattern_that_costs_too_much_is_refused(
    blip_folder, folder, monkeypatch, name, pattern, message
):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.1)
    configure(folder, **{name: pattern})
    assert_refused(folder, blip_folder, message)


def test_a_pattern_that_would_backtrack_without_end_is_answered(blip_folder, folder):
    configure(folder, target_modules="(.+)+!")
    assert_refused(folder, blip_folder, "target_modules does not cover")


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_cost_too_much_only_together_are_refused(
    blip_folder, folder, monkeypatch, name
):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.1)
    slow = {f"query{number}": 4 for number in range(10**5)}
    configure(folder, **{name: slow})
    assert_refused(folder, blip_folder, "takes more than")


@pytest.mark.parametrize("dtype, value", [
    (torch.float32, float("nan")), (torch.float32, float("inf")), (torch.float16, -float("inf")),
    (torch.bfloat16, float("nan")), (torch.float64, 1e39),
])
def test_a_matrix_with_a_number_that_is_not_finite_is_refused(blip_folder, folder, dtype, value):
    def spoil(tensors):
        tensors[KEY] = tensors[KEY].to(dtype)
        tensors[KEY][1, 3] = value
        return tensors

    rewrite(folder, spoil)
    assert_refused(folder, blip_folder, f"{WEIGHTS_FILE}: {QUERY}.lora_A holds NaN, infinity")


@pytest.mark.parametrize("config, factor", [
    ({"lora_alpha": 1e38}, 1e3), ({"lora_alpha": 100}, 1e38),
    ({"alpha_pattern": {"query": 3e38}}, 1e3),
])
def test_an_update_that_overflows_is_refused(blip_folder, folder, config, factor):
    configure(folder, **config)
    rewrite(folder, lambda t: t | {KEY: t[KEY] * factor})
    assert_refused(folder, blip_folder, f"the update of {QUERY} may overflow float32")


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_regular_files_are_read(blip_folder, folder, file, kind):
    path = folder / file
    path.unlink()
    {"device": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()
    assert_refused(folder, blip_folder, f"{path} is not a regular file")


def test_a_file_of_any_size_is_refused_unread(blip_folder, folder):
    for file in (WEIGHTS_FILE, CONFIG_FILE):  # in the other order than they are read
        os.truncate(folder / file, 2**40)  # sparse
        assert_refused(folder, blip_folder, f"{folder / file} has 1,099,511,627,776 bytes")


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"', "\x00"])
def test_a_broken_configuration_is_refused(blip_folder, folder, text):
    (folder / CONFIG_FILE).write_text(text)
    assert_refused(folder, blip_folder, CONFIG_FILE)


def test_a_missing_file_is_named(blip_folder, folder, tmp_path):
    assert_refused(tmp_path / "absent", blip_folder, "no adapter at ")
    (folder / WEIGHTS_FILE).unlink()
    assert_refused(folder, blip_folder, f"has no {WEIGHTS_FILE}")
    assert_refused(folder / CONFIG_FILE, blip_folder, f"has no {CONFIG_FILE}")


@pytest.mark.parametrize("kept_bytes", [0, 5, 3000])
def test_damaged_safetensors_are_refused(blip_folder, folder, kept_bytes):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert_refused(folder, blip_folder, f"cannot read {path}")


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"surprise": torch.zeros(1)}, "surprise is not a LoRA matrix"),
    (lambda t: t | {KEY.replace("A.weight", "magnitude_vector"): torch.zeros(1)},
     "lora_magnitude_vector is left over: use_dora is false"),
    (lambda t: t | {KEY.replace("A.weight", "delta"): torch.zeros(1)},
     "lora_delta is not a LoRA matrix"),
    (lambda t: {k: v for k, v in t.items() if k != KEY},
     f"has {QUERY}.lora_B but not {QUERY}.lora_A"),
    (lambda t: t | {KEY: t[KEY][:2]}, f"{QUERY}.lora_A has rank 2, but {QUERY}.lora_B has rank 4"),
    (lambda t: t | {KEY: t[KEY][0]}, "expected a floating-point matrix"),
    (lambda t: t | {KEY: t[KEY].int()}, "I32 of shape"),
    (lambda t: t | {KEY: t[KEY][:0]}, "expected a floating-point matrix"),
    (lambda t: t | {KEY.replace(".layer", "._orig_mod.layer"): t[KEY]}, "lora_A twice"),
    (lambda t: t | {f"base_model.model.{'x' * 10**6}.lora_A.weight": t[KEY]}, "not a LoRA matrix"),
    (lambda t: {}, "holds no matrices"),
    (lambda t: t | {KEY: t[KEY][:, :60]}, f"{QUERY}.lora_A is (4, 60), expected (4, 64)"),
    (lambda t: t | {KEY.replace("A.", "B."): torch.zeros(65, 4)},
     f"{QUERY}.lora_B is (65, 4), expected (64, 4)"),
    (lambda t: {k.replace("layer.1.", "layer.7."): v for k, v in t.items()},
     "layer.7.attention.output.dense' matches no linear layer"),
    (lambda t: {k: v for k, v in t.items() if QUERY not in k}, f"{QUERY} is missing"),
    (lambda t: {k.replace(QUERY, "query"): v for k, v in t.items()},
     "the model has no linear layer query"),  # PEFT knows it by its whole path only
], ids=["unknown", "magnitude", "variant", "half_pair", "ranks", "vector", "integers", "no_rank",
        "twice", "long", "empty", "in_width",
        "out_width", "no_such_layer", "missing", "tail_of_a_path"])
def test_matrices_that_do_not_fit_are_refused(blip_folder, folder, change, message):
    rewrite(folder, change)
    assert_refused(folder, blip_folder, message)


def test_matrices_that_the_targets_do_not_cover_are_refused(blip_folder, folder):
    """PEFT drops them silently."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    configure(folder, target_modules=[t for t in config["target_modules"] if t != QUERY])
    assert_refused(folder, blip_folder, f"target_modules does not cover {QUERY}")
    configure(folder, target_modules=config["target_modules"], exclude_modules=["1.attention"
              ".self.query"])
    assert_refused(folder, blip_folder, f"target_modules does not cover {QUERY}")


def test_a_layer_of_another_rank_than_the_configuration_says_is_refused(blip_folder, folder):
    """PEFT cannot load it, and its scaling would be ambiguous."""
    other = KEY.replace("A.", "B.")
    rewrite(folder, lambda t: t | {KEY: t[KEY][:2], other: t[other][:, :2]})
    assert_refused(folder, blip_folder, f"{QUERY}.lora_A is (2, 64), expected (4, 64)")


def test_an_adapter_of_another_family_is_refused(
    blip_folder, vit_gpt2_folder, folder, tmp_path
):
    assert_refused(folder, vit_gpt2_folder, "does not fit this model (ViTGPT2Captioner)",
                   "matches no linear layer")
    other = save(adapted(vit_gpt2_folder), tmp_path / "other")
    assert_refused(other, blip_folder, "does not fit this model (BlipCaptioner)")


def test_a_second_adapter_is_refused(blip_folder, folder):
    captioner = adapted(blip_folder)
    before = {name: m.clone() for name, m in lora_parameters(captioner.model).items()}
    with pytest.raises(AdapterError, match="already has LoRA layers"):
        load_adapter(captioner.model, folder)
    after = lora_parameters(captioner.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
