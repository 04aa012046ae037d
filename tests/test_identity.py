"""A run is resumed, and an adapter used, only with the base model and images of before.

Weights and rows have their tests in test_resume.py and test_commands.py.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import read_annotations, settings, write_pictures
from PIL import Image

from lora_engine import __main__ as verbs
from lora_engine.config import TrainingConfig
from lora_engine.data import image_table
from lora_engine.data.image_table import ImageTable, JoinedImages
from lora_engine.data.seen_images import (
    DIGESTS_FILE,
    find_change,
    read_digests,
    sample_digests,
    write_digests,
)
from lora_engine.lora.adapter import is_same, read_adapter, save_adapter
from lora_engine.lora.injection import inject
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.report.run_folder import checkpoint_paths
from lora_engine.stopping import Interrupted
from lora_engine.training import checkpoint_writer
from lora_engine.training.checkpoint import CheckpointError
from lora_engine.training.loop import train
from recipes import blip_cc3m

PARTS = ("base", "configuration", "tokenizer", "preprocessor")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def changed_copy(model: Path, folder: Path, file: str, change: Callable[[dict], object]) -> Path:
    shutil.copytree(model, folder)
    edit(folder / file, change)
    return folder


def config_of(part: str, **values) -> tuple[str, Callable[[dict], object]]:
    return "config.json", lambda config: config[part].update(values)


# --- fingerprints ---------------------------------------------------------------------------


def test_fingerprints_are_those_of_earlier_versions(blip_folder, vit_gpt2_folder):
    """Runs and adapters hold them. Of weights they are in test_pretrained.py."""
    for folder, tokenizer in ((blip_folder, "b69d0540"), (vit_gpt2_folder, "a687a78c")):
        found = load_captioner(folder).fingerprints
        assert tuple(found) == PARTS and found["tokenizer"][:8] == tokenizer
        pixels = json.loads(found["preprocessor"])
        assert sorted(pixels) == ["crop", "mean", "resample", "rescale_factor", "resize", "std"]
    configuration = json.loads(load_captioner(blip_folder).fingerprints["configuration"])
    assert configuration["text_config.num_attention_heads"] == 4
    assert configuration["vision_config.layer_norm_eps"] == 1e-5


def test_what_only_one_version_records_is_not_another_base():
    assert is_same('{"a": 1, "b": 2}', '{"b": 2, "c": 3}')
    assert not is_same('{"a": 1, "b": 2}', '{"b": 3, "c": 3}')
    assert is_same("0a1b", "0a1b") and not is_same("0a1b", "0a1c")
    assert not is_same("[" * 10_000, "{}") and not is_same("5", '{"a": 1}')


CONFIGURATIONS = {
    "blip": [
        config_of(part, **{name: value}) for part, names in {
            "vision_config": {
                "num_attention_heads": 2, "layer_norm_eps": 1e-3, "hidden_act": "relu",
            },
            "text_config": {
                "num_attention_heads": 2, "layer_norm_eps": 1e-3, "hidden_act": "relu",
                "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
            },
        }.items() for name, value in names.items()
    ],
    "vit_gpt2": [
        config_of(part, **{name: value}) for part, names in {
            "encoder": {"num_attention_heads": 2, "layer_norm_eps": 1e-3, "hidden_act": "relu"},
            "decoder": {
                "n_head": 2, "layer_norm_epsilon": 1e-3, "activation_function": "relu",
                "embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3,
                "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
            },
        }.items() for name, value in names.items()
    ],
}


def different_parts(captioner: Captioner, other: Captioner) -> list[str]:
    return [part for part in PARTS if captioner.fingerprints[part] != other.fingerprints[part]]


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_every_setting_of_the_configuration_has_a_part_in_its_fingerprint(
    request, tmp_path, family
):
    model = request.getfixturevalue(f"{family}_folder")
    captioner = load_captioner(model)
    seen = {captioner.fingerprints["configuration"]}
    for number, (file, change) in enumerate(CONFIGURATIONS[family], start=2):
        other = load_captioner(changed_copy(model, tmp_path / str(number), file, change))
        assert different_parts(captioner, other) == ["configuration"]
        seen.add(other.fingerprints["configuration"])
        assert len(seen) == number


def swap_tokens(tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def keep_case(tokenizer: dict) -> None:
    tokenizer["normalizer"].update(lowercase=False, strip_accents=False)


def drop_a_merge(tokenizer: dict) -> None:
    del tokenizer["model"]["merges"][len(tokenizer["model"]["merges"]) // 2]


TOKENIZERS = [("blip", swap_tokens), ("blip", keep_case), ("vit_gpt2", drop_a_merge)]


@pytest.mark.parametrize("family, change", TOKENIZERS)
def test_whatever_changes_token_ids_changes_the_tokenizers_fingerprint(
    request, tmp_path, family, change
):
    model = request.getfixturevalue(f"{family}_folder")
    other = changed_copy(model, tmp_path / "other", "tokenizer.json", change)
    if change is keep_case:  # which transformers reads from here
        edit(other / "tokenizer_config.json", lambda c: c.update(do_lower_case=False))
    captioner = load_captioner(model)
    assert different_parts(captioner, load_captioner(other)) == ["tokenizer"]


def test_what_a_tokenizer_did_before_changes_nothing(captioner, captioner_folder):
    """The truncation of a call stays set in its backend."""
    captioner.tokenizer.tokenizer(["a dog"], max_length=1, truncation=True)
    assert captioner.tokenizer.behavior() == load_captioner(captioner_folder).tokenizer.behavior()


# --- adapters -------------------------------------------------------------------------------

OTHER_BASES = {
    "configuration": config_of("text_config", layer_norm_eps=1e-3),
    "tokenizer": ("tokenizer.json", swap_tokens),
    "preprocessor": (
        "preprocessor_config.json", lambda c: c.update(image_mean=[0.1, 0.2, 0.3])
    ),
}


def adapter_of(model: Path, folder: Path, **changes) -> Path:
    """An untrained adapter, which says of its base what a run writes."""
    captioner = load_captioner(model)
    provenance = {f"{part}_fingerprint": captioner.fingerprints[part] for part in PARTS} | changes
    inject(captioner.model, ["attention"], rank=2)
    save_adapter(captioner.model, folder, base_model=str(model), provenance=provenance)
    return folder


@pytest.mark.parametrize("what", OTHER_BASES)
def test_an_adapter_of_another_base_with_the_same_weights_is_refused_and_can_be_forced(
    command, refused, data, blip_folder, tmp_path, what
):
    other = changed_copy(blip_folder, tmp_path / "other", *OTHER_BASES[what])
    adapter = adapter_of(blip_folder, tmp_path / "adapter")
    given = ["--adapter", adapter, "--model", other]
    image = read_annotations(data / "train.json")[0].image
    differs = f"differs from {other} in its {what};"
    words = [f"was trained on a base model ({blip_folder}) that {differs}", "--force"]
    for verb in (["caption", image], ["evaluate", "--data", data / "val.json"],
                 ["merge", "--out", "merged"]):
        refused(verbs.run_verb, *verb, *given, words=words)
    refused(
        blip_cc3m.main, "--train_data_path", data / "train.json", "--init_adapter", adapter,
        "--model", other, words=["--init_adapter", differs, "its own base"],
    )
    status, out, err = command(verbs.run_verb, "caption", image, *given, "--force")
    assert status == 0 and out.count("\n") == 1 and f"in its {what}" in err


def test_all_that_differs_is_named_and_what_an_adapter_does_not_say_is_not(
    captioner, captioner_folder, tmp_path
):
    changes = {f"{part}_fingerprint": "0" for part in PARTS}
    adapter = read_adapter(adapter_of(captioner_folder, tmp_path / "one", **changes))
    assert adapter.foreign_base("it", captioner.fingerprints) == (
        f"{tmp_path / 'one'} was trained on a base model ({captioner_folder}) that differs from it "
        f"in its weights, configuration, tokenizer and preprocessor (a copy in another number "
        f"format counts as such)"
    )
    older = dataclasses.replace(
        adapter, provenance={"base_fingerprint": captioner.fingerprints["base"]}
    )
    for other in (older, dataclasses.replace(adapter, provenance={})):
        assert other.foreign_base("it", captioner.fingerprints) is None


# --- runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, num_images=10)
    write_pictures(folder, num_images=3, name="val.json")
    return folder


def stop(config: TrainingConfig, *, at_step: int) -> None:
    """Run until it has a checkpoint of this step."""
    real = checkpoint_writer.write_checkpoint

    def write(path, **kwargs):
        real(path, **kwargs)
        if path.name == f"step-{at_step:08d}":
            raise Interrupted(15)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint_writer, "write_checkpoint", write)
        train(config)


def short_run(model: Path, data: Path, run: Path) -> TrainingConfig:
    return settings(model, data, run, save_every="1", num_samples=0)


@pytest.fixture(scope="module")
def whole(blip_folder, pictures, tmp_path_factory) -> Path:
    """A run of six steps that nothing has stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(short_run(blip_folder, pictures, path))
    return path


