"""Many processes compute what one computes, and end together, whatever happens to one of them."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_run
from forking import Ended, launch
from pictures import json_lines, write_pictures
from torchrun import output_of, torchrun

from lora_engine.cli import STOPPED, USAGE_ERROR, reported_errors
from lora_engine.ranks import ManyProcesses, _failure_of, open_ranks
from lora_engine.stopping import Interrupted, StopSignal, TrainingStopped
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
    given = [(f"--{name}", value) for name, value in values.items() if f"--{name}" not in more]
    return [str(part) for flag in given for part in flag] + [*more]


def start(num_processes: int, args: list[str], *, launcher: tuple[str, ...] = (), **request):
    request = json.dumps({"args": args, **request})
    return torchrun(num_processes, ["-m", "rank_run", request], launcher=launcher)


def forked(num_processes: int, args: list[str], folder: Path, **request) -> list[Ended]:
    """The same, without torchrun and in forks of this process, which takes a fifth of the time."""

    def run() -> int:
        with reported_errors() as status:
            status.code = rank_run.main({"args": args, **request})
        return status.code

    return launch(num_processes, run, folder)


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


@pytest.mark.parametrize("num_processes, more", [
    (4, []), (2, ["--cache", "memory"]),
    (2, ["--cache", "off", "--num_workers", "1", "--read_order", "blocks"]),
])
def test_several_processes_give_the_bits_of_one(
    blip_folder, pictures, tmp_path, expected, num_processes, more
):
    """Losses, norms, scores, captions, adapter: dropout, bad images and a last step of 2 rows."""
    run = tmp_path / "run"
    ended = forked(num_processes, args_of(blip_folder, pictures, run, *more), tmp_path)
    assert [status for status, _ in ended] == [0] * num_processes, ended
    assert results(run) == expected
    text = ended[0].output
    assert f"{num_processes} processes share a step of 8 captions in 4 micro-batches" in text
    assert all("run folder" not in output for _, output in ended[1:])  # rank 0 speaks for all


def test_another_family_accumulation_and_variants_give_the_same_bits(
    vit_gpt2_folder, pictures, tmp_path
):
    found = []
    for name in ("one", "two"):
        args = args_of(
            vit_gpt2_folder, pictures, tmp_path / name, "--batch_size", "4",
            "--grad_accum_steps", "2", "--use_dora", "--init_lora_weights", "eva",
            "--loraplus_lr_ratio", "4", "--ema_decay", "0.9",
        )
        if name == "one":
            assert finetune.main(args) == 0
        else:
            assert [status for status, _ in forked(2, args, tmp_path)] == [0, 0]
        average = tmp_path / name / "adapter_ema" / "adapter_model.safetensors"
        found.append((results(tmp_path / name), average.read_bytes()))
    assert found[0] == found[1]


def check_resumed(args: list[str], run: Path, expected: dict) -> None:
    """The rest of the run, in one process, gives the same results."""
    assert finetune.main([*args, "--resume"]) == 0
    assert results(run) == expected


def check_nothing_is_left(run: Path) -> None:
    """No process of the launch is alive."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert f'"{run}"' not in command or int(folder.name) == os.getpid(), command


def test_a_process_that_hangs_ends_all_with_a_checkpoint_of_the_last_step(
    blip_folder, pictures, tmp_path, expected
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run)
    ended = forked(2, args, tmp_path, signal=[8, 1, signal.SIGSTOP], hung_s=2)
    assert [status for status, _ in ended] == [STOPPED, -signal.SIGKILL], ended  # by rank 0
    text = ended[0].output
    assert text.count("stopped: rank 1 (on ") == 1, text
    assert "has not responded for 2 s" in text
    assert re.search("the checkpoint of step [78] is in", text), text
    check_resumed(args, run, expected)


def test_if_rank_0_is_lost_the_next_one_writes_the_checkpoint(
    blip_folder, pictures, tmp_path, expected
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run, "--micro_batches", "6")
    ended = forked(3, args, tmp_path, signal=[8, 0, signal.SIGKILL])
    assert [status for status, _ in ended] == [-signal.SIGKILL, STOPPED, STOPPED]
    assert "stopped: rank 0 (on " in ended[1].output and "is gone: it was" in ended[1].output
    assert re.search("the checkpoint of step [78] is in", ended[1].output)
    assert "stopped" not in ended[2].output  # torch reports the lost store
    assert finetune.main([*args, "--resume"]) == 0
    steps = [line["step"] for line in results(run)["lines"] if line["event"] == "train"]
    assert steps == [*range(1, NUM_STEPS + 1)]


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)
])
def test_a_signal_to_torchrun_ends_all_after_the_same_step(
    blip_folder, pictures, tmp_path, expected, number
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run, "--epochs", "40", "--max_steps", str(NUM_STEPS))
    launch = start(2, args, signal=[3, "launcher", number])
    text = output_of(launch)  # until the last process has closed the pipe
    assert text.count("stopped by SIGTERM") == 1, text
    assert re.search(r"the checkpoint of step \d+ is in", text), text
    check_nothing_is_left(run)
    check_resumed(args, run, expected)


