"""Command lines: what they do; bad input gets a message and a status, and changes nothing."""

import dataclasses
import hashlib
import inspect
import json
import logging
import pwd
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from command_lines import plain
from huggingface_hub.errors import LocalEntryNotFoundError
from pictures import json_lines, read_annotations, write_pictures

import lora_engine
from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.commands.caption import CaptionConfig
from lora_engine.commands.doctor import DoctorConfig
from lora_engine.commands.evaluate import EvaluateConfig
from lora_engine.commands.merge import MergeConfig
from lora_engine.commands.report import ReportConfig
from lora_engine.commands.validate import ValidateConfig
from lora_engine.config import TrainingConfig
from lora_engine.lora.adapter import read_adapter
from lora_engine.ranks import OneProcess
from lora_engine.terminal import escaped
from lora_engine.training import loop as loop_module
from lora_engine.training import setup as run_setup
from lora_engine.training import validation_captions
from lora_engine.training.trainer import Trainer
from recipes import blip_cc3m, finetune, vit_gpt2_cc3m

PUBLISHED = {"blip": blip_cc3m, "vit_gpt2": vit_gpt2_cc3m}
RECIPES = {**PUBLISHED, "finetune": finetune}
TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host",
    "MASTER_PORT": "29500",
}


def flags(folder: Path | None, data: Path, **changes) -> list[str]:
    """A short run's command line."""
    values = {
        "model": folder, "train_data_path": data / "train.json", "val_data_path": data / "val.json",
        "output_path": "run", "epochs": 1, "batch_size": 4, "lr": 1e-3, "num_workers": 0,
        "device": "cpu", "num_samples": 1,
    } | changes
    given = [(name, value) for name, value in values.items() if value is not None]
    return [str(part) for name, value in given for part in (f"--{name}", value)]


# --- annotations ----------------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [
    (None, ["rows.json: no such file"]),
    ('[{"text": "a", "image": "b.png"},\n{"text": oops}]', ["rows.json:2: not JSON"]),
    ('{"text": "a", "image": "b.png"}', ["rows.json: ", "expected a JSON list"]),
    ('[\n{"text": "a"}]', ['rows.json:2: row 1: no "image"']),
    ('[\n{"image": "a.png"}]', ['rows.json:2: row 1: no "text"']),
    ("[]", ["rows.json: an empty list"]),
    ('[\n\n{"text": " ", "image": "a.png"}]', ['rows.json:3: row 1: the caption is empty']),
    ('[{"text": "a", "image": "absent.png"}]',
     ["rows.json: no image file for 1 of 1 row checked",
      "--max_bad_share 0.05", "absent.png"]),
])
@pytest.mark.parametrize("which", ["train_data_path", "val_data_path"])
def test_bad_annotations_are_named_by_file_and_line(
    refused, tmp_path, data, blip_folder, text, words, which
):
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    refused(
        blip_cc3m.main, *flags(blip_folder, data, **{which: path}),
        words=["error: ", tmp_path, *words],
    )


def test_one_image_cannot_be_split(refused, tmp_path, data, blip_folder):
    rows = json.loads((data / "train.json").read_text())[:1]
    rows[0]["image"] = str(data / rows[0]["image"])
    (tmp_path / "one.json").write_text(json.dumps(rows))
    refused(
        blip_cc3m.main,
        *flags(blip_folder, data, train_data_path=tmp_path / "one.json", val_data_path=None),
        words=["cannot hold out validation images", "--val_data_path"],
    )


def test_a_validation_file_alone_is_refused(refused, data):
    refused(
        blip_cc3m.main, "--val_data_path", data / "val.json",
        words=["--val_data_path needs a --train_data_path"],
    )