@pytest.fixture(scope="module")
def stopped(blip_folder, pictures, tmp_path_factory) -> Path:
    """The same run, stopped after two steps."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    stop(short_run(blip_folder, pictures, path), at_step=2)
    return path


def resume(stopped: Path, tmp_path: Path, model: Path, data: Path) -> Path:
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(stopped, run)
    train(dataclasses.replace(short_run(model, data, run), resume="newest"))
    return run


def assert_same(run: Path, whole: Path) -> None:
    last = Path("step-00000006")
    for name in (last / "adapter_model.safetensors", last / "optimizer.safetensors", DIGESTS_FILE):
        files = [folder / "checkpoints" / name for folder in (run, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("what", OTHER_BASES)
def test_a_run_does_not_go_on_with_another_base_of_the_same_weights(
    blip_folder, pictures, stopped, tmp_path, what
):
    other = changed_copy(blip_folder, tmp_path / "other", *OTHER_BASES[what])
    with pytest.raises(CheckpointError, match=f"began with another {what} than --model {other} a"):
        resume(stopped, tmp_path, other, pictures)


def test_a_run_goes_on_with_its_images_in_another_folder(
    blip_folder, pictures, stopped, whole, tmp_path, capsys
):
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    assert_same(resume(stopped, tmp_path, blip_folder, moved), whole)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("overwritten", ["train_07.png", "val_01.png"])
def test_a_run_does_not_go_on_with_another_image_of_the_same_name(
    blip_folder, pictures, stopped, tmp_path, overwritten
):
    other = Path(shutil.copytree(pictures, tmp_path / "moved"))
    path = other / "images" / overwritten
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(path)
    with pytest.raises(CheckpointError, match=f"began with other images: {path} has changed"):
        resume(stopped, tmp_path, blip_folder, other)


def test_images_of_equal_names_that_were_two_are_not_one(blip_folder, pictures, tmp_path):
    """The rows are the same: texts, and names without folders."""
    folder = Path(shutil.copytree(pictures, tmp_path / "data"))
    (folder / "more").mkdir()
    shutil.copy(folder / "images" / "train_04.png", folder / "more" / "train_03.png")
    edit(folder / "train.json", lambda rows: rows[4].update(image="more/train_03.png"))
    run = tmp_path / "first"
    stop(short_run(blip_folder, folder, run), at_step=1)
    edit(folder / "train.json", lambda rows: rows[4].update(image="images/train_03.png"))
    with pytest.raises(CheckpointError, match="other images: there are 12, not 13"):
        resume(run, tmp_path, blip_folder, folder)


def make_old(run: Path) -> None:
    """As a run folder was that an earlier version began."""
    (run / "checkpoints" / DIGESTS_FILE).unlink()
    for checkpoint in checkpoint_paths(run / "checkpoints"):
        edit(checkpoint / "state.json", lambda state: [
            state["fingerprints"].pop(part) for part in PARTS[1:]
        ])
        data = (checkpoint / "state.json").read_bytes()
        described = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(checkpoint / "manifest.json", lambda files: files.update({"state.json": described}))


def test_a_run_that_an_earlier_version_began_goes_on_to_the_bit_and_is_known_from_then_on(
    blip_folder, pictures, stopped, whole, tmp_path, capsys
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    make_old(run)
    assert_same(resume(stopped, tmp_path, blip_folder, pictures), whole)
    warning, = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "has no record of its configuration, tokenizer, preprocessor, images, so" in warning
    resume(stopped, tmp_path, blip_folder, pictures)
    assert "warning" not in capsys.readouterr().err
    other = changed_copy(blip_folder, tmp_path / "other", *OTHER_BASES["tokenizer"])
    with pytest.raises(CheckpointError, match="began with another tokenizer"):
        resume(stopped, tmp_path, other, pictures)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, 32),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1])
                                                   + path.read_bytes()[1:]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without an end": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_digests_that_cannot_be_read_are_no_digests(tmp_path, damage):
    path = tmp_path / DIGESTS_FILE
    digests = np.frombuffer(bytes(range(160)), dtype="V16")
    write_digests(path, digests)
    assert read_digests(path).tobytes() == digests.tobytes()
    DAMAGE[damage](path)
    assert read_digests(path) is None


def test_lost_digests_are_told_and_taken_anew(
    blip_folder, pictures, stopped, whole, tmp_path, capsys
):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    os.truncate(run / "checkpoints" / DIGESTS_FILE, 100)
    assert_same(resume(stopped, tmp_path, blip_folder, pictures), whole)
    assert "has no record of its images, so" in capsys.readouterr().err


def test_digests_are_written_when_there_are_new_ones(tmp_path):
    path, digests = tmp_path / DIGESTS_FILE, np.zeros(3, dtype="V16")
    written = write_digests(path, digests)
    assert path.stat().st_size == 4 * 16
    path.unlink()
    assert write_digests(path, digests, written) == written and not path.exists()
    digests[1] = np.void(bytes(range(16)))
    assert write_digests(path, digests, written) != written
    assert read_digests(path).tobytes() == digests.tobytes()


def test_a_sample_of_the_images_is_looked_at(tmp_path, monkeypatch):
    """64 of 1000, and afterwards 64 of those that are known; what cannot be read is no change."""
    monkeypatch.setattr(
        image_table, "read_image_file", lambda path: looked_at.append(path) or path.encode()
    )
    paths = JoinedImages(
        ImageTable.of_files(f"{number}.jpg" for number in range(990)),
        ImageTable.of_files(f"{number}.jpg" for number in range(990, 1000)),
    )
    looked_at: list[str] = []
    digests = sample_digests(paths)
    assert len(set(looked_at)) == 64 and {"0.jpg", "999.jpg"} < set(looked_at)
    sampled, looked_at[:] = sorted(looked_at), []
    assert find_change(paths, digests) is None and sorted(looked_at) == sampled
    assert find_change(JoinedImages(), np.zeros(0, dtype="V16")) is None
    monkeypatch.undo()
    assert find_change(paths, digests) is None  # no such files
