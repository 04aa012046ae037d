"""What no run folder may cost a user: files that are theirs, the good adapter, the record."""

import fcntl
import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from forking import in_child
from pictures import json_lines, settings, write_pictures
from test_resume import go_on, stopped_after, trajectory

from lora_engine import cli
from lora_engine.config import TrainingConfig
from lora_engine.files import clear_leftovers
from lora_engine.lora.adapter import read_adapter, save_adapter
from lora_engine.report.page import write_report
from lora_engine.report.run_folder import RunFolder, checkpoint_paths
from lora_engine.stopping import TrainingStopped
from lora_engine.training import loop as loop_module
from lora_engine.training import run as run_module
from lora_engine.training.checkpoint import CheckpointError, read_checkpoint
from lora_engine.training.loop import train
from lora_engine.training.trainer import Trainer
from recipes import blip_cc3m

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=6, name="val.json")
    return folder


def short_run(model: Path, data: Path, run: Path, **changes) -> TrainingConfig:
    """Nine steps, validated after every third."""
    return settings(model, data, run, **{
        "epochs": 3, "eval_every": 3, "save_every": "2", "log_every": 2, **changes
    })


@pytest.fixture(scope="module")
def stopped_run(blip_folder, data, tmp_path_factory) -> Path:
    """A run stopped after step 8: its best adapter is that of step 6."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    stopped_after(short_run(blip_folder, data, path), 8)
    assert read_adapter(path / "adapter").provenance["step"] == "6"
    return path


@pytest.fixture
def run(stopped_run, tmp_path) -> Path:
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


# --- nothing that was there is removed -------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "empty", "nul bytes", "not JSON"])
def test_an_early_error_never_removes_a_folder_that_was_there(
    run, blip_folder, data, monkeypatch, damage
):
    """With checkpoints in it, whatever became of its metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    if damage == "gone":
        metrics.unlink()
    else:
        metrics.write_bytes({"empty": b"", "nul bytes": bytes(900), "not JSON": b"?\n" * 9}[damage])
    before = content(run / "checkpoints") | content(run / "adapter")
    config = go_on(short_run(blip_folder, data, run, cache="disk", cache_dir="/proc/nope"))
    with pytest.raises(ValueError, match="--cache disk"):
        train(config)
    assert content(run / "checkpoints") | content(run / "adapter") == before