def test_a_run_with_too_many_bad_images_stops_with_its_own_status(
    command, tmp_path, blip_folder
):
    rows = read_annotations(write_pictures(tmp_path, num_images=12))
    write_pictures(tmp_path, num_images=4, name="val.json")
    for row in rows[:6]:
        Path(row.image).write_text("<html>404</html>")
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, tmp_path, batch_size=1))
    assert status == cli.STOPPED and err.startswith("stopped: ") and "so far are in run" in err
    assert "--max_bad_share 0.05" in err and "run/skipped.jsonl" in err
    assert "not an image in a known format" in err
    listed = json_lines(command.work / "run" / "skipped.jsonl")
    assert listed and {line["image"] for line in listed} <= {row.image for row in rows[:6]}


def test_a_run_that_diverges_keeps_the_best_adapter_and_names_it(command, data, blip_folder):
    status, out, err = command(
        blip_cc3m.main,
        *flags(blip_folder, data, lr="1e38", max_steps=9, epochs=9, save_every=1, log_every=1,
               eval_every=100),
    )
    assert status == cli.STOPPED and "was not finite in 3 steps in a row" in err
    assert "\nthe best adapter so far, of step 0 (before training), is in run/adapter\n" in err
    assert "learnt" not in err and "an adapter with NaN or infinite values is not saved" in err
    run = command.work / "run"
    saved = [run / "adapter", *(run / "checkpoints").glob("step-*"), *run.glob("adapter_last")]
    for folder in saved:
        for name, matrix in read_adapter(folder).matrices.items():
            assert matrix.isfinite().all(), (folder, name)


def test_a_short_run_that_diverges_mentions_no_adapter_that_does_not_exist(
    command, data, blip_folder
):
    status, out, _ = command(
        blip_cc3m.main, *flags(blip_folder, data, lr="1e300", max_steps=2, log_every=1)
    )
    assert status == 0 and "(at the end nan), so adapter/ holds the initial adapter. Try" in out
    assert not Path("run", "adapter_last").exists()


# --- several processes ----------------------------------------------------------------------


