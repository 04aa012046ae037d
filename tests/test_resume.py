"""Runs that are stopped, killed or hindered, and go on as if nothing had been."""

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import resource
import signal
import struct
import sys
import termios
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from forking import Ended, in_child
from pictures import json_lines, settings, write_pictures

from lora_engine import cli
from lora_engine.captioning import captioner as captioner_module
from lora_engine.config import TrainingConfig
from lora_engine.data import batches, workers
from lora_engine.data.batches import CaptionedImages
from lora_engine.data.subsets import hold_out_sampled
from lora_engine.features import store as store_module
from lora_engine.lora.adapter import read_adapter
from lora_engine.report import live
from lora_engine.report import metrics_log as metrics_log_module
from lora_engine.report.run_folder import checkpoint_paths
from lora_engine.stopping import Interrupted, LoadingStopped, TrainingStopped
from lora_engine.training import checkpoint_writer, meter, run_data, trainer, validation_captions
from lora_engine.training import run as run_module
from lora_engine.training import setup as run_setup
from lora_engine.training import validation as validation_module
from lora_engine.training.checkpoint import CheckpointError, read_checkpoint
from lora_engine.training.loop import train
from lora_engine.training.micro_batches import split
from lora_engine.training.run_data import captioned_images
from lora_engine.training.trainer import Trainer
from recipes import blip_cc3m

TIMES = ("images_per_s", "data_wait_share")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=22)
    write_pictures(folder, num_images=6, name="val.json")
    return folder


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    monkeypatch.setattr(run_module, "draw_loss_curve", lambda *paths: None)


def long_run(model: Path, data: Path, run: Path, **changes) -> TrainingConfig:
    """13 steps: dropout, accumulation, last steps of epochs that are shorter, a line each 4 steps.

    Validations are at steps 5, 10 and 13.
    """
    return settings(model, data, run, **{
        "epochs": 4, "grad_accum_steps": 2, "batch_size": 3, "log_every": 4, "eval_every": 5,
        "max_steps": 13, "warmup_steps": 3, "num_samples": 2, "save_every": "2", **changes,
    })


