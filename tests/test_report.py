"""report.html: its content, escaping of all text, and errors for damaged runs."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lora_engine import __main__ as verbs
from lora_engine.report.page import write_report
from lora_engine.report.run_facts import headline
from lora_engine.report.run_record import RunRecord

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


def write_run(folder: Path, *, caption="a red ring", name="0.png", validations=3) -> Path:
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
         "after": caption, "cider_d_before": 0.1, "cider_d_after": score}
        for file, score in ((name, 2.5), ("gone.png", 0.25))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    (folder / "captions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in captions))
    (folder / "config.json").write_text(json.dumps({"model": caption, "epochs": 2, "lr": 0.001}))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "device": "cpu"}))
    return folder


def report(*runs: Path, out: Path) -> Page:
    write_report(runs, out)
    return Page(out)


def test_a_report_shows_the_outcome_of_a_run(tmp_path):
    page = report(write_run(tmp_path / "run"), out=tmp_path / "report.html")
    for words in (
        "The adapter of step 10 of 10 is the best by validation loss: the validation loss went "
        "from 4.000 to 2.000 nats per token",
        "CIDEr-D rose from 0.5000 to 2.500", "2 validation images with 3 references",
        "a blue box", "a red ring", "CIDEr-D 2.50", "gone.png", "no such file", "2.13",
    ):
        assert words in page.text, words
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 1 and images[0]["src"].startswith("data:image/jpeg;base64,")
    assert "not finished" not in page.text
    assert sum(tag == "polyline" for tag, _ in page.elements) >= 7


@pytest.mark.parametrize("best_by, losses, scores, sentences", [
    ("cider_d", [3.0, 2.0], [0.5, 0.4],
     "The CIDEr-D never improved on its value before training, so adapter/ holds the initial "
     "adapter. The validation loss was 3.000 nats per token then and is 2.000 at step 5."),
    ("cider_d", [3.0, 2.0, 2.2], [0.5, 0.6, 0.8],
     "The adapter of step 10 of 10 is the best by CIDEr-D: the validation loss went from 3.000 to "
     "2.200 nats per token; CIDEr-D rose from 0.5000 to 0.8000."),
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


def test_the_verb_writes_into_the_run_folder_or_to_out(command, refused, tmp_path):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    assert command(verbs.run_verb, "report", run)[:2] == (0, f"report  {run / 'report.html'}\n")
    assert command(verbs.run_verb, "report", run, other)[:2] == (0, "report  report.html\n")
    assert (command.work / "report.html").is_file()
    (command.work / "report.html").unlink()
    refused(verbs.run_verb, "report", words=["no runs to report on"])
    refused(verbs.run_verb, "report", tmp_path, words=["holds no run", "did you mean"])
    refused(verbs.run_verb, "report", tmp_path / "none", words=["no such folder"])
    refused(verbs.run_verb, "report", run, "--out", ".", words=["--out . is not a regular file"])