@pytest.mark.parametrize("environ, words", [
    ({"WORLD_SIZE": "4"}, ["WORLD_SIZE is '4', but RANK, LOCAL_RANK,", "--nproc_per_node 4"]),
    ({"WORLD_SIZE": "many"}, ["WORLD_SIZE is 'many'"]),
    ({"WORLD_SIZE": "0", "RANK": "0"}, ["WORLD_SIZE is '0'"]),
    ({"WORLD_SIZE": "2", **TORCHRUN, "LOCAL_RANK": "x"}, ["LOCAL_RANK is 'x'; expected a number"]),
    ({"WORLD_SIZE": "2", **TORCHRUN, "RANK": "2"}, ["RANK 2 of WORLD_SIZE 2", "not possible"]),
    ({"WORLD_SIZE": "2", **TORCHRUN}, ["MASTER_ADDR 'no.such.host' cannot be resolved"]),
])
def test_a_launch_that_cannot_be_joined_is_refused(
    refused, data, blip_folder, monkeypatch, environ, words
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    refused(blip_cc3m.main, *flags(blip_folder, data), words=words)
    refused(vit_gpt2_cc3m.main, words=words)  # the demo draws no scenes


@pytest.mark.parametrize("size", ["1", ""])
def test_a_single_process_trains_whatever_started_it(command, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert printed_config(command, blip_cc3m.main)["epochs"] == blip_cc3m.DEMO.epochs


@pytest.mark.parametrize("folder", [None, "runs/mine"])
def test_after_a_restart_a_run_resumes_if_it_had_a_folder(command, data, monkeypatch, folder):
    configs: list[TrainingConfig] = []
    monkeypatch.setattr(loop_module, "train", lambda config, **_: configs.append(config))
    monkeypatch.setattr(OneProcess, "remembered", lambda self: folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = ["--train_data_path", str(data / "train.json")]
    assert command(blip_cc3m.main, *args)[0] == 0
    (config,) = configs
    assert (config.output_path, config.resume) == (folder, folder and "newest")


# --- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize("args, words", [
    (["--batch_sise", "3"], ["there is no flag --batch_sise; did you mean --batch_size?"]),
    (["--batch-sise=3"], ["there is no flag --batch-sise; did you mean --batch_size?"]),
    (["--learning_rate", "1"], ["there is no flag --learning_rate; it is --lr here"]),
    (["--no_lr"], ["there is no flag --no_lr"]),
    (["--xyzzy"], ["there is no flag --xyzzy; --help lists all flags"]),
    (["-b", "3"], ["-b"]),
    (["train.json"], ["train.json"]),
    (["--batch_size", "many"], ["--batch_size", "'many'"]),
    (["--lr", "1e-5x"], ["--lr", "'1e-5x'"]),
    (["--lr"], ["error: --lr needs a value"]),
    (["--precision", "fp8"], ["--precision", "'fp8'", "'bf16'"]),
    (["--epochs", "1.5"], ["--epochs is 1.5", "--max_steps"]),
])
def test_a_flag_that_cannot_be_understood_is_named(refused, args, words):
    refused(blip_cc3m.main, *args, words=words)


@pytest.mark.parametrize("name, value", [
    ("batch_size", 0), ("batch_size", -4), ("epochs", 0), ("grad_accum_steps", 0),
    ("max_steps", 0), ("eval_every", 0), ("log_every", 0), ("lora_rank", 0),
    ("max_caption_tokens", 0), ("seed", -1), ("seed", 2**64), ("warmup_steps", -1),
    ("num_workers", -1), ("num_samples", -1), ("weight_decay", -0.1), ("max_grad_norm", -1),
    ("max_grad_norm", "nan"), ("lr", -1e-5), ("lr", 0), ("lr", "nan"), ("lr", "inf"),
    ("lora_alpha", 0), ("lora_dropout", 1), ("lora_dropout", -0.1), ("label_smoothing", 1),
    ("label_smoothing", "nan"), ("val_fraction", 0), ("val_fraction", 1), ("max_bad_share", 1.5),
    ("max_bad_share", "nan"),
])
def test_a_value_out_of_range_is_named_with_its_range(refused, data, blip_folder, name, value):
    arguments = flags(blip_folder, data, **{name: value})
    refused(blip_cc3m.main, *arguments, words=[f"error: --{name} is {value}", "must be"])


@pytest.mark.parametrize("changes, words", [
    ({"lora_targets": "qeury"}, ["LoRA target 'qeury' matches no linear layer", "query"]),
    ({"lora_targets": "re:encoder.*("}, ["'re:encoder.*('", "not a regular expression"]),
    ({"device": "gpu"}, ["--device gpu is cuda here; this machine has cpu"]),
    ({"device": "mps"}, ["--device mps (Apple's GPU) is not supported; this machine has cpu"]),
    ({"device": "cuda:99"}, ["--device cuda:99"]),
    ({"max_caption_tokens": 5000}, ["--max_caption_tokens", "5000"]),
    ({"init_adapter": "absent"}, ["no adapter at absent"]),
    ({"model": "./absent"}, ["no model folder at './absent'", "--model"]),
])
def test_a_setting_that_does_not_fit_is_refused(refused, data, blip_folder, changes, words):
    refused(blip_cc3m.main, *flags(blip_folder, data, **changes), words=["error: ", *words])


def test_a_captioner_of_the_other_family_is_refused(refused, data, blip_folder, vit_gpt2_folder):
    refused(
        blip_cc3m.main, *flags(vit_gpt2_folder, data),
        words=["'vision-encoder-decoder'", "expected 'blip'", "BlipForConditionalGeneration"],
    )
    refused(
        vit_gpt2_cc3m.main, *flags(blip_folder, data),
        words=["'blip'", "expected 'vision-encoder-decoder'", "VisionEncoderDecoderModel"],
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_hub_name_without_network_explains_the_use_of_a_folder(
    refused, data, monkeypatch, recipe
):
    def raise_error(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the files on the Hub, and no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_error)
    name = recipe.SETTINGS.model
    refused(
        recipe.main, *flags(None, data),
        words=[f"no folder '{name}' here", "cannot be fetched", "no network",
               f"hf download {name}", "--model"],
    )


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    refused, command, data, blip_folder, monkeypatch
):
    (command.work / "run" / "adapter").mkdir(parents=True)
    (command.work / "run" / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(run_setup, "load_captioner", None)
    refused(
        blip_cc3m.main, *flags(blip_folder, data),
        words=["--output_path run already holds a run", "--init_adapter"],
        allowed=["adapter", "metrics.jsonl", "run"],
    )
    refused(  # the demo looks before it draws its scenes
        blip_cc3m.main, "--output_path", "run",
        words=["--output_path run already holds a run"],
        allowed=["adapter", "metrics.jsonl", "run"],
    )


def test_nothing_is_left_where_the_first_validation_fails(command, tmp_path, blip_folder):
    write_pictures(tmp_path, num_images=12)
    rows = read_annotations(write_pictures(tmp_path, num_images=4, name="val.json"))
    for row in rows:
        Path(row.image).write_bytes(b"")
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, tmp_path))
    assert status == cli.USAGE_ERROR
    assert "error: no validation image can be read (4 failed, first " in err
    assert f"{rows[0].image}: the file is empty" in err
    assert list(command.work.iterdir()) == []