def test_a_folder_with_files_of_others_is_not_a_run_and_stays(run, blip_folder, data, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    shutil.copy(run / "config.json", folder)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="already holds files; a run never overwrites anything"):
        train(go_on(short_run(blip_folder, data, folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "thesis.txt"]


@pytest.mark.parametrize("left", ["adapter", "report.html", "samples.jsonl"])
def test_what_is_left_of_a_run_is_not_begun_anew(run, stopped_run, blip_folder, data, left):
    """Without metrics.jsonl and checkpoints an adapter, or a report, is all that tells of it."""
    for path in run.iterdir():
        if path.name not in ("config.json", left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = content(run)
    with pytest.raises(ValueError, match="already holds files"):
        train(go_on(short_run(blip_folder, data, run)))
    assert content(run) == before


def test_a_failed_start_can_be_tried_again(blip_folder, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ValueError, match="--cache disk"):
        train(short_run(blip_folder, data, folder, cache="disk", cache_dir="/proc/nope"))
    assert list(folder.iterdir()) == []
    train(short_run(blip_folder, data, folder, max_steps=1))


def test_a_file_in_a_checkpoint_that_is_removed_stays(run, blip_folder, data):
    note = run / "checkpoints" / "step-00000006" / "notes.txt"
    note.write_text("mine")
    train(go_on(short_run(blip_folder, data, run, keep_last=1)))
    assert [path.name for path in note.parent.iterdir()] == ["notes.txt"]


def test_a_link_to_nowhere_is_no_output_path(blip_folder, data, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a link to a folder that does not exist"):
        train(short_run(blip_folder, data, tmp_path / "link"))


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl",
                                  "samples.jsonl", "captions.jsonl", "skipped.jsonl"])
def test_a_pipe_in_a_run_folder_does_not_hang_its_report(run, tmp_path, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(ValueError, match=name):
        write_report([run], tmp_path / "report.html")


def test_a_pipe_or_a_device_is_no_annotation_file(blip_folder, data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        config = short_run(blip_folder, data, tmp_path / "run", train_data_path=str(path))
        with pytest.raises(ValueError, match="is not a regular file"):
            train(config)


def test_a_failed_start_removes_only_what_it_made(blip_folder, data, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "new"):
        with pytest.raises(ValueError, match="--cache disk"):
            train(short_run(blip_folder, data, folder, cache="disk", cache_dir="/proc/nope"))
    assert empty.is_dir() and not (tmp_path / "new").exists()


def test_what_somebody_puts_into_a_new_folder_stays_when_the_start_fails(
    blip_folder, data, tmp_path, monkeypatch
):
    folder = tmp_path / "new"

    def fail(parts, **_):
        (folder / "notes.txt").write_text("mine")
        raise ValueError("no features today")

    monkeypatch.setattr(run_module, "feature_source", fail)
    with pytest.raises(ValueError, match="no features today"):
        train(short_run(blip_folder, data, folder))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_saving_an_adapter_and_resuming_keep_files_of_others(run, blip_folder, data):
    theirs = {
        run / "adapter" / "notes.txt", run / ".backup.2024", run / "checkpoints" / ".old.1.new",
        run / ".photos.7.old" / "a.jpg",
    }
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train(go_on(short_run(blip_folder, data, run)))
    assert read_adapter(run / "adapter").provenance["step"] == "9"
    assert all(path.read_text() == "mine" for path in theirs)


def test_what_a_kill_between_two_renames_left_is_repaired(run):
    left = run / ".adapter.123.old"
    shutil.copytree(run / "adapter", left)
    (left / "notes.txt").write_text("mine")
    clear_leftovers(run, {"adapter"}.__contains__)
    assert not left.exists() and (run / "adapter" / "notes.txt").read_text() == "mine"


# --- the best adapter ------------------------------------------------------------------------


def damage_best(run: Path, how: str) -> None:
    weights = run / "checkpoints" / "step-00000006" / WEIGHTS
    data = bytearray(weights.read_bytes())
    if how == "gone":
        weights.unlink()
    elif how == "folder gone":
        shutil.rmtree(weights.parent)
    else:
        data[-5] ^= 4
        weights.write_bytes(data[:-9] if how == "cut" else data)


@pytest.mark.parametrize("how", ["cut", "one bit", "gone", "folder gone"])
def test_a_damaged_checkpoint_of_the_best_adapter_costs_nothing(
    run, blip_folder, data, monkeypatch, how
):
    good = (run / "adapter" / WEIGHTS).read_bytes()
    damage_best(run, how)
    monkeypatch.setattr(run_module.Run, "steps", refuse)
    for content_of_adapter in (good, b"of a discarded future"):
        (run / "adapter" / WEIGHTS).write_bytes(content_of_adapter)
        with pytest.raises(ValueError, match="enough"):
            train(go_on(short_run(blip_folder, data, run)))
        assert (run / "adapter" / WEIGHTS).read_bytes() == good


def refuse(*args, **kwargs):
    raise ValueError("enough")


def of_version_1(run: Path) -> None:
    """Make the checkpoints what the version before wrote: without a copy of the best adapter."""
    for path in checkpoint_paths(run / "checkpoints"):
        (path / "best_adapter.safetensors").unlink(missing_ok=True)
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "format": 1}))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.pop("best_adapter.safetensors", None)
        (path / "manifest.json").write_text(json.dumps(manifest))
        vouch_for(path, "state.json")


def vouch_for(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / name).read_bytes()
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_the_version_before_resumes_and_its_good_adapter_stays(run, blip_folder, data):
    of_version_1(run)
    good = (run / "adapter" / WEIGHTS).read_bytes()
    damage_best(run, "one bit")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="enough"):
        patch.setattr(run_module.Run, "steps", refuse)
        train(go_on(short_run(blip_folder, data, run)))
    assert (run / "adapter" / WEIGHTS).read_bytes() == good
    (run / "adapter" / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="of step 6, is lost: .*is damaged.*--init_adapter"):
        train(go_on(short_run(blip_folder, data, run)))