@pytest.fixture(scope="module")
def unbroken(blip_folder, data, tmp_path_factory) -> Path:
    """The run folder of a run that nothing has stopped."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
        train(long_run(blip_folder, data, path))
    return path


def trajectory(run: Path) -> list[dict]:
    """metrics.jsonl but for times, with numbers to the bit."""
    lines = json_lines(run / "metrics.jsonl")
    return [
        {key: value.hex() if isinstance(value, float) else value for key, value in line.items()
         if key not in TIMES}
        for line in lines
    ]


def assert_same_run(run: Path, other: Path) -> None:
    assert trajectory(run) == trajectory(other)
    last = [checkpoint_paths(folder / "checkpoints")[-1] for folder in (run, other)]
    assert last[0].name == last[1].name
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    names = ["adapter/adapter_model.safetensors", "captions.jsonl", "samples.jsonl"]
    names += ["adapter_ema/adapter_model.safetensors"] * (run / "adapter_ema").exists()
    for name in names:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, other)]
    assert names[0] == names[1]


def killing(config: TrainingConfig, at_step: int, name: str = "accumulate"):
    """A run that kills itself when a step calls a function."""
    def run():
        real = getattr(Trainer, name)
        calls = []

        def die(*args, **kwargs):
            calls.append(1)
            if len(calls) == at_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(Trainer, name, die)
        train(config)

    return run


def go_on(config: TrainingConfig, **changes):
    return replace(config, resume="newest", **changes)


# --- killed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"val_fraction": 0.3}])
def test_a_run_that_an_earlier_version_began_keeps_its_held_out_images(
    blip_folder, data, tmp_path, monkeypatch, given
):
    """Its settings lack those of the data, among them val_size; 5 % were held out by default."""
    new = {"data_format", "image_field", "caption_field", "image_root", "split", "read_order",
           "val_size", "lr_schedule", "min_lr", "warmup_ratio", "decay_ratio", "adam_beta1",
           "adam_beta2", "ema_decay"}
    as_dict = TrainingConfig.as_dict
    config = long_run(blip_folder, data, tmp_path / "run", val_data_path=None, max_steps=7, **given)
    whole = replace(config, output_path=str(tmp_path / "whole"))
    with monkeypatch.context() as earlier:
        earlier.setattr(TrainingConfig, "as_dict", lambda config: {
            name: value for name, value in as_dict(config).items() if name not in new
        } | {"val_fraction": config.val_fraction or 0.05})
        earlier.setattr(run_data, "hold_out", lambda pairs, *, fraction, size, seed: (
            hold_out_sampled(pairs, fraction=fraction or 0.05, seed=seed)
        ))
        train(whole)
        ended = in_child(killing(config, 4), tmp_path / "log")
        assert ended.status == -signal.SIGKILL, ended.output
    train(go_on(config))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    held_out = {line["image"] for line in json_lines(tmp_path / "run" / "samples.jsonl")}
    train(replace(config, output_path=str(tmp_path / "new")))
    assert held_out != {line["image"] for line in json_lines(tmp_path / "new" / "samples.jsonl")}


@pytest.mark.parametrize("variant", [
    {"init_lora_weights": "pissa", "use_dora": True, "loraplus_lr_ratio": 4.0, "use_rslora": True,
     "lora_rank": 3, "rank_pattern": ("feed_forward=2",)},
    {"init_lora_weights": "eva", "use_lorafa": True, "lora_layers": (1,)},
])
def test_a_killed_run_of_a_variant_is_bit_identical_to_the_one_that_was_not(
    blip_folder, data, tmp_path, variant, capsys
):
    short = {"max_steps": 8} | variant
    train(long_run(blip_folder, data, tmp_path / "whole", **short))
    told = capsys.readouterr().out
    assert f"initialization {variant['init_lora_weights']}, " in told
    assert f"variant {'LoRA-FA' if 'use_lorafa' in variant else 'rsLoRA, DoRA'}, init" in told
    assert "lora_layers 1\n" in told or "rank_pattern feed_forward=2, loraplus" in told
    config = long_run(blip_folder, data, tmp_path / "run", **short)
    ended = in_child(killing(config, 6), tmp_path / "log")
    assert ended.status == -signal.SIGKILL, ended.output
    train(go_on(config))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_average_of_a_run_with_eva_begins_with_its_components(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run_module, "NUM_ROWS", 7)
    config = long_run(
        blip_folder, data, tmp_path / "run", max_steps=1, init_lora_weights="eva", ema_decay=0.9,
        lr=1e-4,
    )
    train(config)
    assert "layer inputs on 10 captions" in capsys.readouterr().out  # 6 and 4 of two steps
    monkeypatch.setattr(run_module, "NUM_ROWS", 100)
    train(dataclasses.replace(config, output_path=str(tmp_path / "all")))
    assert "layer inputs on 22 captions" in capsys.readouterr().out, "each once"
    adapter, average = (
        read_adapter(tmp_path / "run" / name).matrices for name in ("adapter", "adapter_ema")
    )
    for name in adapter:
        if name.endswith("lora_A"):
            torch.testing.assert_close(average[name], adapter[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["blip", "vit_gpt2"])
def test_killed_three_times_a_run_is_bit_identical_to_the_one_that_was_not(
    request, unbroken, data, tmp_path, family
):
    """Each time in the middle of an epoch and of a line of metrics, with other workers; the other
    family with a moving average, which is best at another step."""
    model = request.getfixturevalue(f"{family}_folder")
    expected, changes = unbroken, {}
    if family != "blip":
        expected, changes = tmp_path / "expected", {"ema_decay": 0.9, "lr_schedule": "cosine"}
        train(long_run(model, data, expected, **changes))
    config = long_run(model, data, tmp_path / "run", **changes)
    for attempt, (at_step, num_workers) in enumerate([(4, 2), (3, 0), (6, 1)]):
        config = go_on(config, num_workers=num_workers)
        ended = in_child(killing(config, at_step), tmp_path / "log")
        assert ended.status == -signal.SIGKILL, ended.output
        if attempt:
            assert "resuming after step" in ended.output
    train(go_on(config, num_workers=0))
    assert_same_run(tmp_path / "run", expected)


def test_what_was_logged_after_the_checkpoint_comes_once(unbroken, blip_folder, data, tmp_path):
    """Killed behind the line of validation 5, before its checkpoint, with half lines at the ends.
    """
    config = long_run(blip_folder, data, tmp_path / "run")

    def run():
        real = validation_captions.ValidationCaptions.write

        def die(self, folder, step):
            if step:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, folder, step)

        validation_captions.ValidationCaptions.write = die
        train(config)

    ended = in_child(run, tmp_path / "log")
    assert ended.status == -signal.SIGKILL
    run = tmp_path / "run"
    assert json_lines(run / "metrics.jsonl")[-1]["step"] == 5
    assert checkpoint_paths(run / "checkpoints")[-1].name == "step-00000004"
    for name in ("metrics.jsonl", "samples.jsonl", "skipped.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"event": "train", "st')
    train(go_on(config))
    (run / "skipped.jsonl").unlink()
    assert_same_run(run, unbroken)


def test_killed_before_its_first_step_a_run_begins_anew(unbroken, blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run")

    def die_in_the_first_validation():
        validation_module.validation_loss = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        train(config)

    ended = in_child(die_in_the_first_validation, tmp_path / "log")
    assert ended.status == -signal.SIGKILL
    with pytest.raises(ValueError, match="never overwrites"):
        train(config)
    train(go_on(config))
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_goes_on_as_exactly(
    blip_folder, data, tmp_path, precision
):
    """The moving average and fp16's loss scale, too, which grows or halves with the steps before.
    """
    whole = long_run(
        blip_folder, data, tmp_path / "whole", precision=precision, max_steps=7, ema_decay=0.5
    )
    train(whole)
    config = replace(whole, output_path=str(tmp_path / "run"))
    stopped_after(config, 4)
    train(go_on(config))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    states = [
        read_checkpoint(checkpoint_paths(tmp_path / name / "checkpoints")[-1]).state["scaler"]
        for name in ("run", "whole")
    ]
    assert states[0] == states[1] and bool(states[0]) == (precision == "fp16")


def test_where_there_is_no_run_yet_resume_begins_it(unbroken, blip_folder, data, tmp_path):
    train(go_on(long_run(blip_folder, data, tmp_path / "run")))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_has_nothing_to_do(unbroken, blip_folder, data, tmp_path, capsys):
    run = copy_of(unbroken, tmp_path)
    before = trajectory(run)
    summary = train(go_on(long_run(blip_folder, data, run)))
    assert trajectory(run) == before and summary.last_step == 13
    told = "is finished (step 13 of 13); to train on, resume it with a higher --max_steps\n"
    assert told in capsys.readouterr().out


def copy_of(run: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "run"))


def stopped_after(config: TrainingConfig, step: int) -> None:
    """Run until a signal comes in this step."""
    real = Trainer.update
    calls: list[int] = []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "update", signalled)
        train(config)


def test_a_damaged_newest_checkpoint_is_passed_over(
    unbroken, blip_folder, data, tmp_path, capsys
):
    config = long_run(blip_folder, data, tmp_path / "run")
    stopped_after(config, 9)
    newest = checkpoint_paths(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name == "step-00000009"
    (newest / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="optimizer.safetensors is damaged"):
        train(replace(config, resume=str(newest)))
    train(go_on(config))
    assert "skipped a checkpoint" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints" / "step-00000009.set_aside").rename(tmp_path / "aside")
    assert_same_run(tmp_path / "run", unbroken)


def test_a_named_checkpoint_is_gone_back_to(unbroken, blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run", keep_last=9)
    stopped_after(config, 9)
    run = tmp_path / "run"
    earlier = replace(config, resume=str(run / "checkpoints" / "step-00000004"))
    assert read_adapter(run / "adapter").provenance["step"] == "5"
    stopped_after(earlier, 1)
    assert read_adapter(run / "adapter").provenance["step"] == "0"  # the best of then
    train(earlier)
    assert trajectory(run) == trajectory(unbroken)
    with pytest.raises(CheckpointError, match="not a checkpoint of the run"):
        train(replace(config, resume=str(unbroken / "checkpoints" / "step-00000013")))
    with pytest.raises(CheckpointError, match="one of .*step-00000013"):
        train(replace(config, resume=str(run / "checkpoints" / "step-00000099")))


def test_checkpoints_are_as_often_as_asked(blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run", keep_last=99, save_every="5")
    train(config)
    steps = [int(p.name[5:]) for p in checkpoint_paths(tmp_path / "run" / "checkpoints")]
    assert steps == [0, 5, 10, 13]


def test_checkpoints_by_time(blip_folder, data, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint_writer.time, "monotonic", lambda: now[0])
    real = Trainer.update

    def half_a_minute(*args, **kwargs):
        now[0] += 30
        return real(*args, **kwargs)

    monkeypatch.setattr(Trainer, "update", half_a_minute)
    config = long_run(blip_folder, data, tmp_path / "run", keep_last=99, save_every="2min")
    train(config)
    steps = [int(p.name[5:]) for p in checkpoint_paths(tmp_path / "run" / "checkpoints")]
    assert steps == [0, 4, 5, 9, 10, 13]  # those of new bests count for the time, too


def test_two_processes_do_not_train_in_one_folder(blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run")
    stopped_after(config, 3)
    read_end, write_end = os.pipe()

    def hold():
        real = run_module.Run.steps

        def wait(*args):
            os.write(write_end, b".")
            time.sleep(60)
            return real(*args)

        run_module.Run.steps = wait
        train(go_on(config))

    child = os.fork()
    if child == 0:
        try:
            with redirect_stdout(io.StringIO()):
                hold()
        finally:
            os._exit(0)
    try:
        assert os.read(read_end, 1) == b"."
        for again in (go_on(config), config):  # the second is not told to delete the folder
            with pytest.raises(ValueError, match="another process is training"):
                train(again)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)
    train(go_on(config))  # the lock ended with its holder


# --- settings of a run that goes on ---------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(blip_folder, data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
        stopped_after(long_run(blip_folder, data, path), 7)
    return path


@pytest.mark.parametrize("change", [
    {"lr": 1e-4}, {"batch_size": 4}, {"seed": 1}, {"grad_accum_steps": 1}, {"lora_rank": 4},
    {"lora_targets": ("query",)}, {"lora_dropout": 0.0}, {"warmup_steps": 0},
    {"max_grad_norm": 0.5}, {"label_smoothing": 0.1}, {"prompt": "a"}, {"max_caption_tokens": 9},
    {"eval_every": 3}, {"best_by": "cider_d"}, {"epochs": 2},
    {"max_steps": 12}, {"cache_dtype": "int8"}, {"weight_decay": 0.5}, {"lr_schedule": "wsd"},
    {"ema_decay": 0.9}, {"adam_beta2": 0.99},
], ids=str)
def test_a_setting_that_would_change_the_run_is_refused_by_name(
    halfway, blip_folder, data, tmp_path, change
):
    run = copy_of(halfway, tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    name, = change
    with pytest.raises(ValueError, match=f"another --{name} ") as caught:
        train(go_on(long_run(blip_folder, data, run), **change))
    value, = change.values()
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    assert f"--{name} {shown} (the run has " in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_number_format_is_refused(halfway, blip_folder, data, tmp_path):
    config = go_on(long_run(blip_folder, data, copy_of(halfway, tmp_path)))
    with pytest.raises(CheckpointError, match="bf16 means bf16 here, the run has fp32"):
        train(replace(config, precision="bf16"))
    train(replace(config, precision="fp32"))  # what auto means


def test_all_settings_are_either_compared_or_named_as_free():
    """So that a new one is not forgotten."""
    from lora_engine.config import _MAY_CHANGE, _MAY_GROW, _MAY_ROUND

    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    free = _MAY_CHANGE | set(_MAY_GROW) | set(_MAY_ROUND)
    assert free <= names
    assert not free & {
        "lr", "batch_size", "seed", "lora_rank", "eval_every", "init_lora_weights", "use_lorafa",
        "loraplus_lr_ratio", "lr_schedule", "min_lr", "warmup_ratio", "decay_ratio", "ema_decay",
    }


def test_more_epochs_continue_the_run_with_a_decay_that_is_told(
    halfway, blip_folder, data, tmp_path, capsys
):
    run = copy_of(halfway, tmp_path)
    capsys.readouterr()
    train(go_on(long_run(blip_folder, data, run), epochs=5, max_steps=None))
    said = capsys.readouterr().out
    assert "--epochs 4 -> 5, --max_steps 13 -> none" in said
    assert "the learning rate is that of a run of 20 steps, not 13 (--lr_schedule linear)" in said
    lines = json_lines(run / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in lines if line["event"] == "train"}
    assert rates[5] == pytest.approx(1e-3 * 9 / 10)  # of 13 steps, 3 of them warming up
    assert rates[8] == pytest.approx(1e-3 * 13 / 17)  # of 20
    assert rates[20] == pytest.approx(1e-3 / 17)
    again = TrainingConfig.from_dict(json.loads((run / "config.json").read_text()))
    assert again.epochs == 5
    train(replace(again, resume="newest"))  # what the run has now is what holds


def test_from_before_its_decay_a_wsd_run_continues_as_the_longer_run_it_becomes(
    blip_folder, data, tmp_path, capsys
):
    """The checkpoint of that step is kept for it."""
    settings = {"lr_schedule": "wsd", "decay_ratio": 0.4, "save_every": "99", "keep_last": 1,
                "eval_captions": 0, "num_samples": 0}
    train(long_run(blip_folder, data, tmp_path / "longer", **settings))
    config = long_run(blip_folder, data, tmp_path / "run", **settings)
    shorter = train(replace(config, max_steps=8))
    assert "falls over the last 4 of 8 steps; the checkpoint of step 4" in capsys.readouterr().out
    lines = json_lines(shorter.path / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in lines if line["event"] == "train"}
    assert rates == {4: 1e-3, 5: 1e-3, 8: pytest.approx(1e-3 * (1 - 0.75**0.5))}
    train(replace(config, resume=str(shorter.path / "checkpoints" / "step-00000004")))
    assert "that of a run of 13 steps, not 8 (--lr_schedule wsd): the next step's is 0.001" in (
        capsys.readouterr().out
    )
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "longer")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (
        tmp_path / "longer" / weights
    ).read_bytes()


@pytest.mark.parametrize("change", [
    {"validations": []}, {"validations": {"losses": 3}}, {"captions": None}, {"meter": {}},
    {"seconds": "long"}, {"step": 10**9}, {"step": -1}, {"step": "7"}, {"settings": []},
], ids=str)
def test_a_state_of_wrong_kinds_is_an_error_in_words(
    halfway, blip_folder, data, tmp_path, change
):
    """Even with a manifest that vouches for it."""
    run = copy_of(halfway, tmp_path)
    newest = checkpoint_paths(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    data_of_it = json.dumps({**state, **change}).encode()
    (newest / "state.json").write_bytes(data_of_it)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": len(data_of_it), "sha256": hashlib.sha256(data_of_it).hexdigest()
    }
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="state.json"):
        train(replace(long_run(blip_folder, data, run), resume=str(newest)))


def test_other_weights_or_data_are_refused(halfway, vit_gpt2_folder, blip_folder, data, tmp_path):
    run = copy_of(halfway, tmp_path)
    config = go_on(long_run(blip_folder, data, run))
    with pytest.raises(CheckpointError, match="other weights .*than --model .*vit_gpt2"):
        train(replace(config, model=str(vit_gpt2_folder)))
    other = tmp_path / "other"
    other.mkdir()
    write_pictures(other, num_images=21)
    with pytest.raises(CheckpointError, match="with other training rows than .*other"):
        train(replace(config, train_data_path=str(other / "train.json")))
    with pytest.raises(CheckpointError, match="with other validation rows than"):
        train(replace(config, val_data_path=str(data / "train.json")))
    rows = json.loads((data / "train.json").read_text())
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps([
        {"text": row["text"], "image": str(data / row["image"])} for row in rows
    ]))
    train(replace(config, train_data_path=str(moved)))  # the same rows, elsewhere


def test_the_command_line_needs_nothing_but_the_folder_and_the_model(
    unbroken, halfway, blip_folder, tmp_path, command
):
    run = copy_of(halfway, tmp_path)
    model = ("--model", blip_folder)
    status, out, err = command(blip_cc3m.main, "--output_path", run, "--resume", *model)
    assert status == 0 and "resuming after step 7 of 13" in out
    assert_same_run(run, unbroken)
    status, out, err = command(
        blip_cc3m.main, "--resume", "--output_path", run, "--lr", "1", *model
    )
    assert status == cli.USAGE_ERROR and "another --lr 1.0 (the run has 0.001)" in err
    status, out, err = command(blip_cc3m.main, "--resume")
    assert status == cli.USAGE_ERROR and "--resume needs the --output_path" in err
    settings_of_it = json.loads((run / "config.json").read_text())
    for wrong in ('{"what": 1}', "[1]", "null", "[" * 9999, *(
        json.dumps({**settings_of_it, **change}) for change in (
            {"epochs": "3"}, {"lr": None}, {"save_every": 5}, {"precision": "fp8"},
            {"train_data_path": 5}, {"lora_targets": 5}, {"compile": 1}, {"seed": True},
        )
    )):
        (run / "config.json").write_text(wrong)
        status, out, err = command(blip_cc3m.main, "--resume", "--output_path", run)
        assert status == cli.USAGE_ERROR and "config.json does not hold the settings" in err


@pytest.mark.parametrize("value", ["0", "x", "1.5", "-3", "10 minutes", "0s", ""])
def test_save_every_is_steps_or_a_time(value):
    with pytest.raises(ValueError, match="--save_every is .*expected steps"):
        TrainingConfig(model="", save_every=value).check()


# --- signals --------------------------------------------------------------------------------

PHASES = {  # a function that runs in this phase, and from which of its calls on
    "a step": (Trainer, "update", 3),
    "the first validation": (validation_module, "caption_loss", 1),
    "a later validation": (validation_module, "caption_loss", 4),
    "captioning": (validation_captions, "caption_features", 4),
    "saving": (checkpoint_writer, "write_checkpoint", 3),
}


@pytest.mark.parametrize("phase, number", [
    *((phase, signal.SIGTERM) for phase in PHASES),
    *((phase, signal.SIGINT) for phase in ("a step", "the first validation")),
])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint_and_the_report(
    unbroken, blip_folder, data, tmp_path, phase, number
):
    run = tmp_path / "run"
    config = long_run(blip_folder, data, run, num_workers=2)
    flags = [f"--{name}={value}" for name, value in _flags(config)]

    def signalled():
        owner, name, call = PHASES[phase]
        real, calls = getattr(owner, name), []

        def send(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        setattr(owner, name, send)
        sys.argv = ["program", *flags]
        return cli.run(blip_cc3m.main)

    ended = in_child(signalled, tmp_path / "log")
    assert ended.status == 128 + number, ended.output
    assert "Traceback" not in ended.output
    if phase == "the first validation":
        assert not run.exists()
        return
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "This run is not finished: it stopped at" in page
    assert f"({signal.Signals(number).name})" in page
    assert "--resume to continue from there" in ended.output
    newest = read_checkpoint(checkpoint_paths(run / "checkpoints")[-1])
    expected = {"a step": 3, "a later validation": 5, "captioning": 5, "saving": 4}[phase]
    assert newest.step == expected
    assert not [path for path in run.rglob(".*")]
    train(go_on(long_run(blip_folder, data, run)))
    assert_same_run(run, unbroken)


def _flags(config: TrainingConfig):
    for name, value in config.as_dict().items():
        default = getattr(TrainingConfig(model=""), name)
        if value != default and name != "lora_targets":
            yield name, value


def test_a_second_signal_stops_at_once_and_loading_processes_end(blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run", num_workers=2)
    children = tmp_path / "children"

    def signalled():
        def send(*args, **kwargs):
            import multiprocessing

            pids = [str(child.pid) for child in multiprocessing.active_children()]
            children.write_text(" ".join(pids))
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

        Trainer.update = send
        return cli.run(lambda args: train(config) and 0)

    ended = in_child(signalled, tmp_path / "log")
    assert ended.status == cli.INTERRUPTED, ended.output
    assert "Traceback" not in ended.output
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_loading_processes_leave_signals_to_who_started_them(blip_folder, data, tmp_path):
    """A terminal's Ctrl-C, and a batch system's SIGTERM, reach all processes of a group."""
    config = long_run(blip_folder, data, tmp_path / "run", num_workers=2)

    def signalled():
        os.setsid()
        real = Trainer.update

        def send(*args, **kwargs):
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.2)
            return real(*args, **kwargs)

        Trainer.update = send
        return cli.run(lambda args: train(config) and 0)

    ended = in_child(signalled, tmp_path / "log")
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert "worker" not in ended.output and "Traceback" not in ended.output
    assert checkpoint_paths(tmp_path / "run" / "checkpoints")[-1].name == "step-00000001"


def at_step(step: int, act, name: str = "update") -> None:
    """From the step's call of a function on, `act` comes before it; for use in a child."""
    real, calls = getattr(Trainer, name), []

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return real(*args, **kwargs)

    setattr(Trainer, name, acting)


