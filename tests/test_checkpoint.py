"""Checkpoints: whole or not there, found again when whole, refused by name when not."""

import errno
import hashlib
import json
import os
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forking import in_child

from lora_engine.files import clear_leftovers
from lora_engine.lora.adapter import adapter_files
from lora_engine.lora.injection import inject, lora_layers
from lora_engine.report.run_folder import (
    checkpoint_name,
    checkpoint_paths,
    is_checkpoint_name,
    set_aside_after,
)
from lora_engine.training import checkpoint as checkpoint_module
from lora_engine.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_checkpoint,
    remove_old_checkpoints,
    restore_moments,
    write_checkpoint,
)
from lora_engine.training.moving_average import MovingAverage
from lora_engine.training.optim import FlatLoRAParameters, build_optimizer

FILES = [
    "adapter_config.json", "adapter_model.safetensors", "best_adapter.safetensors",
    "manifest.json", "optimizer.safetensors", "state.json",
]


def a_state(step: int) -> dict:
    """What state.json holds after `step` steps of a run whose best adapter is the first one."""
    return {
        "step": step, "total_steps": 99, "settings": {"lr": 0.1}, "fingerprints": {"base": "b"},
        "compute_dtype": "torch.float32", "scaler": {}, "micro_batch_rows": None, "seconds": 1.5,
        "validations": {"losses": {"0": 1.0}, "scores": {}, "best_step": 0, "num_worse": 0},
        "captions": {"0": [[3, "a dog", True]]},
        "meter": {
            "finite": [[1.0, 0.5]], "num_non_finite": 0, "num_overflows": 0, "rate": 0.1,
            "num_images": 4, "waited_s": 0.0, "interval_s": 1.0, "training_s": 1.0,
        },
    }


@dataclass
class Trainee:
    """A small model with adapters, and its optimizer after some steps."""

    model: torch.nn.Module
    lora: FlatLoRAParameters
    optimizer: torch.optim.AdamW

    def step(self) -> None:
        self.lora.gradient.normal_()
        self.optimizer.step()

    def write(
        self, folder: Path, step: int, average: MovingAverage | None = None, **state
    ) -> Path:
        path = folder / checkpoint_name(step)
        files = adapter_files(self.model, base_model="base")
        write_checkpoint(
            path,
            adapter_files=files,
            best_files=adapter_files(self.model, base_model="base", provenance={"step": "0"}),
            optimizer=self.optimizer,
            average=average,
            average_files=None if average is None else adapter_files(
                self.model, base_model="base", provenance={"step": "best average"}
            ),
            state={**a_state(step), **state},
        )
        return path


@pytest.fixture
def trainee() -> Trainee:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    inject(model, ["0", "1"], rank=2)
    lora = FlatLoRAParameters((layer for _, layer in lora_layers(model)), torch.float32)
    trainee = Trainee(model, lora, build_optimizer(lora, lr=0.1, weight_decay=0.0))
    trainee.step()
    return trainee


def test_a_checkpoint_holds_what_was_written(trainee, tmp_path):
    trainee.step()
    path = trainee.write(tmp_path, 7, note=[1.5, None, "é"])
    assert sorted(file.name for file in path.iterdir()) == FILES
    read = read_checkpoint(path)
    assert read.step == 7 and read.state["note"] == [1.5, None, "é"]
    before = trainee.optimizer.state[trainee.lora.values]
    assert {name: value.tolist() for name, value in read.moments.items()} == {
        name: value.tolist() for name, value in before.items()
    }
    trainee.optimizer.state.clear()
    restore_moments(trainee.optimizer, trainee.lora, read)
    after = trainee.optimizer.state[trainee.lora.values]
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_holds_the_moving_average_and_the_best_one(trainee, tmp_path):
    average = MovingAverage(trainee.lora, 0.5)
    average.values.normal_()
    expected = average.values.clone()
    validations = a_state(1)["validations"]
    settings = {"ema_decay": 0.5}
    path = trainee.write(
        tmp_path, 1, average=average, average_validations=validations, settings=settings
    )
    read = read_checkpoint(path)
    assert read.average_files == adapter_files(
        trainee.model, base_model="base", provenance={"step": "best average"}
    )
    assert read.validations() == [(0, 1.0, {"ema_loss": 1.0})]
    average.values.zero_()
    restore_moments(trainee.optimizer, trainee.lora, read, average)
    assert torch.equal(average.values, expected)
    with pytest.raises(CheckpointError, match="this run has"):
        restore_moments(trainee.optimizer, trainee.lora, read)
    for state in ({"losses": {"1": 1.0}}, {"losses": 3}, {"best_step": 1}):
        path = trainee.write(
            tmp_path, 1, average=average, average_validations={**validations, **state},
            settings=settings,
        )
        with pytest.raises(CheckpointError, match="state.json: average_validations: "):
            read_checkpoint(path)
    with pytest.raises(CheckpointError, match="state.json: average_validations: is None"):
        read_checkpoint(trainee.write(tmp_path, 1, average=average, settings=settings))
    path = trainee.write(tmp_path, 1, average_validations=validations, settings=settings)
    with pytest.raises(CheckpointError, match="lacks best_average.safetensors, but the run has"):
        read_checkpoint(path)