def test_back_at_a_checkpoint_whose_best_was_removed_since(blip_folder, data, tmp_path):
    """Step 4's best adapter was that of step 3; then step 6 was better, and 3 was removed."""
    config = short_run(blip_folder, data, tmp_path / "run", keep_last=3)
    stopped_after(config, 7)
    run = tmp_path / "run"
    names = [path.name for path in checkpoint_paths(run / "checkpoints")]
    assert names == ["step-00000004", "step-00000006", "step-00000007"]
    captions = (run / "captions.jsonl").read_bytes()
    stopped_after(replace(config, resume=str(run / "checkpoints" / "step-00000004")), 1)
    assert read_adapter(run / "adapter").provenance["step"] == "3"
    assert (run / "adapter" / "README.md").exists()
    train(go_on(config))
    train(replace(config, output_path=str(tmp_path / "whole")))
    assert trajectory(run) == trajectory(tmp_path / "whole")
    assert (run / "captions.jsonl").read_bytes() != captions


# --- the record ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "nul bytes", "half"])
def test_validations_that_metrics_lost_come_back_from_the_checkpoint(
    run, stopped_run, blip_folder, data, capsys, damage
):
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        metrics.unlink()
    elif damage == "half":
        metrics.write_bytes(b"".join(lines[:3]))
    else:
        metrics.write_bytes(b"".join(lines[:1]) + bytes(200) + b"\n" + b"".join(lines[4:]))
    before = metrics.read_bytes() if metrics.exists() else None
    train(go_on(short_run(blip_folder, data, run)))
    assert "written again from the checkpoint" in capsys.readouterr().err
    found = [line for line in json_lines(metrics) if line["event"] == "validation"]
    expected = [line for line in json_lines(stopped_run / "metrics.jsonl")
                if line["event"] == "validation"]
    assert found[:3] == expected and [line["step"] for line in found] == [0, 3, 6, 9]
    steps = [line["step"] for line in json_lines(metrics)]
    assert steps == sorted(steps)
    if damage == "nul bytes":
        assert (run / "metrics.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_folder_that_goes_away_stops_the_run_with_a_checkpoint(
    blip_folder, data, tmp_path, monkeypatch, how
):
    path = tmp_path / "run"
    real = Trainer.accumulate

    def act(trainer, batches, step, **settings):
        if step == 4:
            shutil.rmtree(path) if how == "removed" else path.rename(tmp_path / "elsewhere")
        return real(trainer, batches, step)

    monkeypatch.setattr(Trainer, "accumulate", act)
    config = short_run(blip_folder, data, path, save_every="99")
    with pytest.raises(TrainingStopped, match="run folder was removed or renamed"):
        train(config)
    monkeypatch.undo()
    newest = checkpoint_paths(path / "checkpoints")[-1]
    assert read_checkpoint(newest).step == 4
    train(go_on(config))
    train(replace(config, output_path=str(tmp_path / "whole")))
    assert trajectory(path)[-1] == trajectory(tmp_path / "whole")[-1]


# --- folders of strangers --------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    ".lock", "metrics.jsonl", "samples.jsonl", "captions.jsonl", "skipped.jsonl", "config.json",
])
def test_a_link_in_a_run_folder_is_neither_followed_nor_truncated(
    run, blip_folder, data, tmp_path, name
):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        train(go_on(short_run(blip_folder, data, run)))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "adapter_last"])
def test_a_linked_folder_in_a_run_folder_is_refused(run, blip_folder, data, tmp_path, name):
    if (run / name).exists():
        (run / name).rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "elsewhere").mkdir()
    (run / name).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link"):
        train(go_on(short_run(blip_folder, data, run)))
    assert content(tmp_path / "elsewhere") == before