def ended_run(config: TrainingConfig, prepare, tmp_path: Path) -> Ended:
    def run():
        prepare()
        return cli.run(lambda args: train(config) and 0)

    return in_child(run, tmp_path / "log")


def newest_step(run: Path) -> int:
    return read_checkpoint(checkpoint_paths(run / "checkpoints")[-1]).step


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129),
], ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_two_signals_have_the_status_of_the_signal(blip_folder, data, tmp_path, number, status):
    config = long_run(blip_folder, data, tmp_path / "run", save_every="99")

    def twice():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    ended = ended_run(config, lambda: at_step(3, twice), tmp_path)
    assert ended.status == status, ended.output
    assert "Traceback" not in ended.output
    # A closed terminal sends SIGHUP twice: by itself, and by the shell.
    assert newest_step(tmp_path / "run") == (3 if number == signal.SIGHUP else 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_a_signal_that_is_ignored_stays_ignored(blip_folder, data, tmp_path, number):
    config = long_run(blip_folder, data, tmp_path / "run", max_steps=4)

    def prepare():
        signal.signal(number, signal.SIG_IGN)
        at_step(3, lambda: os.kill(os.getpid(), number))

    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == 0, ended.output
    assert newest_step(tmp_path / "run") == 4


@pytest.mark.parametrize("phase", ["write_report", "the summary"])
def test_a_signal_after_the_last_step_finishes_all_and_tells_by_the_status(
    unbroken, blip_folder, data, tmp_path, phase
):
    config = long_run(blip_folder, data, tmp_path / "run")

    def prepare():
        owner, name = (live, phase) if phase != "the summary" else (
            validation_captions.ValidationCaptions, "compare"
        )
        real = getattr(owner, name)

        def signalled(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            setattr(owner, name, real)
            return real(*args, **kwargs)

        at_step(13, lambda: setattr(owner, name, signalled))

    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == 128 + signal.SIGTERM and "Traceback" not in ended.output, ended.output
    assert "This run is not finished" not in (tmp_path / "run" / "report.html").read_text()
    assert_same_run(tmp_path / "run", unbroken)


def test_a_signal_while_the_cache_is_closed_ends_the_wait(blip_folder, data, tmp_path):
    config = long_run(
        blip_folder, data, tmp_path / "run", max_steps=2, cache="disk", cache_dir=str(tmp_path)
    )

    def prepare():
        store_module.FeatureStore._write = lambda self, batch: time.sleep(100)
        real = store_module.FeatureStore.close

        def close(self, timeout_s):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            real(self, timeout_s)

        store_module.FeatureStore.close = close

    begin_s = time.monotonic()
    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == 128 + signal.SIGTERM and "Traceback" not in ended.output, ended.output
    assert time.monotonic() - begin_s < 10  # of 30
    assert newest_step(tmp_path / "run") == 2


def hang_in_loading(how: str, has_begun: Path) -> None:
    """After four training batches one does not come: its image is not read, or, once `has_begun`
    is there, it is sent in part."""
    main, real, send = os.getpid(), CaptionedImages.__getitem__, Connection._send_bytes
    rows: list[int] = []
    sent: list[int] = []

    def get(self, place):
        if self.substitute:
            rows.append(place.row)
        if how == "reading" and len(rows) > 12:
            time.sleep(100)
        return real(self, place)

    def send_a_part(self, data):
        if os.getpid() == main or threading.current_thread().name != "QueueFeederThread":
            return send(self, data)
        sent.append(len(data))
        if len(sent) <= 4 or not rows:
            return send(self, data)
        while not has_begun.exists():
            time.sleep(0.01)
        os.write(self.fileno(), struct.pack("!i", len(data)) + bytes(data[:9]))
        os.kill(os.getpid(), signal.SIGSTOP)

    CaptionedImages.__getitem__ = get
    if how == "sending":
        Connection._send_bytes = send_a_part


@pytest.mark.parametrize("how, num_workers, end", [
    ("reading", 0, "SIGTERM"), ("reading", 0, "--worker_timeout"), ("reading", 2, "SIGHUP"),
    ("sending", 1, "SIGINT"), ("sending", 1, "--worker_timeout"),
])
def test_loading_that_hangs_is_ended_by_a_signal_or_the_time(
    blip_folder, data, tmp_path, how, num_workers, end
):
    timeout_s = 2.0 if end == "--worker_timeout" else 300.0
    config = long_run(
        blip_folder, data, tmp_path / "run", num_workers=num_workers, worker_timeout=timeout_s,
        save_every="99", grad_accum_steps=1, cache="off",
    )

    def begin():
        (tmp_path / "has_begun").touch()
        if end != "--worker_timeout":
            threading.Timer(0.5, os.kill, (os.getpid(), getattr(signal, end))).start()

    def prepare():
        hang_in_loading(how, tmp_path / "has_begun")
        at_step(1, begin)

    begin_s = time.monotonic()
    ended = ended_run(config, prepare, tmp_path)
    assert "Traceback" not in ended.output, ended.output
    assert time.monotonic() - begin_s < 15
    if end == "--worker_timeout":
        assert ended.status == cli.STOPPED and "loaded for 2 s (--worker_timeout)" in ended.output
    else:
        assert ended.status == 128 + getattr(signal, end), ended.output
    assert newest_step(tmp_path / "run") >= 4
    assert not children_of(tmp_path)


def children_of(tmp_path: Path) -> list[str]:
    """Processes that the child with this log has left behind."""
    log = str(tmp_path / "log")
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.readlink(process / "fd" / "1") == log:
                found.append(process.name)
        except OSError:
            pass
    return found


# --- what else ends a run -------------------------------------------------------------------


def show_on(descriptor: int, *outputs: int) -> None:
    """Put a descriptor in the place of stdout (1) and stderr (2)."""
    for output in outputs:
        os.dup2(descriptor, output)
        setattr(sys, "stdout" if output == 1 else "stderr", open(output, "w", closefd=False))
    os.close(descriptor)


def test_a_reader_that_has_gone_ends_a_run_with_a_checkpoint(blip_folder, data, tmp_path):
    """As `| head` does."""
    config = long_run(blip_folder, data, tmp_path / "run", save_every="99")

    def prepare():
        read_end, write_end = os.pipe()
        show_on(write_end, 1)
        at_step(3, lambda: os.close(read_end))

    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == cli.PIPE_CLOSED and "Traceback" not in ended.output, ended.output
    assert "--resume to continue from there" in ended.output
    assert newest_step(tmp_path / "run") == 5  # whose validation was the next to be told


def test_a_terminal_that_closes_ends_a_run_with_a_checkpoint(blip_folder, data, tmp_path):
    config = long_run(blip_folder, data, tmp_path / "run", save_every="99")

    def prepare():
        os.setsid()
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSCTTY)
        show_on(slave, 1, 2)
        at_step(3, lambda: os.close(master))

    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == 129
    assert newest_step(tmp_path / "run") == 3
    assert "This run is not finished" in (tmp_path / "run" / "report.html").read_text()


def test_a_terminal_that_takes_nothing_more_ends_a_run_with_a_checkpoint(
    blip_folder, data, tmp_path
):
    """Without a signal, as where the run has a session of its own."""
    config = long_run(blip_folder, data, tmp_path / "run", save_every="99")

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        master, slave = os.openpty()
        show_on(slave, 1, 2)
        at_step(3, lambda: os.close(master))

    ended = ended_run(config, prepare, tmp_path)
    assert ended.status == 129
    assert newest_step(tmp_path / "run") >= 3


def test_descriptors_that_run_out_end_a_run_in_words_with_a_checkpoint(
    blip_folder, data, tmp_path
):
    config = long_run(
        blip_folder, data, tmp_path / "run", save_every="99", num_workers=2, cache="off",
        epochs=9, max_steps=99, grad_accum_steps=1,
    )

    def no_more():
        lowest = os.dup(1)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))

    ended = ended_run(config, lambda: at_step(3, no_more), tmp_path)
    assert ended.status == cli.STOPPED and "Traceback" not in ended.output, ended.output
    assert "too many open files: raise the limit (ulimit -n 4096)" in ended.output
    assert newest_step(tmp_path / "run") >= 3


