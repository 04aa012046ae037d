"""Many processes compute what one computes, and end together, whatever happens to one of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pictures import json_lines, write_pictures
from torchrun import environ, output_of, torchrun

from lora_engine.data.batches import SampleIndex, StepRows
from lora_engine.ranks import ManyProcesses, _failure_of
from lora_engine.stopping import Interrupted, StopSignal, TrainingStopped
from lora_engine.training.agreement import agreed_steps
from lora_engine.training.micro_batches import BatchSplitter
from lora_engine.training.run import Run
from recipes import finetune

NUM_STEPS = 14  # of two epochs of 50 rows: the seventh and the last have 2 rows


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """50 training images, of which two are damaged, and 13 validation images, one damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, num_images=50)
    write_pictures(folder, num_images=13, name="val.json")
    for name in ("train_05", "train_17", "val_03"):
        (folder / "images" / f"{name}.png").write_bytes(b"not an image")
    return folder


def args_of(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    values = {
        "model": model, "train_data_path": data / "train.json", "val_data_path": data / "val.json",
        "output_path": run, "cache_dir": run.with_name(f"{run.name}_cache"), "epochs": 2,
        "batch_size": 8, "micro_batches": 4, "lr": 1e-2, "lora_dropout": 0.1, "log_every": 1,
        "eval_every": 6, "max_bad_share": 0.2, "num_threads": 1, "device": "cpu",
    }
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)] + [*more]


def start(num_processes: int, args: list[str], *, launcher: tuple[str, ...] = (), **request):
    request = json.dumps({"args": args, **request})
    return torchrun(num_processes, ["-m", "rank_run", request], launcher=launcher)


def results(run: Path) -> dict:
    """What must not depend on the number of processes."""
    lines = [
        {name: value for name, value in line.items() if not name.endswith(("_per_s", "_share"))}
        for line in json_lines(run / "metrics.jsonl")
    ]
    names = "adapter/adapter_model.safetensors", "captions.jsonl", "samples.jsonl"
    skipped = sorted(line["image"] for line in json_lines(run / "skipped.jsonl"))
    last = run / "adapter_last" / "adapter_model.safetensors"
    files = {name: (run / name).read_bytes() for name in names}
    return {"lines": lines, "skipped": skipped, "last": last.exists() and last.read_bytes()} | files


@pytest.fixture(scope="module")
def expected(blip_folder, pictures, tmp_path_factory) -> dict:
    """The results of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert finetune.main(args_of(blip_folder, pictures, run)) == 0
    found = results(run)
    assert [line["step"] for line in found["lines"] if line["event"] == "train"] == list(
        range(1, NUM_STEPS + 1)
    )
    assert len(found["skipped"]) == 3
    return found


@pytest.mark.parametrize("num_processes", [2, 4])
def test_any_number_of_processes_gives_the_same_bits(
    blip_folder, pictures, tmp_path, expected, num_processes
):
    """Losses, norms, scores, captions, adapter: dropout, bad images and a last step of 2 rows."""
    run = tmp_path / "run"
    launch = start(num_processes, args_of(blip_folder, pictures, run))
    text = output_of(launch)
    assert launch.returncode == 0, text
    assert results(run) == expected
    assert text.count("run folder") == 1  # rank 0 speaks for all
    assert f"{num_processes} processes share a step of 8 captions in 4 micro-batches" in text


def test_another_family_and_accumulation_give_the_same_bits(vit_gpt2_folder, pictures, tmp_path):
    found = []
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        args = args_of(
            vit_gpt2_folder, pictures, run, "--batch_size", "4", "--grad_accum_steps", "2"
        )
        if num_processes == 1:
            assert finetune.main(args) == 0
        else:
            launch = start(num_processes, args)
            text = output_of(launch)
            assert launch.returncode == 0, text
        found.append(results(run))
    assert found[0] == found[1]


def check_resumed(args: list[str], run: Path, expected: dict) -> None:
    """The rest of the run, in one process, gives the same results."""
    assert finetune.main([*args, "--resume"]) == 0
    assert results(run) == expected


def check_nothing_is_left(run: Path) -> None:
    """No process of the launch is alive 15 s after the failure."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert f'"{run}"' not in command or int(folder.name) == os.getpid(), command