def test_a_signal_to_one_process_ends_all_after_the_same_step(
    blip_folder, pictures, tmp_path, expected
):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run)
    ended = forked(2, args, tmp_path, signal=[8, 1, signal.SIGTERM])
    assert [status for status, _ in ended] == [143, 143]
    assert ended[0].output.count("stopped by SIGTERM") == 1
    check_resumed(args, run, expected)


@pytest.mark.slow
def test_torchrun_resumes_by_itself_with_the_bits_of_one_process(
    blip_folder, pictures, tmp_path, expected, monkeypatch
):
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
    assert text.count("run folder") == 2  # of two launches
    (run,) = (tmp_path / "runs").iterdir()
    assert "resuming after step" in text
    assert results(run) == expected


@pytest.mark.parametrize("given, words", [
    (["--lr", "0.5"], r"error: rank 1 \(on .+\) differs from rank 0 \(on .+\): --lr 0.5 instead of "
                      r"0.01. All processes need the same"),
    (["--train_data_path", "no_such.json"], r"error: rank 1 \(on .+\): no_such.json"),
    (["--batch_sise", "3"], r"error: rank 1 \(on .+\): there is no flag --batch_sise"),
    (["--lr", "high"], r"error: rank 1 \(on .+\): --lr is 'high'; it must be a number"),
])
def test_a_process_that_differs_is_named(blip_folder, pictures, tmp_path, given, words):
    run = tmp_path / "run"
    args = args_of(blip_folder, pictures, run)
    ended = forked(2, args, tmp_path, given={"1": given})
    assert [status for status, _ in ended] == [USAGE_ERROR, USAGE_ERROR]
    text = "".join(output for _, output in ended)
    assert len(re.findall(r"^(error|stopped)", text, re.MULTILINE)) == 1, text
    assert re.search(words, text), text
    assert not run.exists()


@pytest.mark.parametrize("rank, words", [
    ("0", "^error: 1 of 3 processes have started within 1 s; missing: rank 1, rank 2$"),
    ("1", "^error: .+ cannot reach localhost:[0-9]+, where rank 0 or torchrun should listen"),
])
def test_processes_that_do_not_start_are_named(blip_folder, pictures, tmp_path, rank, words):
    args = args_of(blip_folder, pictures, tmp_path / "run")

    def start_one_of_three() -> int:
        os.environ |= {"WORLD_SIZE": "3", "RANK": rank}
        with reported_errors() as status:
            status.code = rank_run.main({"args": args, "join_s": 1})
        return status.code

    (ended,) = launch(1, start_one_of_three, tmp_path)
    assert ended.status == USAGE_ERROR
    assert re.search(words, ended.output), ended.output


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
        best_average=None,
        trainer=SimpleNamespace(optimizer=None),
        setup=SimpleNamespace(data=SimpleNamespace(digests=None)),
        metrics=SimpleNamespace(forget=lambda: None),
        ranks=SimpleNamespace(gather=gather),
        checkpoints=SimpleNamespace(
            has=lambda step, is_validated: False,
            write=lambda *args, **settings: False,
            note=lambda step, is_validated: remembered.append(step),
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
    def train_twice() -> None:
        launches = set()
        for number in range(2):
            with open_ranks() as ranks:
                print("only rank 0")
                assert ranks.gather([ranks.rank, number]) == [[0, number], [1, number]]
                launches.add(ranks.launch)
        print(len(launches), "launches")

    ended = launch(2, train_twice, tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    assert ended[0].output == "only rank 0\nonly rank 0\n2 launches\n"
    assert ended[1].output == "2 launches\n"


def test_an_error_of_all_is_reported_once(tmp_path):
    """Also where rank 0 holds the store, and another process comes to its end later."""
    def fail() -> int:
        with reported_errors() as status, open_ranks() as ranks:
            ranks.gather(None)
            time.sleep(ranks.rank)
            raise ValueError("no such setting")
        return status.code

    ended = launch(2, fail, tmp_path)
    assert ended == [(USAGE_ERROR, "error: no such setting\n"), (USAGE_ERROR, "")]


def test_torchruns_signal_does_not_cut_the_report_of_a_failure(tmp_path):
    """It comes as soon as one process has ended, while others still tell why."""
    def fail() -> int:
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
        leave = ManyProcesses.leave

        def leave_signalled(ranks, error=None):
            os.kill(os.getpid(), signal.SIGTERM)
            leave(ranks, error)

        ManyProcesses.leave = leave_signalled
        with reported_errors() as status, open_ranks() as ranks:
            ranks.gather(None)
            raise ValueError("no such setting")
        return status.code

    ended = launch(2, fail, tmp_path)
    assert ended == [(USAGE_ERROR, "error: no such setting\n"), (USAGE_ERROR, "")]


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