def test_a_pipe_in_a_run_folder_does_not_hang(run, blip_folder, data):
    (run / "skipped.jsonl").unlink(missing_ok=True)
    os.mkfifo(run / "skipped.jsonl")
    with pytest.raises(ValueError, match="skipped.jsonl is a link or another special file"):
        train(go_on(short_run(blip_folder, data, run)))


def test_an_adapter_saved_through_a_link_replaces_its_target(blip_folder, tmp_path):
    from lora_engine import inject, load_captioner

    model = load_captioner(blip_folder).model
    inject(model, ["attention"])
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save_adapter(model, tmp_path / "link", base_model=None)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / WEIGHTS).exists()
    assert (tmp_path / "target" / "notes.txt").read_text() == "mine"


def test_what_reaches_outside_is_not_taken_from_a_run_folder(
    run, blip_folder, data, command, monkeypatch, caplog
):
    config = json.loads((run / "config.json").read_text())
    hostile = {
        "cache_dir": str(run / "planted"), "push_to_hub": "stranger/repo", "track": "wandb",
        "num_workers": 7, "cache": "disk",
    }
    (run / "config.json").write_text(json.dumps({**config, **hostile}))
    asked = []
    monkeypatch.setattr(loop_module, "train", lambda config, **settings: asked.append(config))
    status, _, err = command(blip_cc3m.main, "--output_path", run, "--resume")
    assert status == cli.USAGE_ERROR and not asked
    assert "names another model than this command line" in err and str(blip_folder) in err
    resume = ("--output_path", run, "--resume", "--model", blip_folder)
    status, _, err = command(blip_cc3m.main, *resume)
    said = err + caplog.text
    assert status == 0 and all(f"--{name} {value}" in said for name, value in hostile.items())
    caplog.clear()
    status, _, err = command(blip_cc3m.main, *resume, "--cache_dir", run / "planted")
    assert status == 0 and "--cache_dir" not in err + caplog.text
    assert [settings.cache_dir for settings in asked] == [None, str(run / "planted")]
    for settings_taken in asked:
        assert settings_taken.push_to_hub is None and settings_taken.track == "none"
        assert settings_taken.num_workers is None and settings_taken.cache == "auto"
        assert settings_taken.lr == config["lr"]


# --- whatever is written into a checkpoint's files -------------------------------------------