@pytest.mark.parametrize("rank, number, words", [
    (1, signal.SIGKILL, r"stopped: rank 1 \(on .+\) is gone: it was killed"),
    (0, signal.SIGKILL, r"stopped: rank 0 \(on .+\) is gone: it was killed"),
    (1, signal.SIGSTOP, r"stopped: rank 1 \(on .+\) has not responded for 2 s"),
])
def test_a_lost_process_ends_all_with_a_checkpoint_of_the_last_step(
    blip_folder, pictures, tmp_path, expected, rank, number, words
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run)
    launch = start(2, args, signal=[8, rank, number], hung_s=2)
    text = output_of(launch)
    assert launch.returncode == 1  # torchrun's, for any failure
    assert len(re.findall(words, text)) == 1, text
    assert "the checkpoint of step 7 is in" in text or "the checkpoint of step 8 is in" in text
    check_nothing_is_left(run)
    check_resumed(args, run, expected)


@pytest.mark.parametrize("who, number", [
    (1, signal.SIGTERM), ("launcher", signal.SIGTERM), ("launcher", signal.SIGKILL),
])
def test_a_signal_to_one_process_or_the_launcher_ends_all_after_the_same_step(
    blip_folder, pictures, tmp_path, expected, who, number
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run, "--epochs", "40", "--max_steps", str(NUM_STEPS))
    launch = start(2, args, signal=[3, who, number])
    text = output_of(launch)  # until the last process has closed the pipe
    assert text.count("stopped by SIGTERM") == 1, text
    assert re.search(r"the checkpoint of step \d+ is in", text), text
    check_nothing_is_left(run)
    check_resumed(args, run, expected)


def test_torchrun_resumes_by_itself(blip_folder, pictures, tmp_path, expected, monkeypatch):
    """With --max-restarts, and a run folder that the command line does not name."""
    monkeypatch.chdir(tmp_path)
    args = args_of(blip_folder, pictures, tmp_path / "unused")
    where = args.index("--output_path")
    del args[where : where + 2]
    launch = start(
        2, args, launcher=("--max-restarts", "1"), signal=[8, 1, signal.SIGKILL]
    )
    text = output_of(launch)
    assert launch.returncode == 0, text
    (run,) = (tmp_path / "runs").iterdir()
    assert "resuming after step" in text
    assert results(run) == expected


@pytest.mark.parametrize("more_args, words", [
    (["--lr", "0.5"], r"error: rank 1 \(on .+\) differs from rank 0 \(on .+\): --lr 0.5 instead of "
                      r"0.01. All processes need the same"),
    (["--train_data_path", "no_such.json"], r"error: rank 1 \(on .+\): no_such.json"),
    (["--batch_sise", "3"], r"error: rank 1 \(on .+\): there is no flag --batch_sise"),
    (["--lr", "high"], r"stopped: rank 1 \(on .+\): it has exited with status 2"),
])
def test_a_process_that_differs_is_named(blip_folder, pictures, tmp_path, more_args, words):
    run = tmp_path / "run"
    launch = start(2, args_of(blip_folder, pictures, run), more_args={"1": more_args})
    text = output_of(launch)
    assert launch.returncode == 1
    assert len(re.findall(r"^(error|stopped)", text, re.MULTILINE)) == 1, text
    assert re.search(words, text), text
    assert not run.exists()


def test_processes_that_do_not_start_are_named(blip_folder, pictures, tmp_path):
    place = {
        "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(29_000 + os.getpid() % 900),
    }
    begin_s = time.monotonic()
    request = json.dumps({"args": args_of(blip_folder, pictures, tmp_path / "run"), "join_s": 1})
    ended = subprocess.run(
        [sys.executable, "-m", "rank_run", request], capture_output=True, text=True,
        env=environ() | place,
    )
    assert ended.returncode == 2, ended
    assert "1 of 3 processes have started within 1 s; missing are ranks 1, 2" in ended.stderr
    assert time.monotonic() - begin_s < 60


@pytest.mark.parametrize("given, words", [
    (["--batch_size", "3"], "a step has 3 captions"),
    (["--resume", "--micro_batches", "8"], "--micro_batches 8 (the run has 6)"),
])
def test_micro_batches_that_do_not_fit_are_refused(
    blip_folder, pictures, tmp_path, given, words
):
    run = tmp_path / "run"
    if "--resume" in given:
        finetune.main(args_of(
            blip_folder, pictures, run, "--micro_batches", "6", "--max_steps", "1"
        ))
    with pytest.raises(ValueError, match=re.escape(words)):
        finetune.main(args_of(blip_folder, pictures, run, *given))