@pytest.mark.parametrize("name, step, error", [
    ("accumulate", 3, RuntimeError("a bug")), ("accumulate", 3, OSError(errno.EIO, "a disk")),
    ("update", 0, RuntimeError("a bug")), ("meter", 0, OSError(errno.EIO, "a disk")),
])
def test_whatever_ends_the_steps_the_last_whole_one_is_saved(
    unbroken, blip_folder, data, tmp_path, monkeypatch, name, step, error
):
    """A step that fails half way is not whole: the adapter has changed, or the log lacks a line."""
    config = long_run(blip_folder, data, tmp_path / "run", save_every="99")
    real, calls = Trainer.update, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) < 4:
            return real(*args, **kwargs)
        raise error

    if name == "meter":
        monkeypatch.setattr(meter.Meter, "settle", fail)
        real = meter.Meter.read
        calls += [1, 1, 1]
    else:
        real = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, fail)
    with pytest.raises(TrainingStopped if isinstance(error, OSError) else RuntimeError) as caught:
        train(config)
    told = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert f"the checkpoint of step {step} is in" in "\n".join(told)
    assert newest_step(tmp_path / "run") == step
    assert (tmp_path / "run" / "adapter_last").exists() == (step > 0)
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
    train(go_on(config))
    assert_same_run(tmp_path / "run", unbroken)


