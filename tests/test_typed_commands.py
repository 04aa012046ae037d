"""Command lines that users of other tools type: each works, or says in one line what to type."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from adapters import adapter_folder
from command_lines import plain
from pictures import read_annotations

from lora_engine import __main__ as verbs
from lora_engine import cli, other_names
from lora_engine.commands.caption import CaptionConfig
from lora_engine.commands.evaluate import EvaluateConfig
from lora_engine.config import TrainingConfig, changes_on_resume
from lora_engine.lora.adapter_folder import AdapterError, find_adapter
from lora_engine.version import __version__

# What was typed behind lora-engine, and words of the answer.
TYPED = [
    ("--version", f"lora_engine {__version__}"),
    ("version", f"lora_engine {__version__}"),
    ("help", "VERB --help"),
    ("finetune --train_data_path t.json", "there is no verb 'finetune'; it is train here"),
    ("fit", "it is train here"),
    ("generate photo.jpg", "it is caption here"),
    ("predict --image photo.jpg", "it is caption here"),
    ("eval", "it is evaluate here"),
    ("export", "it is merge here"),
    ("compare runs/a runs/b", "it is report here"),
    ("soup runs/a runs/b", "it is blend here"),
    ("blend runs/a:0.7 runs/b --out c", "runs/b has no weight; give all adapters one, or none"),
    ("blend runs/a:0.7 --output_dir c", "it is --out here"),
    ("blend --out c", "no adapters to blend: give one or more, such as runs/a:0.7 runs/b:0.3"),
    ("blend a:x b:1 --out c", "the weight 'x' in 'a:x' is not a number; expected NAME:WEIGHT"),
    ("blend a: b: --out c", "the weight '' in 'a:' is not a number"),
    ("blend C:/no/such:1 --out c", "no adapter at C:/no/such: expected a run folder"),
    ("tran", "did you mean train?"),
    ("--learning_rate 1e-4", "a verb, such as train, comes first"),
    ("train --learning_rate 1e-4", "there is no flag --learning_rate; it is --lr here"),
    ("train --num_train_epochs 3", "it is --epochs here"),
    ("train --per-device-train-batch-size 8", "it is --batch_size here"),
    ("train --per_device_eval_batch_size=8", "it is --batch_size here"),
    ("train --output_dir out", "it is --output_path here"),
    ("train --lora_r 16", "it is --lora_rank here"),
    ("train --target_modules q_proj", "it is --lora_targets here"),
    ("train --gradient_accumulation_steps 4", "it is --grad_accum_steps here"),
    ("train --lr_scheduler_type cosine", "it is --lr_schedule here"),
    ("train --model_name_or_path m", "it is --model here"),
    ("train --train_file t.json", "it is --train_data_path here"),
    ("train --validation_file v.json", "it is --val_data_path here"),
    ("train --dataset_name coco", "it is --train_data_path here"),
    ("train --max_train_steps 5", "it is --max_steps here"),
    ("train --bf16 True", "it is --precision bf16 here"),
    ("train --gradient_checkpointing True", "takes no value: give --gradient_checkpointing or --n"),
    ("train -learning_rate 1e-4", "it is --lr here"),
    ("train -lr 1e-4", "-lr needs two hyphens: --lr"),
    ("train --fp16", "it is --precision fp16 here"),
    ("train --save_steps 500", "it is --save_every here"),
    ("train --report_to wandb", "it is --track here"),
    ("train --resume_from_checkpoint c", "it is --resume here"),
    ("train --beta2 0.99", "it is --adam_beta2 here"),
    ("train --max_seq_length 64", "it is --max_caption_tokens here"),
    ("train --overwrite_output_dir", "a run never overwrites another"),
    ("train --local-rank=0", "torchrun"),
    ("train --deepspeed ds.json", "torchrun"),
    ("train --load_in_4bit", "--encoder_precision int8"),
    ("train --epochs 0.5", "--max_steps ends a run within an epoch"),
    ("train --epochs=.5", "--epochs is .5"),
    ("train", "no data to train on: give it with --train_data_path"),
    ("train --lr 1e-3", "-m lora_engine demo"),
    ("train train.json", "unrecognized arguments train.json: values follow their flags; see"),
    ("train --lr abc", "--lr is 'abc'; it must be a number; see "),
    ("train --lr 1e-4x", "-m lora_engine train --help"),
    ("train --max_steps all", "--max_steps is 'all'; it must be a whole number; see"),
    ("train --lora_layers x", "--lora_layers is 'x'; it must be whole numbers, separated"),
    ("train --lora_layers 1-2", "it must be whole numbers, separated by spaces, such as 4 8"),
    ("tune --ranks 2.5", "--ranks is '2.5'; it must be whole numbers"),
    ("tune --lrs x", "--lrs is 'x'; it must be numbers, separated by spaces, such as 1e-4 2e-4"),
    ("tune --minutes -1", "--minutes is -1.0; it must be above 0"),
    ("train --use_pissa", "it is --init_lora_weights pissa here"),
    ("train --use_eva", "it is --init_lora_weights eva here"),
    ("train --num_decay_steps 5", "it is --decay_ratio here"),
    ("train --peft_config c.json", "is given by itself, such as --lora_rank and --use_dora"),
    ("train --train_data_path t.json --ema_decay 0", "--ema_decay is 0.0; it must be above 0 and"),
    (
        "train --train_data_path t.json --use_lorafa --loraplus_lr_ratio 8",
        "--use_lorafa trains B alone, at --lr: give one of them",
    ),
    ("train --precision fp8", "--precision is 'fp8'; it must be one of 'auto', 'fp32', 'bf16', "),
    ("train --lr --epochs 3", "--lr needs a value"),
    ("train --lr 1e-4 --lr=1e-5", "--lr is given twice; give it once"),
    ("train --rank_pattern key=2 key=3", "--rank_pattern has key twice; give it once"),
    ("train --lora_layers 1 1", "--lora_layers has 1 twice; give it once"),
    ("train --train-data-path a.tar --train_data_path b.tar", "give all its values behind one"),
    ("train --train_data_path https://example.org/t.json", "t.json is a web address: download"),
    ("train --val_data_path v.json", "--val_data_path needs a --train_data_path"),
    ("demo --train_data_path t.json", "use the verb train"),
    ("demo llava", "there is no demo 'llava'; known: blip, vit_gpt2"),
    ("caption --image x.jpg", "given without a flag: caption photo.jpg"),
    ("caption --images x.jpg", "there is no flag --images; give its values without one"),
    ("caption x.jpg --output captions.json", "it is --out here"),
    ("caption x.jpg --lora runs/mine", "it is --adapter here"),
    ("caption x.jpg --checkpoint runs/mine", "it is --adapter here"),
    ("caption x.jpg --beam-size 3", "it is --num_beams here"),
    ("caption x.jpg --max_length 20", "it is --max_new_tokens here"),
    ("caption https://example.org/x.jpg --model m", "download the file first"),
    ("caption x.jpg --model m --device mps", "--device mps (Apple's GPU) is not supported"),
    ("evaluate --references r.json", "it is --data here"),
    ("evaluate --val_data_path v.json", "it is --data here"),
    ("evaluate runs/mine v.json", "evaluate needs --data; see"),
    ("merge runs/mine merged", "merge needs --adapter and --out; see "),
    ("merge --adapter no_such --output_dir merged", "it is --out here"),
    ("merge --adapter no_such --out merged", "no adapter at no_such: expected a run folder"),
]


@pytest.mark.parametrize("typed, answer", TYPED, ids=[typed for typed, _ in TYPED])
def test_what_users_of_other_tools_type_is_answered(command, typed, answer):
    status, out, err = command(verbs.run_verb, *typed.split())
    is_asked_for = typed in ("--version", "version", "help")
    assert status == (0 if is_asked_for else cli.USAGE_ERROR)
    told = out if is_asked_for else err
    assert answer in plain(told) and (is_asked_for or len(told.splitlines()) == 1)
    assert not list(command.work.iterdir())


@pytest.mark.parametrize("typed", [
    "train --num-beams 3", "train --help", "demo vit-gpt2 --print_config", "demo --print_config",
    "train --print-config --learning-rate 1", "train --print_config",
])
def test_verbs_that_are_recipes(command, typed):
    status, out, err = command(verbs.run_verb, *typed.split())
    if "--help" in typed:
        assert status == 0 and "usage: python -m lora_engine train " in plain(out)
    elif typed.startswith("demo"):
        family = "vit_gpt2" if "vit-gpt2" in typed else "blip"
        assert status == 0 and f'/demo/{family}"' in out and '"lr": 0.005' in out
    elif typed == "train --print_config":  # not the demo's settings
        assert status == 0 and '"lr": 0.0002' in out
    else:
        assert status == cli.USAGE_ERROR and "there is no flag" in err


def test_our_flags_are_never_taken_for_those_of_others():
    kinds = TrainingConfig, CaptionConfig, EvaluateConfig
    ours = {name for kind in kinds for name in kind.__dataclass_fields__}
    targets = {line.split()[0].removeprefix("--") for line in other_names.FLAGS}
    assert targets <= ours
    assert set(other_names.VERBS) == set(verbs.VERBS)
    others = " ".join(other_names.VERBS.values()).split()
    assert not set(verbs.VERBS) & set(others)


def test_a_file_in_place_of_a_verb_is_a_hint_to_caption_it(command):
    Path("my photo.jpg").touch()
    status, _, err = command(verbs.run_verb, "my photo.jpg")
    assert status == cli.USAGE_ERROR and "caption --adapter RUN 'my photo.jpg'" in err


# --- adapters by run folder and by Hub name -------------------------------------------------------


@pytest.fixture(scope="module")
def hub(blip_folder, tmp_path_factory):
    """A Hub's cache with the adapter owner/adapter and its base owner/captioner."""
    cache = tmp_path_factory.mktemp("hub")
    for name, commit in (("captioner", "1" * 40), ("adapter", "2" * 40)):
        repository = cache / f"models--owner--{name}"
        snapshot = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        if name == "captioner":
            shutil.copytree(blip_folder, snapshot)
        else:
            base = cache / "models--owner--captioner" / "snapshots" / ("1" * 40)
            adapter_folder(base, snapshot)
            config = snapshot / "adapter_config.json"
            config.write_text(config.read_text().replace(str(base), "owner/captioner"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield cache


def test_an_adapter_and_its_base_come_from_the_hubs_cache(command, hub, data):
    image = read_annotations(data / "train.json")[0].image
    status, out, err = command(verbs.run_verb, "caption", "--adapter", "owner/adapter", image)
    assert (status, err) == (0, "") and out.startswith(f"{image}\t")


def test_a_run_folder_stands_for_its_adapter(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    shutil.copytree(find_adapter("owner/adapter"), run / "adapter")
    assert find_adapter("runs/mine") == Path("runs/mine/adapter")
    assert find_adapter(run / "adapter") == run / "adapter"
    for name, words in {
        "runs/mime": "no adapter at runs/mime",  # not asked for on the Hub
        "mine": "there is runs/mine",
        "owner/absent": "there is no folder 'owner/absent' here",
        "owner/captioner": "has no adapter_config.json; if it is a whole model",
        5000 * "x": "not a valid folder name",
    }.items():
        with pytest.raises(AdapterError, match=words):
            find_adapter(name)
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "metrics.jsonl").touch()
    with pytest.raises(AdapterError, match="no adapter yet"):
        find_adapter(run)
    with pytest.raises(AdapterError, match="give it with --model"):
        find_adapter(hub / "models--owner--captioner" / "snapshots" / ("1" * 40))


def test_a_run_folder_given_as_the_model_is_a_hint_to_give_it_as_the_adapter(refused, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "x.png").touch()
    refused(
        verbs.run_verb, "caption", "--model", tmp_path, tmp_path / "x.png",
        words=[f"{tmp_path} is the folder of a run; give it as the adapter (--adapter)"],
    )


def test_an_adapter_that_is_too_large_is_not_downloaded(monkeypatch):
    class Api:
        def model_info(self, name, files_metadata):
            return type("Info", (), {"siblings": [
                type("File", (), {"rfilename": "adapter_model.safetensors", "size": 2**40})
            ]})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail())
    with pytest.raises(AdapterError, match="has 1,099,511,627,776 bytes; this engine reads no"):
        find_adapter("owner/huge")


@pytest.mark.parametrize("stored, fetched", [
    (["adapter_model.bin"], True), (["adapter_model.bin", "adapter_model.safetensors"], False),
])
def test_an_older_weights_file_is_downloaded_only_if_there_is_no_other(
    monkeypatch, tmp_path, stored, fetched
):
    class Api:
        def model_info(self, name, files_metadata):
            return type("Info", (), {"siblings": [
                type("File", (), {"rfilename": file, "size": 1}) for file in stored
            ]})

    def fetch(name, *, allow_patterns):
        assert ("adapter_model.bin" in allow_patterns) == fetched
        return tmp_path

    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_adapter("owner/name") == tmp_path


# --- what a run and a command tell ----------------------------------------------------------------


def test_the_commands_that_are_named_are_those_of_this_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, python = tmp_path / "bin" / "lora-engine", tmp_path / "my env" / "python"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["/lib/lora_engine/__main__.py"])
    assert cli.this_program() == "'my env/python' -m lora_engine"
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert cli.this_program() == "bin/lora-engine"
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert cli.this_program() == "lora-engine"


