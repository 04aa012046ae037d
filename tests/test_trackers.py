"""Trackers receive what a run logs, and can neither fail, stop nor slow it."""

import io
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from pictures import json_lines, settings, write_pictures

from lora_engine.report import trackers
from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.report.trackers import check_tracker, start_tracker
from lora_engine.terminal import ConsoleHandler, logging_to
from lora_engine.training import setup as run_setup
from lora_engine.training.loop import train

NAMES = ["tensorboard", "wandb", "trackio"]


class Recorder:
    """Fake packages of all three trackers that record their calls; hooks can misbehave."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple] = []
        self.on_start = self.on_log = self.on_finish = lambda: None
        self.login = False
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        for name in ("wandb", "trackio"):
            module = ModuleType(name)
            module.init, module.Table, module.Settings = self._init, dict, dict
            module.login = lambda *, prompt, verify: not prompt and not verify and self.login
            monkeypatch.setitem(sys.modules, name, module)
        board = ModuleType("torch.utils.tensorboard")
        board.SummaryWriter = self._writer
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)

    def _init(self, **settings):
        self.calls.append(("init", settings))
        self.on_start()
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _writer(self, log_dir):
        self.calls.append(("init", {"dir": log_dir}))
        self.on_start()
        return SimpleNamespace(
            add_text=lambda tag, text, step=None: self._log({tag: text}, step),
            add_scalar=lambda tag, value, step: self._log({tag: value}, step),
            close=self._finish,
        )

    def _log(self, values, step):
        self.calls.append(("log", values, step))
        self.on_log()

    def _finish(self):
        self.calls.append(("finish",))
        self.on_finish()

    @property
    def numbers(self) -> dict[tuple, float]:
        """Every number that arrived, by its name and step."""
        return {
            (name, step): value
            for _, values, step in self.logs for name, value in values.items() if "/" in name
        }

    @property
    def logs(self) -> list[tuple]:
        return [call for call in self.calls if call[0] == "log"]


@pytest.fixture
def fake(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=8)
    write_pictures(folder, num_images=2, name="val.json")
    return folder


def record_a_run(tmp_path, name: str, *, num_lines=3) -> None:
    """Log a few lines of metrics with this tracker."""
    with (
        logging_to(ConsoleHandler()),  # as in a recipe: a tracker may fail before the run begins
        MetricsLogger(
            tmp_path / "metrics",
            total_steps=9,
            stream=io.StringIO(),
            tracker=start_tracker(name, tmp_path, {"lr": 1e-3}),
        ) as metrics,
    ):
        for step in range(num_lines):
            metrics.record("train", step=step, loss=1.0)
    assert len(json_lines(tmp_path / "metrics")) == num_lines  # whatever the tracker does


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


# --- what a tracker gets -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_gets_every_number_of_the_metrics_the_settings_and_the_samples(
    blip_folder, data, tmp_path, fake, name
):
    summary = train(settings(blip_folder, data, tmp_path / "run", track=name))
    lines = json_lines(summary.path / "metrics.jsonl")
    assert fake.numbers == {
        (f"{line['event']}/{key}", line["step"]): value
        for line in lines for key, value in line.items() if key not in ("event", "step")
    }
    assert {"train/loss", "validation/loss"} <= {key for key, _ in fake.numbers}
    assert fake.calls[0][0] == "init" and fake.calls[-1] == ("finish",)
    config = json.loads((summary.path / "config.json").read_text())
    if name == "tensorboard":
        assert fake.calls[0][1] == {"dir": str(summary.path / "tensorboard")}
        text = fake.logs[0][1]["settings"]
        assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == config
    else:
        assert json.loads(json.dumps(fake.calls[0][1]["config"])) == config
        assert fake.calls[0][1]["name"] == "run"
    samples = {step: values["samples"] for _, values, step in fake.logs if "samples" in values}
    assert samples.keys() == {0, 2, 4}
    written = json_lines(summary.path / "samples.jsonl")
    for step in samples:
        at_step = [line for line in written if line["step"] == step]
        if name != "tensorboard":
            assert samples[step]["columns"] == ["image", "reference", "before", "now"]
            assert samples[step]["data"] == [
                [Path(line["image"]).name, line["reference"], first["caption"], line["caption"]]
                for first, line in zip(written, at_step)
            ]
        else:
            assert samples[step].count("\n") == 1 + len(at_step)
            assert all(line["reference"] in samples[step] for line in at_step)


def test_scores_and_bad_steps_arrive_and_what_is_not_finite_does_not(tmp_path, fake):
    tracker = start_tracker("wandb", tmp_path, {})
    with MetricsLogger(
        tmp_path / "metrics", total_steps=9, stream=io.StringIO(), tracker=tracker
    ) as metrics:
        metrics.record("validation", step=1, epoch=0.5, loss=float("nan"), bleu_4=0.25)
        metrics.record("skipped_step", step=2, by_grad_scaler=False)
    assert fake.numbers == {
        ("validation/epoch", 1): 0.5, ("validation/bleu_4", 1): 0.25,
        ("skipped_step/by_grad_scaler", 2): False,
    }


def test_a_run_without_a_tracker_imports_none(blip_folder, data, tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    train(settings(blip_folder, data, tmp_path / "run", max_steps=1))
    assert start_tracker("none", tmp_path, {}) is None


@pytest.mark.parametrize("environment, login, mode, project", [
    ({}, False, "offline", "lora_engine"),
    ({}, True, None, "lora_engine"),
    ({"WANDB_MODE": "online", "WANDB_PROJECT": "mine"}, False, None, "mine"),
    ({"WANDB_MODE": "disabled"}, True, None, "lora_engine"),
])
def test_wandb_is_offline_without_a_key_and_respects_its_variables(
    tmp_path, fake, monkeypatch, environment, login, mode, project
):
    fake.login = login
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    record_a_run(tmp_path, "wandb")
    started = fake.calls[0][1]
    assert (started["mode"], started["project"]) == (mode, project)
    assert started["dir"] == str(tmp_path)
    assert started["settings"]["console"] == "off"
    assert 0 < started["settings"]["finish_timeout"] < trackers.CLOSE_S


# --- what a tracker cannot do ------------------------------------------------------------------


@pytest.mark.parametrize("name, package", [
    ("tensorboard", "tensorboard"), ("wandb", "wandb>=0.31"), ("trackio", "trackio>=0.43"),
])
def test_a_missing_package_is_an_error_at_the_start_that_says_what_to_install(
    tmp_path, monkeypatch, name, package
):
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(run_setup, "read_rows", lambda config: pytest.fail("read too early"))
    with pytest.raises(ValueError) as refused:
        train(settings(tmp_path, tmp_path, tmp_path / "run", track=name))
    assert str(refused.value).startswith(f"--track {name} needs the package {name} (")
    assert str(refused.value).endswith(f"pip install '{package}'")
    assert not (tmp_path / "run").exists()


def test_a_package_that_breaks_on_import_is_an_error_at_the_start_too(monkeypatch):
    def broken(name):
        raise TypeError("Descriptors cannot be\ncreated directly")

    monkeypatch.setattr(trackers, "import_module", broken)
    with pytest.raises(ValueError, match=r"\(Descriptors cannot be created directly\)"):
        check_tracker("wandb")
    check_tracker("none")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("when", ["on_start", "on_log", "on_finish"])
@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), SystemExit(1)])
def test_a_tracker_that_raises_is_turned_off_with_one_warning(
    tmp_path, fake, capsys, name, when, error
):
    def fail():
        raise error

    setattr(fake, when, fail)
    record_a_run(tmp_path, name, num_lines=20)
    reason = " ".join(str(error).split())
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == f"warning: --track {name} is off: {type(error).__name__}: {reason}"
    assert len(fake.calls) <= 1 + (20 + 1) + 1
    if when != "on_finish":
        assert ("finish",) not in fake.calls  # and nothing after the failure
        assert len(fake.logs) <= 1


def test_a_tracker_that_failed_is_not_handed_anything_more(tmp_path, fake, caplog):
    def fail():
        raise ConnectionError("no network")

    fake.on_start = fail
    tracker = start_tracker("wandb", tmp_path, {})
    tracker._thread.join()
    for step in range(3):
        tracker.record("train", {"step": step, "loss": 1.0})
    tracker.close()
    assert warnings(caplog) == ["--track wandb is off: ConnectionError: no network"]
    assert tracker._waiting.empty() and not fake.logs


@pytest.mark.parametrize("when", ["on_start", "on_log", "on_finish"])
def test_a_tracker_that_hangs_is_abandoned(tmp_path, fake, monkeypatch, capsys, when):
    """More events than the queue holds: recording never waits, closing only briefly."""
    monkeypatch.setattr(trackers, "MAX_WAITING", 5)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.05)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang():
        hangs.set()
        assert goes_on.wait(20)

    setattr(fake, when, hang)
    record_a_run(tmp_path, "trackio", num_lines=50 if when != "on_finish" else 3)
    assert hangs.is_set()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: --track trackio did not finish within 0.05 s")
    goes_on.set()


def test_a_tracker_that_is_slow_says_how_much_it_lacks(tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "MAX_WAITING", 2)
    started, goes_on = threading.Event(), threading.Event()

    def wait():
        started.set()
        assert goes_on.wait(20)

    fake.on_start = wait
    tracker = start_tracker("trackio", tmp_path, {})
    assert started.wait(20)
    for step in range(7):
        tracker.record("train", {"step": step, "loss": 1.0})
    goes_on.set()
    tracker.close()
    assert warnings(caplog) == ["--track trackio was too slow: it lacks 5 events"]
    assert sorted(step for _, step in fake.numbers) == [0, 1]


def test_a_run_whose_tracker_hangs_ends_as_without_it(
    blip_folder, data, tmp_path, fake, monkeypatch
):
    monkeypatch.setattr(trackers, "CLOSE_S", 0.05)
    goes_on = threading.Event()
    fake.on_start = lambda: goes_on.wait(20)
    with_it = train(settings(blip_folder, data, tmp_path / "with", track="wandb"))
    without = train(settings(blip_folder, data, tmp_path / "without"))
    goes_on.set()
    assert with_it.losses == without.losses


def test_the_message_names_the_packages_of_the_extras():
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    extras = setup["options.extras_require"]
    for name, (_, package, _) in trackers._SERVICES.items():
        assert package in extras[name].splitlines()