# --- numbers --------------------------------------------------------------------------------


def test_the_images_of_steps_that_are_not_finite_are_named(
    blip_folder, data, tmp_path, monkeypatch
):
    real = Trainer.accumulate

    def poisoned(trainer, batches, step, **settings):
        loss = real(trainer, batches, step)
        return loss * float("nan") if step > 6 else loss

    monkeypatch.setattr(Trainer, "accumulate", poisoned)
    config = long_run(blip_folder, data, tmp_path / "run", log_every=1, save_every="1")
    with pytest.raises(TrainingStopped, match=r"step 9.*train_\d\d\.png") as caught:
        train(config)
    events = json_lines(tmp_path / "run" / "metrics.jsonl")
    skipped = [line for line in events if line["event"] == "skipped_step"]
    assert [line["step"] for line in skipped] == [7, 8, 9]
    assert all(len(line["images"]) in (4, 6) and not line["by_grad_scaler"] for line in skipped)
    assert skipped[2]["images"][0] in str(caught.value)
    last = read_adapter(tmp_path / "run" / "adapter_last").matrices
    before = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007").adapter.matrices
    assert all(torch.equal(last[name], before[name]) for name in last)  # 7 changed nothing


def test_what_a_stopped_interval_counted_goes_on(blip_folder, data, tmp_path, monkeypatch):
    """Two steps that are not finite before the stop, and one after it, are three in a row."""
    real = Trainer.accumulate

    def poisoned(trainer, batches, step, **settings):
        loss = real(trainer, batches, step)
        return loss * float("nan") if step in (6, 7, 8) else loss

    monkeypatch.setattr(Trainer, "accumulate", poisoned)
    config = long_run(blip_folder, data, tmp_path / "run", log_every=100)
    stopped_after(config, 7)
    with pytest.raises(TrainingStopped, match="3 steps in a row, up to step 8"):
        train(go_on(config))


