"""Captions of validation images through a run: scores, what is kept by them, what files hold."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import json_lines, read_annotations, settings, write_pictures

from lora_engine.captioning.metrics import References
from lora_engine.lora.adapter import read_adapter
from lora_engine.report.run_record import read_run
from lora_engine.training import validation as validation_module
from lora_engine.training.loop import train
from lora_engine.training.trainer import Trainer
from lora_engine.training.validation import ValidationLoss


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten validation images; the first has three captions, the second cannot be read."""
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=12)
    write_pictures(folder, num_images=10, name="val.json")
    rows = json.loads((folder / "val.json").read_text())
    first, second = rows[0]["image"], rows[1]["image"]
    rows[1:1] = [{"image": first, "text": "a red disc on white"}, {"image": first, "text": "red"}]
    (folder / second).write_bytes(b"no image")
    (folder / "val.json").write_text(json.dumps(rows))
    return folder


def lines_of(folder: Path, event: str) -> list[dict]:
    return [line for line in json_lines(folder / "metrics.jsonl") if line["event"] == event]


def test_scores_are_those_of_the_captions_that_the_run_made(captioner_folder, data, tmp_path):
    summary = train(settings(
        captioner_folder, data, tmp_path / "run", lr=1e-2, num_samples=100, max_bad_share=0.2,
    ))
    references: dict[str, list[str]] = {}
    for row in read_annotations(data / "val.json"):
        references.setdefault(row.image, []).append(row.text)
    samples = json_lines(summary.path / "samples.jsonl")
    validations = lines_of(summary.path, "validation")
    assert [line["step"] for line in validations] == [0, 3, 6]
    for line in validations:
        shown = [sample for sample in samples if sample["step"] == line["step"]]
        expected = References([references[sample["image"]] for sample in shown]).score(
            [sample["caption"] for sample in shown]
        ).corpus
        assert (line["num_images"], line["num_references"]) == (9, 11)
        for name, value in expected.as_dict().items():
            assert line[name] == pytest.approx(value, rel=1e-6), name
    assert validations[0]["bleu_1"] != validations[2]["bleu_1"] > 0

    best = summary.best_step
    captions = json_lines(summary.path / "captions.jsonl")
    assert [line["references"] for line in captions] == [
        references[line["image"]] for line in captions
    ]
    said = {(sample["step"], sample["image"]): sample["caption"] for sample in samples}
    assert [(line["before"], line["after"]) for line in captions] == [
        (said[0, line["image"]], said[best, line["image"]]) for line in captions
    ]
    per_image = References([line["references"] for line in captions]).score(
        [line["after"] for line in captions]
    )
    assert [line["cider_d_after"] for line in captions] == pytest.approx(
        per_image.cider_d.tolist(), abs=1e-4
    )


def test_so_many_images_are_scored_as_are_asked_for(blip_folder, data, tmp_path):
    """Spread over the validation images, and no more of them shown than asked for."""
    summary = train(settings(
        blip_folder, data, tmp_path / "run", max_steps=1, num_samples=2, eval_captions=5,
        max_bad_share=0.2,
    ))
    assert lines_of(summary.path, "validation")[0]["num_images"] == 5
    rows = read_annotations(data / "val.json")
    images = list(dict.fromkeys(row.image for row in rows))
    captions = json_lines(summary.path / "captions.jsonl")
    assert [line["image"] for line in captions] == [images[i] for i in (0, 2, 4, 6, 9)]
    samples = json_lines(summary.path / "samples.jsonl")
    assert [line["image"] for line in samples] == 2 * [images[0], images[9]]


def test_without_scores_captions_are_shown_all_the_same(blip_folder, data, tmp_path):
    summary = train(settings(
        blip_folder, data, tmp_path / "run", max_steps=1, num_samples=3, eval_captions=0,
        max_bad_share=0.2,
    ))
    for line in lines_of(summary.path, "validation"):
        assert line.keys() == {"event", "step", "epoch", "loss"}
    assert len(json_lines(summary.path / "samples.jsonl")) == 6
    assert not (summary.path / "captions.jsonl").exists()
    assert "CIDEr-D" not in str(summary)