# --- what the flags do ----------------------------------------------------------------------


def printed_config(command, main, *args) -> dict:
    status, out, err = command(main, "--print_config", *args)
    assert status == 0 and err == ""
    assert list(command.work.iterdir()) == []
    return json.loads(out)


@pytest.mark.parametrize("recipe, model, batch_size", [
    (blip_cc3m, "Salesforce/blip-image-captioning-base", 32),
    (vit_gpt2_cc3m, "nlpconnect/vit-gpt2-image-captioning", 16),
])
def test_the_defaults_are_those_of_the_published_runs(command, data, recipe, model, batch_size):
    path = str(data / "train.json")
    config = printed_config(command, recipe.main, "--train_data_path", path)
    assert config == {
        "model": model, "train_data_path": path, "batch_size": batch_size,
        "epochs": 100, "lr": 1e-5, "seed": 42, "max_steps": None, "grad_accum_steps": 1,
        "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1,
        "lora_targets": ["attention", "feed_forward"], "init_adapter": None,
        "lora_layers": [], "rank_pattern": [], "alpha_pattern": [], "use_rslora": False,
        "use_dora": False, "use_lorafa": False, "init_lora_weights": "default",
        "loraplus_lr_ratio": None,
        "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_schedule": "linear",
        "warmup_steps": 0, "warmup_ratio": None, "decay_ratio": None, "min_lr": 0.0,
        "ema_decay": None, "max_grad_norm": 1.0, "label_smoothing": 0.0,
        "prompt": "", "max_caption_tokens": 64, "precision": "auto",
        "encoder_precision": "auto", "compile": False,
        "cuda_graphs": True, "gradient_checkpointing": False, "device": None, "num_workers": None,
        "num_threads": None, "cache": "auto", "cache_dir": None, "cache_dtype": None,
        "cache_limit_gb": 50.0, "val_fraction": None, "val_size": None, "data_format": "auto",
        "image_field": None, "caption_field": None, "image_root": None, "split": None,
        "read_order": "auto", "micro_batches": None, "eval_every": None, "log_every": 10,
        "num_samples": 8, "eval_captions": 200, "best_by": "loss", "patience": None,
        "save_every": "10min", "keep_last": 2, "max_bad_share": 0.05, "worker_timeout": 300.0,
        "track": "none", "revision": None, "val_data_path": None, "output_path": None,
        "push_to_hub": None, "license": None,
    }