# --- memory that runs out -------------------------------------------------------------------


def short_of_memory(monkeypatch, most_rows: int) -> list[int]:
    real, sizes = trainer.caption_loss, []

    def loss(model, input_ids, *args, **kwargs):
        if len(input_ids) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(input_ids))
        return real(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(trainer, "caption_loss", loss)
    return sizes


def test_memory_that_runs_out_halves_the_micro_batch_and_keeps_the_step(
    captioner_folder, data, tmp_path, monkeypatch, capsys
):
    plain = long_run(captioner_folder, data, tmp_path / "plain", lora_dropout=0.0, batch_size=8)
    train(plain)
    sizes = short_of_memory(monkeypatch, 3)
    capsys.readouterr()
    config = replace(plain, output_path=str(tmp_path / "run"))
    stopped_after(config, 5)
    said = capsys.readouterr().out
    assert said.count("out of GPU memory with 8 captions at a time: continuing with 4") == 1
    assert said.count("out of GPU memory with 4 captions at a time: continuing with 2") == 1
    sizes.clear()
    train(go_on(config))
    assert "out of GPU memory" not in capsys.readouterr().out  # it knows
    assert max(sizes) == 2
    for ours, theirs in zip(
        json_lines(tmp_path / "run" / "metrics.jsonl"),
        json_lines(tmp_path / "plain" / "metrics.jsonl"), strict=True,
    ):
        # GPT-2 has dropout of its own, which draws otherwise for other shapes.
        rel = 1e-5 if "blip" in captioner_folder.name else 0.01
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel)