def with_bad_rows(folder: Path) -> None:
    """24 training rows, one of them bad, and 21 validation rows, one bad and two without words."""
    write_pictures(folder, num_images=23)
    write_pictures(folder, num_images=20, name="val.json")
    for name in ("train", "val"):
        rows = json.loads((folder / f"{name}.json").read_text())
        if name == "val":
            rows[4]["text"], rows[7]["text"] = "...", "\U0001f600"
        (folder / f"good_{name}.json").write_text(json.dumps(rows))
        rows.insert(5, {"text": "", "image": "images/val_00.png"})
        (folder / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "]")


def test_rows_that_cannot_be_used_are_skipped_named_and_listed(
    blip_folder, tmp_path, capsys, monkeypatch
):
    with_bad_rows(tmp_path)
    config = settings(blip_folder, tmp_path, tmp_path / "run", max_steps=3, save_every="1")
    summary = train(config)
    out, err = capsys.readouterr()
    listed = [f"{tmp_path / name}.json:7" for name in ("train", "val")]
    lines = json_lines(summary.path / "skipped.jsonl")
    assert [line["row"] for line in lines] == listed
    for line in lines:
        assert line["reason"].startswith("row 6: the caption is empty")
        assert f"skipped {line['row']}: {line['reason']}" in out
    assert f"2 rows could not be used; {summary.path / 'skipped.jsonl'} lists them" in out
    places = ", ".join(f"{tmp_path / 'val.json'}:{line}" for line in (6, 10))
    assert f"2 validation captions without words to compare, not scored: {places}\n" in err
    assert lines_of(summary.path, "validation")[0]["num_images"] == 18
    assert read_run(summary.path).skipped.keys() == set(listed)

    # The same as without the bad rows, and when it is stopped and goes on.
    good = replace(
        config, train_data_path=str(tmp_path / "good_train.json"),
        val_data_path=str(tmp_path / "good_val.json"), output_path=str(tmp_path / "good"),
    )
    again = replace(config, output_path=str(tmp_path / "again"))
    real, calls = Trainer.update, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    train(good)
    monkeypatch.setattr(Trainer, "update", step)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    train(replace(again, resume="newest"))
    for other in (good, again):
        for event in ("train", "validation"):
            assert [(line["step"], line["loss"]) for line in lines_of(summary.path, event)] == [
                (line["step"], line["loss"]) for line in lines_of(Path(other.output_path), event)
            ]
    assert json_lines(tmp_path / "again" / "skipped.jsonl") == lines