def test_the_same_state_is_the_same_bytes(trainee, tmp_path):
    one, other = (trainee.write(tmp_path / name, 1) for name in "ab")
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_file_modes_follow_the_umask(trainee, tmp_path):
    before = os.umask(0o027)
    try:
        path = trainee.write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}
    assert oct(path.stat().st_mode & 0o777) == "0o750"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped first", "flipped middle", "flipped last", "cut",
                                    "cut to nothing", "longer", "gone"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(
    trainee, tmp_path, name, damage, caplog
):
    trainee.write(tmp_path, 1)
    newest = trainee.write(tmp_path, 2)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage.startswith("flipped"):
        place = {"first": 0, "middle": len(data) // 2, "last": -1}[damage.split()[1]]
        data[place] ^= 0x20
    file.write_bytes({
        "cut": data[:-1], "cut to nothing": b"", "longer": data + b"x",
    }.get(damage, bytes(data)))
    if damage == "gone":
        file.unlink()
    # A changed digit in the manifest may as well be one in the file that it speaks of.
    words = name.removesuffix(".json") if name == "manifest.json" else name
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(newest)
    assert find_checkpoint(tmp_path).step == 1
    (message,) = caplog.messages
    assert "skipped a checkpoint" in message and words in message
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(tmp_path, newest)


def test_nothing_to_find_is_nothing_and_nothing_whole_is_an_error(trainee, tmp_path):
    assert find_checkpoint(tmp_path) is None
    path = trainee.write(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        find_checkpoint(tmp_path)


def counted_events(function, kill_at: int) -> int:
    """Runs `function`, killed before its `kill_at`th operation on files -> operations so far."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def counted_fsync(descriptor):
        hook("open", ())
        fsync(descriptor)
        hook("open", ())

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    function()
    return count


@pytest.mark.parametrize("step", [2, 1], ids=["a new one", "one in the place of another"])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(trainee, tmp_path, step):
    trainee.write(tmp_path, 1, note="before")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    num_points = 0
    notes = set()
    for kill_at in range(1, 200):
        def save():
            counted_events(lambda: trainee.write(tmp_path, step, note="after"), kill_at)

        ended = in_child(save, tmp_path.parent / f"log{step}.txt")
        clear_leftovers(tmp_path, is_checkpoint_name)
        newest = find_checkpoint(tmp_path)
        assert newest is not None, f"killed at operation {kill_at}"
        notes.add(newest.state["note"])
        names = sorted(path.name for path in tmp_path.iterdir())
        assert set(names) <= {"step-00000001", "step-00000002"} and "step-00000001" in names
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.output
        num_points += 1
        for path in tmp_path.rglob("*"):  # as before the save
            if path.is_file() and path not in before:
                path.unlink()
        for path, data in before.items():
            path.write_bytes(data)
        if (tmp_path / "step-00000002").exists():
            (tmp_path / "step-00000002").rmdir()
    assert notes == {"before", "after"} and num_points > 20


@pytest.mark.parametrize("number", range(5))
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    trainee, tmp_path, monkeypatch, number
):
    trainee.write(tmp_path, 1)
    real, calls = checkpoint_module.write_synced, []

    def full(path, data):
        calls.append(path)
        if len(calls) > number:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(checkpoint_module, "write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        trainee.write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert find_checkpoint(tmp_path).step == 1


def test_the_last_and_the_best_are_kept(trainee, tmp_path):
    for step in (1, 2, 3, 4, 5):
        trainee.write(tmp_path, step)
    (tmp_path / "notes").mkdir()
    remove_old_checkpoints(tmp_path, keep_last=2, kept_steps=(2, None))
    assert [path.name[-1] for path in checkpoint_paths(tmp_path)] == ["2", "4", "5"]
    assert (tmp_path / "notes").exists()


def test_later_checkpoints_are_set_aside_and_not_found_any_more(trainee, tmp_path):
    for step in (1, 2, 3):
        trainee.write(tmp_path, step)
    moved = set_aside_after(tmp_path, 1)
    assert sorted(path.name for path in moved) == [
        "step-00000002.set_aside", "step-00000003.set_aside"
    ]
    assert find_checkpoint(tmp_path).step == 1
    trainee.write(tmp_path, 3)
    (again,) = set_aside_after(tmp_path, 1)
    assert again.name == "step-00000003.set_aside.2" and moved[1].is_dir()  # both are kept


# --- files that somebody else made ----------------------------------------------------------


def safetensors_file(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


VECTOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("content, words", [
    (b"", "optimizer.safetensors"),
    (struct.pack("<Q", 2**63) + b"{}", "header"),
    (struct.pack("<Q", 10**9) + b"{}", "header"),
    (safetensors_file(b"[" * 10_000), "header"),
    (safetensors_file(b'{"exp_avg": NaN}'), "header"),
    (safetensors_file({"exp_avg": {**VECTOR, "data_offsets": [0, 2**40]}}, bytes(16)), "cannot"),
    (safetensors_file({"exp_avg": VECTOR, "exp_avg_sq": VECTOR}, bytes(16)), "cannot"),  # overlap
    (safetensors_file({"exp_avg": {**VECTOR, "shape": [2**62, 4]}}, bytes(16)), "cannot"),
    (safetensors_file({"exp_avg": VECTOR}, bytes(64)), "cannot"),
    (safetensors_file({"payload": VECTOR}, bytes(16)), "payload is F32"),
    (safetensors_file({"exp_avg": {**VECTOR, "dtype": "I32"}}, bytes(16)), "exp_avg is I32"),
    (safetensors_file({"exp_avg": {**VECTOR, "shape": [2, 2]}}, bytes(16)), "exp_avg is F32 of"),
    (b"\x80\x05cos\nsystem\n(S'true'\ntR.", "header"),  # a pickle
], ids=["empty", "length 2^63", "length 10^9", "nested", "NaN", "beyond the file", "overlapping",
        "overflow", "unused bytes", "unknown tensor", "integers", "matrix", "pickle"])
def test_a_malicious_tensor_file_is_refused_in_words(trainee, tmp_path, content, words):
    """With a manifest that vouches for it."""
    path = trainee.write(tmp_path, 1)
    (path / "optimizer.safetensors").write_bytes(content)
    vouch_for(path, "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="optimizer.safetensors") as caught:
        read_checkpoint(path)
    assert words in str(caught.value)


def vouch_for(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / name).read_bytes()
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("change, words", [
    ({"format": 99}, "format is 99"),
    ({"step": "1"}, "step is '1'"),
    ({"step": 1.0}, "step is 1.0, expected a whole number"),
    ({"step": 2}, "step is 2, its folder's name says 1"),
    ({"total_steps": 0}, "total_steps is 0"),
    ({"settings": None}, "settings"),
    ({"settings": {"lr": "high"}}, "settings.lr is 'high'"),
    ({"settings": {"lr": 10**400}}, "settings.lr is 1000"),
    ({"fingerprints": {"base": 5}}, "fingerprints.base is 5"),
    ({"compute_dtype": "torch.int8"}, "compute_dtype is 'torch.int8'"),
    ({"compute_dtype": "torch.float16"}, "scaler is {}"),
    ({"scaler": {"scale": float("nan")}}, "scaler lacks growth_factor"),
    ({"micro_batch_rows": -1}, "micro_batch_rows is -1"),
    ({"micro_batch_rows": 10**18}, "micro_batch_rows is 1000"),
    ({"validations": {}}, "validations lacks losses"),
    ({"validations": {"losses": {}, "scores": {}, "best_step": 0, "num_worse": 0}}, "losses"),
    ({"validations": {**a_state(1)["validations"], "best_step": 999}}, "best_step"),
    ({"validations": {**a_state(1)["validations"], "losses": {"0": 1.0, "5": 1.0}}}, "after 1"),
    ({"validations": {**a_state(1)["validations"], "losses": {"x": 1.0}}}, "key 'x'"),
    ({"validations": {**a_state(1)["validations"], "scores": {"0": {}}}}, "scores.0 lacks bleu_1"),
    ({"captions": {}}, "captions are of steps"),
    ({"captions": {"0": [[-3, "a dog", True]]}}, r"captions.0\[0\]\[0\] is -3"),
    ({"captions": {"0": [[3, "a dog"]]}}, "expected a list of 3"),
    ({"meter": None}, "meter is None, expected an object"),
    ({"seconds": float("inf")}, "seconds is inf"),
    ({"seconds": -1}, "seconds is -1"),
], ids=str)
def test_a_state_that_no_run_writes_is_refused_by_name(trainee, tmp_path, change, words):
    path = trainee.write(tmp_path, 1)
    state = {"format": 2, **a_state(1), **change}
    (path / "state.json").write_text(json.dumps(state))
    vouch_for(path, "state.json")
    with pytest.raises(CheckpointError, match=f"state.json: .*{words}"):
        read_checkpoint(path)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"../../etc/passwd": {"bytes": 1}}', "[" * 9999])
def test_a_manifest_of_other_files_is_refused(trainee, tmp_path, manifest):
    path = trainee.write(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_checkpoint(path)


def test_moments_of_other_parameters_are_refused(trainee, tmp_path):
    read = read_checkpoint(trainee.write(tmp_path, 1))
    model = torch.nn.Sequential(torch.nn.Linear(600, 500))
    inject(model, ["0"], rank=2)
    lora = FlatLoRAParameters((layer for _, layer in lora_layers(model)), torch.float32)
    optimizer = build_optimizer(lora, lr=0.1, weight_decay=0.0)
    with pytest.raises(CheckpointError, match="exp_avg"):
        restore_moments(optimizer, lora, read)