def test_a_row_that_does_not_fit_stops_the_run_in_words(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    short_of_memory(monkeypatch, 0)
    config = long_run(blip_folder, data, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["program"])
    assert cli.run(lambda args: train(config) and 0) == cli.STOPPED
    assert "--gradient_checkpointing" in capsys.readouterr().err


def test_the_parts_of_a_batch_are_the_batch(blip_folder, data):
    from lora_engine.data.captions import collate_captions

    input_ids, targets = collate_captions(
        [torch.arange(n).numpy() for n in (3, 6, 4, 5, 2)], prompt_length=1, pad_id=0
    )
    flat = targets.flatten()
    positions = (flat != -100).nonzero().flatten()
    whole = batches.FeatureBatch(
        input_ids, positions, flat[positions], len(positions), [*range(5)], [*range(5)], [],
        torch.randn(5, 3, 4),
    )
    parts = split(whole, 2)
    assert [part.rows for part in parts] == [[0, 1], [2, 3], [4]]
    assert sum(part.num_targets for part in parts) == whole.num_targets
    assert len({len(part.target_ids) for part in parts}) == 1  # one CUDA graph for all
    for part in parts:
        spread = torch.full_like(part.input_ids, -100).flatten()
        is_target = part.target_ids != -100
        assert int(is_target.sum()) == part.num_targets
        spread[part.target_positions[is_target]] = part.target_ids[is_target]
        assert torch.equal(spread.view_as(part.input_ids), targets[part.rows])
        assert torch.equal(part.features, whole.features[part.rows])
    assert split(whole, 5) == [whole] and split(whole, None) == [whole]


# --- workers --------------------------------------------------------------------------------


def in_a_worker(monkeypatch, at_row: int, act) -> None:
    real = CaptionedImages.__getitem__
    main = os.getpid()

    def get(self, place):
        if self.substitute and place.row == at_row and os.getpid() != main:
            act()
        return real(self, place)

    monkeypatch.setattr(CaptionedImages, "__getitem__", get)
    monkeypatch.setattr(workers, "_POLL_S", 0.2)


@pytest.mark.parametrize("act, words", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "has died.*fewer --num_workers"),
    (lambda: time.sleep(1000), r"loaded for 1 s \(--worker_timeout\)"),
], ids=["dead", "hanging"])
def test_a_worker_that_dies_or_hangs_ends_the_run_with_a_checkpoint(
    unbroken, blip_folder, data, tmp_path, monkeypatch, act, words
):
    import multiprocessing

    row = int(list(batches.epoch_batches(
        _lengths(blip_folder, data), batch_size=3, seed=42, epoch=0
    ))[6][0])  # of the fourth step
    in_a_worker(monkeypatch, row, act)
    config = long_run(
        blip_folder, data, tmp_path / "run", num_workers=2, worker_timeout=1.0, save_every="99"
    )
    begin_s = time.monotonic()
    with pytest.raises(LoadingStopped, match=words):
        train(config)
    assert time.monotonic() - begin_s < 30
    assert not multiprocessing.active_children()
    newest = checkpoint_paths(tmp_path / "run" / "checkpoints")[-1]
    assert newest.name in ("step-00000000", "step-00000002")  # batches before it may be lost, too
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
    train(go_on(config, num_workers=0))
    assert_same_run(tmp_path / "run", unbroken)