def test_validation_without_any_word_trains_and_scores_nothing(
    blip_folder, tmp_path, monkeypatch, capsys
):
    write_pictures(tmp_path, num_images=12)
    rows = json.loads(write_pictures(tmp_path, num_images=4, name="val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps([row | {"text": "..."} for row in rows]))
    config = settings(blip_folder, tmp_path, tmp_path / "run", max_steps=1)
    summary = train(config)
    assert "4 validation captions without words" in capsys.readouterr().err
    assert not summary.scores and len(summary.samples) == 2
    with pytest.raises(ValueError, match="--best_by cider_d needs captions with words .*val.json"):
        train(replace(config, output_path=str(tmp_path / "other"), best_by="cider_d"))


def scripted_scores(monkeypatch, script: list[float]) -> None:
    """Validations find these values of CIDEr-D, one after the other."""
    values = iter(script)
    real = References.score

    def score(self, *args, **kwargs):
        scores = real(self, *args, **kwargs)
        return replace(scores, corpus=replace(scores.corpus, cider_d=next(values)))

    monkeypatch.setattr(References, "score", score)


def test_the_adapter_of_the_highest_score_is_kept_if_asked_for(
    blip_folder, data, tmp_path, monkeypatch
):
    scripted_scores(monkeypatch, [0.5, 0.4, 0.9, 0.9, 0.7])
    summary = train(settings(
        blip_folder, data, tmp_path / "run", max_steps=4, eval_every=1, best_by="cider_d",
        max_bad_share=0.2,
    ))
    best = min(2, 3, key=summary.losses.__getitem__)  # of equal scores
    assert best == 3, "otherwise the first of equal scores might be chosen whatever its loss"
    assert summary.best_step == read_run(summary.path).best_step == best
    assert read_adapter(summary.path / "adapter").provenance["step"] == str(best)
    assert f"best CIDEr-D 0.9000 at step {best} of 4; before training it was 0.5000" in str(summary)
    assert f"validation loss {summary.losses[best]:.4f} at that step" in str(summary)


def test_with_one_validation_image_the_best_is_told_by_its_loss(
    blip_folder, data, tmp_path, capsys
):
    one = tmp_path / "one.json"
    row = read_annotations(data / "val.json")[-1]
    one.write_text(json.dumps([{"text": row.text, "image": row.image}]))
    summary = train(replace(
        settings(blip_folder, data, tmp_path / "run", max_steps=1, lr=1e-2, best_by="cider_d"),
        val_data_path=str(one),
    ))
    out = capsys.readouterr().out
    assert summary.best_step == 1 and "(lowest loss so far)" in out
    assert " images, 1 validation caption of 1\n" in out
    report = (summary.path / "report.html").read_text(encoding="utf-8")
    for words in (
        "is the best by validation loss", "Finished after 1 step.", ">After 1 step<",
        "1 validation image with 1 reference,", "1 caption of 1 image: ",
    ):
        assert words in report, words
    assert f"best validation loss {summary.losses[1]:.4f} at step 1 of 1; before" in str(summary)
    assert str(summary).count("CIDEr-D 0.0000 at that step") == 1
    assert "(1 image, 1 reference)" in str(summary)
    worse = replace(summary, best_step=0, losses={0: -0.0, 1: -1e-9}, num_skipped_rows=1)
    assert "The validation loss never improved on 0.0000" in str(worse) and "-0.0" not in str(worse)
    assert "\n1 row could not be used" in str(worse)


def test_an_adapter_whose_loss_is_not_finite_is_never_the_best(
    blip_folder, data, tmp_path, monkeypatch
):
    scripted_scores(monkeypatch, [0.5, 0.9, 0.7])
    losses = iter([4.0, math.nan, 3.0])
    monkeypatch.setattr(
        validation_module, "validation_loss", lambda *a, **k: ValidationLoss(next(losses), [])
    )
    summary = train(settings(
        blip_folder, data, tmp_path / "run", max_steps=2, eval_every=1, best_by="cider_d",
        max_bad_share=0.2,
    ))
    assert summary.best_step == read_run(summary.path).best_step == 2
    assert read_adapter(summary.path / "adapter").provenance["step"] == "2"


def test_a_run_that_becomes_no_better_stops_when_patience_ends(
    blip_folder, data, tmp_path, monkeypatch, capsys
):
    scripted_scores(monkeypatch, [0.1, 0.2, 0.2, 0.3, 0.1, 0.2, 0.9, 0.9])
    summary = train(settings(
        blip_folder, data, tmp_path / "run", epochs=3, eval_every=1, best_by="cider_d", patience=2,
        max_bad_share=0.2,
    ))
    assert (summary.best_step, summary.last_step) == (3, 5)
    assert "stopped: no better for 2 validations; adapter/ holds the best adapter, of step 3" in (
        capsys.readouterr().out
    )
    assert read_adapter(summary.path / "adapter").provenance["step"] == "3"
    assert read_adapter(summary.path / "adapter_last").provenance["step"] == "5"