def test_the_recipe_to_copy_has_settings_for_lora(command, data):
    config = printed_config(command, finetune.main, "--train_data_path", data / "train.json")
    assert (config["lr"], config["epochs"], config["warmup_steps"]) == (2e-4, 5, 20)
    assert (config["best_by"], config["patience"]) == ("cider_d", 3)
    flags = "--train_data_path", data / "train.json", "--warmup_ratio", "0.1"
    config = printed_config(command, finetune.main, *flags)
    assert (config["warmup_steps"], config["warmup_ratio"]) == (0, 0.1)  # not both


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_without_data_the_demo_runs_and_flags_change_its_settings(command, recipe):
    config = printed_config(command, recipe.main, "--epochs", "3")
    assert config["model"] == recipe.DEMO.model != recipe.SETTINGS.model
    assert Path(config["model"], "model.safetensors").is_file()
    assert (config["epochs"], config["lr"]) == (3, recipe.DEMO.lr)


def test_underscores_and_hyphens_are_one_flag(command):
    values = {"train_data_path": "t.json", "batch_size": "7", "lora_targets": "query",
              "max_grad_norm": "0.5", "eval_every": "3"}
    configs = [
        printed_config(command, blip_cc3m.main, *(
            part for name, value in values.items()
            for part in spell(f"--{name}", value)
        )) for spell in (
            lambda name, value: (name, value),
            lambda name, value: ("--" + name[2:].replace("_", "-"), value),
            lambda name, value: (f"{name}={value}",),
            lambda name, value: ("--" + name[2:].replace("_", "-") + f"={value}",),
        )
    ]
    assert all(config == configs[0] for config in configs)
    assert (configs[0]["batch_size"], configs[0]["lora_targets"]) == (7, ["query"])


def test_the_license_flag_has_an_older_spelling(command):
    for flag in (["--license", "mit"], ["--licence", "mit"], ["--licence=mit"]):
        assert printed_config(command, blip_cc3m.main, *flag)["license"] == "mit"


@pytest.mark.parametrize("name", ["compile", "gradient_checkpointing"])
def test_switches_have_a_yes_and_a_no(command, name):
    for flag, expected in ((f"--{name}", True), (f"--no_{name}", False),
                           (f"--no-{name.replace('_', '-')}", False)):
        assert printed_config(command, blip_cc3m.main, flag)[name] is expected


def test_several_targets_follow_one_flag(command):
    config = printed_config(
        command, blip_cc3m.main, "--lora_targets", "query", "re:.*value", "--lora_rank", "4"
    )
    assert (config["lora_targets"], config["lora_rank"]) == (["query", "re:.*value"], 4)