def _lengths(model, data):
    from lora_engine.data.read_pairs import read_pairs
    from lora_engine.models.pretrained import load_captioner

    config = TrainingConfig(model=str(model))
    rows = read_pairs(data / "train.json")
    captioner = load_captioner(model)
    return captioned_images(rows, captioner, config, substitute=True).captions.lengths


# --- full disks -----------------------------------------------------------------------------


def test_a_line_that_the_disk_takes_half_of_is_not_there(tmp_path):
    """By the system itself: a limit on file sizes."""
    path = tmp_path / "metrics.jsonl"

    def write():
        with metrics_log_module.MetricsLogger(path, total_steps=9, stream=io.StringIO()) as log:
            log.record("train", step=1, loss=1.0)
            limit = path.stat().st_size + 20
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            try:
                log.record("train", step=2, loss=1.0)
            except OSError as error:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
                print(error)
                return 5

    ended = in_child(write, tmp_path / "log")
    assert ended.status == 5 and "metrics.jsonl" in ended.output
    assert json_lines(path) == [{"event": "train", "step": 1, "loss": 1.0}]


@pytest.mark.parametrize("owner, name", [
    (metrics_log_module, "append_line"), (validation_captions.ValidationCaptions, "write"),
    (validation_captions.ValidationCaptions, "write_best"),
], ids=["metrics", "samples", "captions"])
def test_a_full_disk_stops_the_run_and_what_was_there_is_whole(
    unbroken, blip_folder, data, tmp_path, monkeypatch, owner, name
):
    config = long_run(blip_folder, data, tmp_path / "run")
    real, calls = getattr(owner, name), []

    def full(*args, **more):
        calls.append(1)
        if len(calls) > (5 if name == "append_line" else 1):
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        return real(*args, **more)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(TrainingStopped, match="No space left .*somewhere.*--resume to continue"):
        train(config)
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "draw_loss_curve", lambda *paths: None)
    train(go_on(config))
    assert_same_run(tmp_path / "run", unbroken)


def test_a_checkpoint_that_finds_no_room_is_told_and_tried_again(
    unbroken, blip_folder, data, tmp_path, monkeypatch, capsys
):
    real, calls = checkpoint_writer.write_checkpoint, []

    def full(path, **more):
        calls.append(path.name)
        if len(calls) in (3, 4):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, **more)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", full)
    train(long_run(blip_folder, data, tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.count("warning: no checkpoint of step") == 2 and "No space left" in said
    assert_same_run(tmp_path / "run", unbroken)


def test_too_little_room_is_told_before_a_save_and_before_a_run(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("lora_engine.files.free_bytes", lambda folder: 10**6)
    config = long_run(blip_folder, data, tmp_path / "run")
    with pytest.raises(ValueError, match="no space for 4 checkpoints: 1 MB are free in"):
        train(config)
    with pytest.raises(ValueError, match="no space for 5 checkpoints"):
        train(replace(config, lr_schedule="wsd"))  # and the one before the decay
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(run_setup, "check_space_for_run", lambda *args: None)
    train(config)
    assert "no checkpoint of step 13: 1 MB are free in" in capsys.readouterr().err
    assert not checkpoint_paths(tmp_path / "run" / "checkpoints")


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    unbroken, blip_folder, data, tmp_path, monkeypatch, capsys
):
    config = long_run(blip_folder, data, tmp_path / "run")
    stopped_after(config, 3)
    before = (tmp_path / "run" / "report.html").read_bytes()

    def full(self, *args, **kwargs):
        if self.suffix == ".html":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, *args, **kwargs)

    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    train(go_on(config))
    # While the run goes on only the first failure is told, and it changes nothing.
    assert capsys.readouterr().err.count("warning: the report could not be written") == 2
    assert trajectory(tmp_path / "run") == trajectory(unbroken)
    assert (tmp_path / "run" / "report.html").read_bytes() == before


# --- skipped images -------------------------------------------------------------------------


def test_a_skipped_row_changes_neither_the_batch_size_nor_what_goes_on(
    blip_folder, data, tmp_path
):
    folder = tmp_path / "data"
    folder.mkdir()
    write_pictures(folder, num_images=22)
    write_pictures(folder, num_images=6, name="val.json")
    for number in (3, 11):
        (folder / "images" / f"train_{number:02d}.png").write_bytes(b"not a picture")
    changes = {"max_bad_share": 0.5, "log_every": 1}
    whole = long_run(blip_folder, folder, tmp_path / "whole", **changes)
    train(whole)
    config = long_run(blip_folder, folder, tmp_path / "run", **changes)
    stopped_after(config, 6)
    train(go_on(config))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    skipped = [json_lines(tmp_path / name / "skipped.jsonl") for name in ("run", "whole")]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 2


def test_signals_are_as_before_when_a_run_is_over(blip_folder, data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with redirect_stderr(io.StringIO()):
        stopped_after(long_run(blip_folder, data, tmp_path / "run"), 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_captioning_that_is_told_to_end_keeps_what_it_has_written(
    blip_folder, data, tmp_path
):
    from lora_engine import __main__ as verbs

    out = tmp_path / "captions.jsonl"

    def signalled():
        real, calls = captioner_module.caption_features, []

        def send(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        captioner_module.caption_features = send
        sys.argv = ["program", "caption", "--model", str(blip_folder), str(data / "images"),
                    "--out", str(out), "--batch_size", "2", "--num_workers", "1"]
        return cli.run(verbs.run_verb)

    ended = in_child(signalled, tmp_path / "log")
    assert ended.status == 128 + signal.SIGTERM, ended.output
    assert "Traceback" not in ended.output
    assert len(json_lines(out)) == 4