def test_a_limit_learnt_during_a_step_is_voted_on_next():
    """The vote on a step is sent before the step ahead of it, in which memory may run out."""
    sent = []

    def vote(ballot):
        sent.append(ballot.max_rows)
        return lambda: [ballot._replace(max_rows=0), ballot]  # rank 0 has no limit

    splitter = BatchSplitter()
    steps = agreed_steps(
        [StepRows([[], [SampleIndex(0, 0, row)]]) for row in range(4)],
        iter([SimpleNamespace(num_targets=1, skipped=[], rows=[row]) for row in range(4)]),
        first_step=1,
        ranks=SimpleNamespace(rank=1, size=2, is_main=False, vote=vote),
        stop=StopSignal(),
        splitter=splitter,
        is_save_due=lambda step: False,
    )
    for step in steps:
        if step.number == 1:
            splitter.num_rows = 4
        assert splitter.num_rows == 4
    assert sent == [0, 0, 4, 4]


@pytest.mark.parametrize("end", [Interrupted(signal.SIGTERM), SystemExit(143)])
def test_torchruns_answer_to_a_lost_process_is_not_the_cause(end):
    lost = TrainingStopped("rank 0 is gone")
    ranks = SimpleNamespace(_found=None, check=lambda: raise_(lost))
    assert ManyProcesses.cause(ranks, end) is lost
    ranks.check = lambda: None
    found = ManyProcesses.cause(ranks, end)
    assert isinstance(found, Interrupted) and found.number == signal.SIGTERM


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("outcome, is_remembered", [
    ([True, False], True),  # rank 0 has written it
    ([False, False], False),  # the disk was full
    (TrainingStopped("rank 0 is gone"), False),
])
def test_a_checkpoint_counts_once_the_writer_has_it(outcome, is_remembered):
    """In a process that does not write: it may have to write it in place of the writer."""
    remembered = []

    def gather(value):
        assert value is False
        return raise_(outcome) if isinstance(outcome, Exception) else outcome

    run = SimpleNamespace(
        step=3, has_begun=True, _is_consistent=True, _state=dict,
        best=SimpleNamespace(losses={}),
        trainer=SimpleNamespace(optimizer=None),
        setup=SimpleNamespace(data=SimpleNamespace(digests=None)),
        metrics=SimpleNamespace(forget=lambda: None),
        ranks=SimpleNamespace(gather=gather),
        checkpoints=SimpleNamespace(
            has=lambda step, is_validated: False,
            write=lambda *args, **settings: False,
            wrote=lambda step, is_validated: remembered.append(step),
        ),
        _compare_processes=lambda: None,
    )
    try:
        Run.save(run)
    except TrainingStopped:
        assert isinstance(outcome, TrainingStopped)
    assert remembered == ([3] if is_remembered else [])


def test_a_script_may_open_its_processes_twice(tmp_path):
    """What they told each other the first time counts for nothing the second time."""
    script = tmp_path / "script.py"
    script.write_text(
        "from lora_engine.ranks import open_ranks\n"
        "launches = []\n"
        "for number in range(2):\n"
        "    with open_ranks() as ranks:\n"
        "        print('only rank 0')\n"
        "        launches += ranks.gather([ranks.rank, number, ranks.launch])\n"
        "print(len({launch for _, _, launch in launches}), 'launches', ranks.rank)\n"
    )
    launch = torchrun(2, [str(script)])
    text = output_of(launch)
    assert launch.returncode == 0, text
    assert text.count("only rank 0") == 2
    assert "2 launches 0" in text and "2 launches 1" in text


def test_a_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = StopSignal()
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGTERM, None)
    with pytest.raises(Interrupted):
        stop.check()
    stop.received_s -= 60
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            stop.receive(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error, text", [
    (KeyError("x"), "KeyError: 'x'"),
    (TrainingStopped("the loss was not finite"), "the loss was not finite"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (SystemExit(2), "it has exited with status 2"),
])
def test_what_a_process_posts_says_why_it_has_ended(error, text):
    assert _failure_of(error) == text