def docstrings(config: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those that it extends, by field."""
    found: dict[str, str] = {}
    for part in config.__mro__[:-1]:
        body = inspect.getsource(part)
        fields = re.findall(r'^    (\w+):[^\n]*\n    """(.*?)"""', body, re.DOTALL | re.MULTILINE)
        found |= {field: plain(text) for field, text in fields}
    return found


@pytest.mark.parametrize("main, args, config", [
    (blip_cc3m.main, ["--help"], TrainingConfig),
    (vit_gpt2_cc3m.main, ["-h"], TrainingConfig),
    (finetune.main, ["--help"], TrainingConfig),
    (verbs.run_verb, ["caption", "--help"], CaptionConfig),
    (verbs.run_verb, ["evaluate", "--help"], EvaluateConfig),
    (verbs.run_verb, ["merge", "--help"], MergeConfig),
    (verbs.run_verb, ["report", "--help"], ReportConfig),
    (verbs.run_verb, ["validate", "--help"], ValidateConfig),
    (verbs.run_verb, ["doctor", "--help"], DoctorConfig),
])
def test_help_explains_every_flag(command, main, args, config):
    status, out, err = command(main, *args)
    assert status == 0 and err == ""
    text = plain(out)
    meanings = docstrings(config)
    assert meanings.keys() == {field.name for field in dataclasses.fields(config)}
    for name, meaning in meanings.items():
        assert meaning in text and (name in ("images", "runs") or f"--{name}" in text), name
    if config is TrainingConfig:
        assert "--no_compile" in text and "run the embedded demo" in text


# --- whole commands -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, family", [
    *((recipe, family) for family, recipe in PUBLISHED.items()),
    (finetune, "blip"), (finetune, "vit_gpt2"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_recipe_trains_and_the_printed_command_captions(
    command, request, data, monkeypatch, recipe, family
):
    monkeypatch.setattr(validation_captions, "MAX_NEW_TOKENS", 30)  # as `caption` does
    model = request.getfixturevalue(f"{family}_folder")
    status, out, err = command(recipe.main, *flags(model, data, lr=1e-2, warmup_steps=0))
    assert (status, err) == (0, "")
    assert "adapter     run/adapter\n" in out
    adapter = Path("run") / "adapter"
    printed, *others = (shlex.split(line)[2:] for line in out.strip().splitlines()[-3:])
    assert Path(printed[0]) == Path(sys.executable)
    assert printed[1:6] == ["-m", "lora_engine", "caption", "--adapter", str(adapter)]
    assert [words[3:] for words in others] == [
        ["evaluate", "--adapter", str(adapter), "--data", str(data / "val.json")],
        ["merge", "--adapter", str(adapter), "--out", "run-merged"],
    ]
    best_step = int(read_adapter(adapter).provenance["step"])
    samples = json_lines(Path("run") / "samples.jsonl")
    sample = [line for line in samples if line["step"] == best_step][-1]
    assert printed[6] == sample["image"]
    status, out, err = command(verbs.run_verb, *printed[3:])
    assert (status, err) == (0, "")
    assert out == f"{sample['image']}\t{escaped(' '.join(sample['caption'].split()))}\n"


def test_a_run_of_a_version_that_spelled_licence_is_resumed(command, data, blip_folder):
    given = flags(blip_folder, data, save_every=1)
    assert command(blip_cc3m.main, *given, "--license", "mit")[0] == 0
    config_path = Path("run", "config.json")
    checkpoint = Path("run", "checkpoints", "step-00000003")
    state_path, manifest_path = checkpoint / "state.json", checkpoint / "manifest.json"
    for path in (config_path, state_path):
        path.write_text(path.read_text().replace('"license"', '"licence"'))
    state = state_path.read_bytes()
    manifest = json.loads(manifest_path.read_text())
    manifest["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    status, out, err = command(
        blip_cc3m.main, "--output_path", "run", "--resume", "--model", blip_folder, "--epochs", "2"
    )
    assert status == 0 and "after step 3 of 6" in out
    assert err == (
        "warning: ignored in run/config.json; to use them, add to this command line: "
        "--num_workers 0\n"
    )
    config = json.loads(config_path.read_text())
    assert config["license"] == "mit" and "licence" not in config
    assert "license: \"mit\"" in Path("run", "adapter", "README.md").read_text()


@pytest.fixture
def no_home(monkeypatch):
    """As in a container with an unknown user id: no HOME, no entry in /etc/passwd."""
    def getpwuid(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def test_a_user_without_a_home_folder_trains_and_captions(command, data, blip_folder, no_home):
    status, out, err = command(blip_cc3m.main, *flags(blip_folder, data))
    assert (status, err) == (0, "")
    assert "kept 16 in memory; not on disk: this user has no home folder; give --cache_dir" in out
    assert [path.name for path in command.work.iterdir()] == ["run"]  # and no folder "~"
    status, out, err = command(
        verbs.run_verb, "caption", "--adapter", "run/adapter", data / "images"
    )
    assert (status, err) == (0, "") and len(out.splitlines()) == 16
    status, out, _ = command(verbs.run_verb, "doctor", "--offline", "--no_speed")
    assert status == 0 and "note    features    kept in memory only: this user has no home" in out


def test_a_user_without_a_home_folder_can_keep_features_in_a_cache_dir(
    command, refused, data, blip_folder, no_home
):
    refused(blip_cc3m.main, *flags(blip_folder, data, cache="disk"),
            words=["--cache disk: this user has no home folder; give --cache_dir"])
    status, out, _ = command(
        blip_cc3m.main, *flags(blip_folder, data, cache="disk", cache_dir="kept")
    )
    assert status == 0 and "kept on disk in kept" in out and any(Path("kept").iterdir())


def test_a_user_without_a_home_folder_learns_how_to_use_a_model_of_the_hub(
    refused, data, no_home, monkeypatch
):
    def snapshot_download(*args, **settings):
        Path("~/.cache").expanduser()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused(blip_cc3m.main, *flags("owner/name", data),
            words=["cannot be fetched", "Could not determine home directory", "pass --model"])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_demo_trains_on_drawn_scenes_like_any_other_data(
    command, data, monkeypatch, caplog, recipe
):
    caplog.set_level(logging.INFO)
    calls = []
    monkeypatch.setattr(loop_module, "train", lambda config, **more: calls.append((config, more)))
    monkeypatch.setattr(
        "lora_engine.demo.scenes.write_scenes",
        lambda folder, **more: (data / "train.json", data / "val.json"),
    )
    status, out, _ = command(recipe.main, "--epochs", "2")
    assert status == 0
    (config, _), = calls
    assert config == dataclasses.replace(
        recipe.DEMO, epochs=2, train_data_path=str(data / "train.json"),
        val_data_path=str(data / "val.json"),
    )
    said = out + caplog.text
    assert f"--epochs 2 --batch_size {recipe.DEMO.batch_size}" in said
    assert f"--lr {recipe.DEMO.lr:g}" in said


@pytest.mark.parametrize("module", [recipe.__name__ for recipe in RECIPES.values()])
def test_recipes_run_as_modules(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["program", "--batch_sise", "3"])
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("error: there is no flag --batch_sise")


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "captoin"])
    monkeypatch.delitem(sys.modules, "lora_engine.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lora_engine", run_name="__main__")
    assert stop.value.code == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("error: there is no verb 'captoin'; did you mean")


def test_an_interruption_prints_no_traceback(command, data, blip_folder, monkeypatch):
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Trainer.accumulate.real(*args, **kwargs)

    interrupt.real = Trainer.accumulate
    monkeypatch.setattr(Trainer, "accumulate", interrupt)
    status, _, err = command(blip_cc3m.main, *flags(blip_folder, data))
    assert status == 130 and err == "interrupted\nthe results of the run so far are in run\n"
    assert (Path("run") / "adapter").is_dir() and (Path("run") / "adapter_last").is_dir()


def test_memory_that_runs_out_on_a_cpu_prints_no_traceback(capsys):
    with cli.reported_errors() as status:
        torch.empty(2**50)
    err = capsys.readouterr().err
    assert status.code == cli.STOPPED and err.startswith("stopped: ") and "--batch_size" in err


def test_a_closed_output_is_no_error():
    """As with `| head`."""
    program = "from lora_engine import cli; cli.run(lambda args: print('x' * 10**6) or 0)"
    code = f"import sys; {program.replace('cli.run', 'sys.exit(cli.run')})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.PIPE_CLOSED


# --- from Python ----------------------------------------------------------------------------


def test_every_public_name_is_importable_and_no_other():
    assert {"inject", "merge", "save_adapter", "load_adapter", "load_captioner", "train",
            "generate"} <= set(lora_engine.__all__)
    for name in set(lora_engine.__all__) - {"__version__"}:
        assert callable(getattr(lora_engine, name))
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        lora_engine.tarin