def mutated(value, generator: random.Random):
    """A JSON value with one part of it replaced, removed or repeated."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        name = generator.choice(list(value))
        if generator.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: mutated(value[name], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        item = mutated(value[index], generator)
        return [*value[:index], *[item] * generator.randrange(3), *value[index + 1:]]
    return generator.choice([
        None, True, False, 0, -1, 1, 2.5, 6.0, 7, 8, 999, 10**9, 2**63, 10**400, -10**30, 1e308,
        float("nan"), float("inf"), "", "6", "nan", "x" * 10_000, [], [[]], {}, {"0": 1}, {"": {}},
        [0, "a dog", True], [[-1, "a dog", True]], [[10**9, "", True]], "torch.float16",
        {"scale": -1.0}, {"losses": {}}, "\x1b[2J", "../../etc/passwd",
    ])


def fuzz_states(run: Path, state_of_run, *, num_inputs: int, seed: int) -> dict[str, int]:
    """Restore a run from mutated states -> how many were refused and how many restored."""
    generator = random.Random(seed)
    newest = checkpoint_paths(run / "checkpoints")[-1]
    original = state_of_run.setup.checkpoint.state
    counts = {"refused": 0, "restored": 0}
    for _ in range(num_inputs):
        state = original
        for _ in range(generator.choice([1, 1, 1, 2, 5])):
            state = mutated(state, generator)
        (newest / "state.json").write_text(json.dumps(state))
        vouch_for(newest, "state.json")
        try:
            state_of_run.restore(read_checkpoint(newest))
            counts["restored"] += 1
        except ValueError as error:
            assert len(str(error)) < 1000
            counts["refused"] += 1
    return counts


@pytest.fixture
def state_of_run(run, blip_folder, data, monkeypatch):
    """A run about to take its steps, restored to its checkpoint."""
    kept = []

    def keep(run):
        kept.append(run)
        raise ValueError("enough")

    monkeypatch.setattr(run_module.Run, "steps", keep)
    with pytest.raises(ValueError, match="enough"):
        train(go_on(short_run(blip_folder, data, run)))
    return kept[0]


def test_no_content_of_state_json_is_more_than_an_error_in_words(run, state_of_run):
    counts = fuzz_states(run, state_of_run, num_inputs=400, seed=0)
    assert counts["refused"] > 100 and counts["restored"] > 10


def test_no_content_of_config_json_is_more_than_an_error_in_words(
    run, blip_folder, command, monkeypatch
):
    monkeypatch.setattr(loop_module, "train", lambda config, **settings: None)
    original = json.loads((run / "config.json").read_text())
    generator = random.Random(1)
    statuses = set()
    for number in range(60):
        text = json.dumps(mutated(original, generator))
        if number % 5 == 0:
            text = text[: generator.randrange(len(text))]
        (run / "config.json").write_text(text)
        status, _, err = command(
            blip_cc3m.main, "--output_path", run, "--resume", "--model", blip_folder
        )
        statuses.add(status)
    assert statuses == {0, cli.USAGE_ERROR}


def test_the_best_of_a_stranger_is_read_before_it_is_restored(run, blip_folder, data):
    """A manifest that vouches for it does not make it an adapter."""
    newest = checkpoint_paths(run / "checkpoints")[-1]
    (newest / "best_adapter.safetensors").write_bytes(b"junk")
    vouch_for(newest, "best_adapter.safetensors")
    good = (run / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="best_adapter.safetensors"):
        train(replace(short_run(blip_folder, data, run), resume=str(newest)))
    assert (run / "adapter" / WEIGHTS).read_bytes() == good


def test_a_first_start_that_is_killed_can_be_begun_again(blip_folder, data, tmp_path, monkeypatch):
    """Also where a save was cut off, and where the second try fails, too."""
    run = tmp_path / "run"
    config = short_run(blip_folder, data, run, max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="enough"):
        patch.setattr(run_module.Run, "save", refuse)
        train(config)
    (run / ".environment.4242.json").write_text("{")
    assert (run / "adapter").exists() and (run / "metrics.jsonl").stat().st_size
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="enough"):
            patch.setattr(run_module.Run, "validate", refuse)
            train(go_on(config))
    train(go_on(config))
    assert [line["step"] for line in json_lines(run / "samples.jsonl")].count(0) == 2
    assert not (run / ".environment.4242.json").exists()


def test_a_pipe_in_a_checkpoint_does_not_hang(run):
    newest = checkpoint_paths(run / "checkpoints")[-1]
    (newest / WEIGHTS).unlink()
    os.mkfifo(newest / WEIGHTS)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest[WEIGHTS]["bytes"] = 0
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_checkpoint(newest)


def test_a_held_folder_is_known_and_looking_at_it_disturbs_nobody(tmp_path):
    """The processes of a launch look at the same time."""
    (tmp_path / ".lock").touch()

    def look_while(kind: int) -> str:
        file = os.open(tmp_path / ".lock", os.O_RDWR)
        fcntl.lockf(file, kind)
        ended = in_child(lambda: RunFolder.check_unlocked(tmp_path), tmp_path / "log")
        os.close(file)
        return ended.output

    assert "another process is training" in look_while(fcntl.LOCK_EX)
    assert look_while(fcntl.LOCK_SH) == ""
