"""report.html: its content, escaping of all text, and errors for damaged runs."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pictures import settings
from PIL import Image

from lora_engine import __main__ as verbs
from lora_engine.report import live
from lora_engine.report.gallery import thumbnail
from lora_engine.report.line_chart import _ticks
from lora_engine.report.live import LiveReport
from lora_engine.report.loss_curve import draw_loss_curve
from lora_engine.report.page import write_report
from lora_engine.report.run_facts import figure, headline
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.run_record import RunRecord
from lora_engine.training.loop import train

HOSTILE = '<script>alert("1")</script>&"\'><img src=x onerror=alert(2)>'
FOREIGN = {"script", "iframe", "object", "form", "a", "base"}


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def write_run(
    folder: Path, *, caption="a red ring", name="0.png", validations=3, config=None, **environment
) -> Path:
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "0.png")
    metrics = [
        {"event": "validation", "step": 5 * i, "epoch": float(i), "loss": 4.0 - i,
         "cider_d": 0.5 + i, "num_images": 2, "num_references": 3}
        for i in range(validations)
    ]
    metrics.insert(1, {
        "event": "train", "step": 3, "epoch": 0.6, "loss": 3.5, "learning_rate": 1e-3,
        "grad_norm": 1.0, "images_per_s": 12.0, "data_wait_share": 0.1,
    })
    captions = [
        {"image": str(folder / file), "references": ["a ring", caption], "before": "a blue box",
         "after": caption, "cider_d_before": 1.0, "cider_d_after": score}
        for file, score in ((name, 2.5), ("gone.png", 0.25))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    (folder / "captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in captions))
    config = {"model": caption, "epochs": 2, "lr": 0.001} | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"torch": "2.13", "device": "cpu"} | environment
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def report(*runs: Path, out: Path, **options) -> Page:
    write_report(runs, out, **options)
    return Page(out)


def reloads(page: Page) -> list[str | None]:
    """The seconds after which the page reloads itself."""
    return [a["content"] for tag, a in page.elements if a.get("http-equiv") == "refresh"]


def test_a_report_shows_the_outcome_of_a_run(tmp_path):
    page = report(write_run(tmp_path / "run"), out=tmp_path / "report.html")
    for words in (
        "The adapter of step 10 of 10 is the best by validation loss: the validation loss went "
        "from 4.000 to 2.000 nats per token",
        "CIDEr-D rose from 0.5000 to 2.500", "2 validation images with 3 references",
        "a blue box", "a red ring", "CIDEr-D 2.500", "gone.png", "no such file", "2.13",
    ):
        assert words in page.text, words
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 1 and images[0]["src"].startswith("data:image/jpeg;base64,")
    assert "Finished after 10 steps." in page.text and not reloads(page)
    order = ["Most improved", "0.png", "Most worsened", "gone.png", "Scores", "Curves"]
    assert sorted(order, key=page.text.index) == order
    assert page.text.count("epoch") >= 5 and page.text.count("step") >= 5  # names of axes
    assert sum(tag == "polyline" for tag, _ in page.elements) >= 7


def test_a_report_shows_the_moving_average_beside_the_adapter(tmp_path):
    run = write_run(tmp_path / "run")
    plain = report(run, out=tmp_path / "report.html")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "validation":
            line |= {"ema_loss": abs(line["step"] - 5) + 0.123, "ema_cider_d": 9.875}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run, out=tmp_path / "report.html")
    for words in ("Moving average, step 5", "0.1230", "9.875", "validation of the moving average"):
        assert words in page.text and words not in plain.text
    assert "ema_" not in page.text
    num_lines, num_before = (
        sum(tag == "polyline" for tag, _ in one.elements) for one in (page, plain)
    )
    assert num_lines == num_before + 3  # the loss in two sizes, and the score
    draw_loss_curve(run / "metrics.jsonl", tmp_path / "curve.png")


def test_words_that_training_has_changed_are_marked(tmp_path):
    run = write_run(tmp_path / "run", caption="a big red box & ring")
    report(run, out=tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    assert 'dir="auto">a <mark class="old">blue</mark> box</dd>' in source
    assert (
        'dir="auto">a <mark class="new">big red</mark> box <mark class="new">&amp; ring</mark></dd>'
    ) in source


def test_figures_have_four_significant_digits():
    shown = {
        5.242e-18: "0.000", -1e-9: "0.000", 0.0: "0.000", 0.00038461: "0.0003846",
        0.0662: "0.06620", 9.568799: "9.569", 1.0: "1.000", 999.96: "1,000",
        12345.6: "12,350", 1e20: "1.000e+20",
    }
    assert {value: figure(value) for value in shown} == shown


@pytest.mark.parametrize("low, high", [
    (0.05, 8.6), (0.0, 1.0), (0.965, 1.0), (2.1, 2.4), (-3.0, 3.0), (0.0, 0.0051), (10.0, 999.0),
])
def test_an_axis_has_several_round_ticks(low, high):
    labels = [label for _, label in _ticks(low, high, count=7)]
    assert 3 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    assert all(low - 1e-9 <= float(label) <= high + 1e-9 for label in labels)


@pytest.mark.parametrize("best_by, losses, scores, sentences", [
    ("cider_d", [3.0, 2.0], [0.5, 0.4],
     "The CIDEr-D never improved on its value before training, so adapter/ holds the initial "
     "adapter. The validation loss was 3.000 nats per token then and is 2.000 at step 5."),
    ("cider_d", [3.0, 2.0, 2.2], [0.5, 0.6, 0.8],
     "The adapter of step 10 of 10 is the best by CIDEr-D: the validation loss went from 3.000 to "
     "2.200 nats per token; CIDEr-D rose from 0.5000 to 0.8000."),
    ("cider_d", [3.0, 2.0], [0.0, 0.0],
     "The adapter of step 5 of 5 is the best by validation loss: the validation loss went from "
     "3.000 to 2.000 nats per token; CIDEr-D stayed at 0.000."),
    ("loss", [3.0, 2.0, 2.2], [0.5, 0.6, 0.8],
     "The adapter of step 5 of 10 is the best by validation loss: the validation loss went from "
     "3.000 to 2.000 nats per token; CIDEr-D rose from 0.5000 to 0.6000."),
    ("loss", [2.0, 3.0], [0.5, 0.6],
     "The validation loss never improved on its value before training, so adapter/ holds the "
     "initial adapter. The validation loss was 2.000 nats per token then and is 3.000 at step 5."),
    ("cider_d", [2.0, 3.0], [None, None],
     "The validation loss never improved on its value before training, so adapter/ holds the "
     "initial adapter. The validation loss was 2.000 nats per token then and is 3.000 at step 5."),
])
def test_the_headline_tells_by_what_the_adapter_was_selected(best_by, losses, scores, sentences):
    metrics = [
        {"event": "validation", "step": 5 * i, "epoch": float(i), "loss": loss, "cider_d": score}
        for i, (loss, score) in enumerate(zip(losses, scores))
    ]
    config = {"best_by": best_by, "epochs": len(losses) - 1}
    assert headline(RunRecord(Path("run"), config, {}, metrics, (), {})) == sentences


def test_text_of_a_data_set_never_becomes_markup(tmp_path):
    run = write_run(tmp_path / HOSTILE.replace("/", "_"), caption=HOSTILE, name=HOSTILE)
    page = report(run, out=tmp_path / "report.html")
    assert HOSTILE in page.text
    for tag, attributes in page.elements:
        assert tag not in FOREIGN
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http" not in (tmp_path / "report.html").read_text().replace("http-equiv", "")


def test_several_runs_are_compared_side_by_side(tmp_path):
    runs = write_run(tmp_path / "one"), write_run(tmp_path / "two", caption="a green ring")
    page = report(*runs, out=tmp_path / "both.html")
    for words in ("2 runs compared", "one", "two", "a red ring"):
        assert words in page.text
    with pytest.raises(ValueError, match="is given twice"):
        write_report([runs[0], runs[0]], tmp_path / "report.html")


def test_losses_of_different_tokenizers_are_not_ranked(tmp_path):
    runs = [
        write_run(tmp_path / f"{i}", validations=3 - i, tokenizer_fingerprint=words)
        for i, words in enumerate("aab")
    ]
    out = tmp_path / "report.html"
    for others, is_ranked in ((runs[:2], True), ([runs[0], runs[2]], False)):
        page = report(*others, out=out)
        assert ("<strong>2.000</strong>" in out.read_text()) == is_ranked
        assert ("not ranked by loss" in page.text) != is_ranked
    for run, model in zip(runs, ("one", "one", "other")):  # of an earlier version
        (run / "environment.json").write_text("{}")
        (run / "config.json").write_text(json.dumps({"model": model}))
    assert "not ranked by loss" not in report(*runs[:2], out=out).text
    assert "not ranked by loss" in report(*runs, out=out).text


@pytest.mark.parametrize("status, config, environment, is_running", [
    ("Running, step 5 of 40.", {}, {"total_steps": 40}, True),
    ("This run is not finished: it stopped at step 5 of 40 (SIGTERM).", {},
     {"total_steps": 40, "stopped": "SIGTERM"}, False),
    ("Stopped early, at step 5 of 40: no better for 3 validations (--patience).",
     {"patience": 3}, {"total_steps": 40, "total_s": 2.0}, False),
    ("Finished after 5 steps.", {}, {"total_steps": 5, "total_s": 2.0}, False),
])
def test_a_report_tells_whether_the_run_is_running(
    tmp_path, status, config, environment, is_running
):
    run = write_run(tmp_path / "run", validations=2, config=config, **environment)
    running = [run] if is_running else []
    page = report(run, out=run / "report.html", running=running, reload_s=30)
    assert status in page.text
    assert reloads(page) == (["30"] if is_running else [])
    assert ("is the best so far by" in page.text) == is_running
    other = write_run(tmp_path / "other")
    assert not reloads(report(run, other, out=tmp_path / "both.html", running=running))


def test_a_run_writes_its_report_at_each_validation(blip_folder, tmp_path, monkeypatch):
    """It reads each image once, however often the report is written."""
    pages, encoded, real = [], [], LiveReport.update

    def update(self):
        real(self)
        pages.append(Page(self.folder.report))

    def encode(path, read):
        encoded.append(path)
        return thumbnail(path, read)

    monkeypatch.setattr(live, "thumbnail", encode)
    monkeypatch.setattr(live, "MAX_SHARE", 1e9)
    monkeypatch.setattr(LiveReport, "update", update)
    pictures = [Image.new("RGB", (40, 30), (40 * n, 0, 0)) for n in range(6)]
    config = settings(
        blip_folder, tmp_path, tmp_path / "run", train_data_path=None, val_data_path=None,
        epochs=3, max_steps=5, eval_every=2,
    )
    train(config, data=[(picture, "a ring") for picture in pictures], val_data=[
        (pictures[0], "a red ring"), (pictures[1], "a box")
    ])
    for step, page in zip((0, 2, 4), pages, strict=True):
        assert f"Running, step {step} of 5." in page.text and reloads(page) == ["10"]
    page = Page(tmp_path / "run" / "report.html")
    assert "Finished after 5 steps." in page.text and not reloads(page)
    assert "Default of TrainingConfig, if different" in page.text
    assert len(encoded) == len(set(encoded)) == 2
    assert sum(tag == "img" for tag, _ in page.elements) == 2  # though they have no files


def test_a_live_report_takes_a_small_share_of_the_time_and_fails_quietly(
    tmp_path, monkeypatch, caplog
):
    written, now = [], [0.0]

    def write(*args, **options):
        written.append(now[0])
        now[0] += 1.0
        if len(written) > 1:
            raise OSError("No space left on device")

    monkeypatch.setattr(live, "write_report", write)
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    folder = RunFolder(tmp_path)
    live_report = LiveReport(folder, read=lambda name: b"")
    for now[0] in (0.0, 40.0, 60.0, 90.0, 120.0):
        live_report.update()
    assert written == [0.0, 60.0, 120.0]  # 1 s of 50 s at most
    assert caplog.text.count("No space left on device") == 1
    folder.is_writer = False
    now[0] = 1000.0
    live_report.update()
    assert len(written) == 3


def test_an_unfinished_run_says_so(tmp_path):
    run = write_run(tmp_path / "run", validations=1)
    (run / "config.json").unlink()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "train", "st')
    page = report(run, out=run / "report.html")
    assert "This run is not finished: its record ends at step 3" in page.text
    assert "The run folder has no config.json" in page.text


def test_the_error_for_a_damaged_run_names_file_and_line(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "oops", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON line"):
        write_report([run], run / "report.html")
    assert not (run / "report.html").exists()


def test_the_verb_writes_into_the_run_folder_or_to_out(command, refused, tmp_path, monkeypatch):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    assert command(verbs.run_verb, "report", run)[:2] == (0, f"report  {run / 'report.html'}\n")
    assert command(verbs.run_verb, "report", run, other)[:2] == (0, "report  report.html\n")
    assert (command.work / "report.html").is_file()
    (command.work / "report.html").unlink()
    os.mkfifo(other / ".lock")  # a lock that nobody holds, and that cannot be waited for
    assert command(verbs.run_verb, "report", other)[0] == 0
    monkeypatch.setattr(RunFolder, "is_running", lambda path: path == str(run))
    assert command(verbs.run_verb, "report", run)[0] == 0
    assert "Running, step 10 of 10." in Page(run / "report.html").text
    refused(verbs.run_verb, "report", words=["no runs to report on"])
    refused(verbs.run_verb, "report", tmp_path, words=["holds no run", "did you mean"])
    refused(verbs.run_verb, "report", tmp_path / "none", words=["no such folder"])
    refused(verbs.run_verb, "report", run, "--out", ".", words=["--out . is not a regular file"])