def test_a_resumed_run_with_another_rate_is_pointed_to_a_new_run_from_its_adapter():
    before = TrainingConfig(model="m", output_path="runs/a", lr=1e-4)
    words = "another --lr 0.001 .* another --output_path, --init_adapter runs/a and no --resume"
    with pytest.raises(ValueError, match=words):
        changes_on_resume(before.as_dict(), dataclasses.replace(before, lr=1e-3))


def test_settings_without_a_value_are_named_on_resume():
    before = TrainingConfig(model="m", output_path="runs/a")
    with pytest.raises(ValueError, match=r"another --lora_layers 1 \(the run has all\), --prompt"):
        changes_on_resume(
            json.loads(json.dumps(before.as_dict())),
            dataclasses.replace(before, lora_layers=(1,), prompt="a"),
        )


def test_a_caption_that_cannot_be_written_names_image_and_folder(
    command, data, blip_folder, tmp_path, monkeypatch
):
    image = shutil.copy(read_annotations(data / "train.json")[0].image, tmp_path / "x.png")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    status, _, err = command(verbs.run_verb, "caption", "--model", blip_folder, "--txt", image)
    assert status == cli.USAGE_ERROR
    assert f"the caption of {image} cannot be written into {tmp_path}: Permission denied" in err


def test_scores_are_explained_where_they_are_zero_by_definition(command, data, blip_folder):
    rows = data / "one.jsonl"
    row = read_annotations(data / "val.json")[0]
    rows.write_text(f'{{"text": "a red dot", "image": "{row.image}"}}\n')
    status, out, _ = command(
        verbs.run_verb, "evaluate", "--model", blip_folder, "--data", rows, "--max_new_tokens", "2"
    )
    assert status == 0 and "CIDEr-D is 0 by definition here" in out and "-0.000" not in out
