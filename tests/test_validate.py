"""validate: every row and image is read once, and each row that cannot be used has a reason."""

import json
import os
import signal
from pathlib import Path

import pytest
from pictures import write_pictures

from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.commands import validate as validate_module

OK, PROBLEMS = 0, validate_module.PROBLEMS


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path, num_images=8)
    return tmp_path


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())


def write(folder: Path, rows: list, name: str = "train.json") -> Path:
    (folder / name).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    return folder / name


def test_a_valid_set_has_no_problem(command, folder):
    status, out, err = command(verbs.run_verb, "validate", "--data", folder / "train.json")
    assert status == OK and err == ""
    assert "8 rows, 8 images" in out and "8 can be used, 0 cannot" in out
    assert "60 x 48 to 60 x 48 pixels" in out and "no row has a problem" in out
    assert "captions    3 to 6 words" in out


def test_every_bad_row_is_listed_with_line_and_reason(command, folder):
    rows = rows_of(folder)
    images = folder / "images"
    (images / "train_01.png").write_bytes(b"nothing")
    (images / "train_02.png").unlink()
    rows[3] = {"text": "", "image": "images/train_03.png"}
    rows[4] = ["not", "a row"]
    rows += [rows[0], {"text": "a copy", "image": "images/copy.png"}]
    (images / "copy.png").write_bytes((images / "train_05.png").read_bytes())
    rows += [{"text": "a\0b", "image": "images/a\0b.png"}, {"text": "x", "image": rows[1]["image"]}]
    path = write(folder, rows)
    report = folder / "found.json"
    status, out, err = command(verbs.run_verb, "validate", "--data", path, "--json", report)
    assert status == PROBLEMS
    found = json.loads(report.read_text())
    reasons = {problem["row"]: problem["reason"] for problem in found["problems"]}
    assert [(p["row"], p["line"]) for p in found["problems"]] == [
        (2, 3), (3, 4), (4, 5), (5, 6), (11, 12), (12, 13)
    ]
    assert "not an image in a known format" in reasons[2] and "no such file" in reasons[3]
    assert '"text" is empty' in reasons[4] and "expected an object" in reasons[5]
    assert "not a possible file name" in reasons[11] and reasons[12] == reasons[2]
    assert found["num_rows"] == 12 and found["num_images"] == 8
    assert found["num_usable_images"] == 5
    assert "training stops (--max_bad_share 0.05)" in out
    assert found["num_repeated_rows"] == 1 and found["num_repeated_images"] == 1
    assert f"{path}:3: row 2: " in out and "6 of 12 rows cannot be used" in out


def test_rows_that_training_would_skip_are_reported(command, folder):
    rows = [dict(row) for row in 5 * rows_of(folder)]
    rows[1], rows[3]["text"], rows[20]["text"] = {}, "...", "\U0001f600"
    path = write(folder, rows)
    status, out, err = command(verbs.run_verb, "validate", "--data", path, "--json", "found.json")
    assert status == PROBLEMS and "1 of 40 rows cannot be used; training skips them" in out
    assert f"2 captions have no words to compare:\n  {path}:5\n  {path}:22\n" in out
    assert json.loads(Path("found.json").read_text())["lines_without_words"] == [5, 22]


def test_captions_are_counted_in_the_models_tokens(command, folder, blip_folder):
    rows = rows_of(folder)
    rows[0]["text"] = "a red circle " * 40
    status, out, err = command(
        verbs.run_verb, "validate", "--data", write(folder, rows), "--model", blip_folder,
        "--max_caption_tokens", 30,
    )
    assert status == OK
    assert "tokens, median" in out and "1 above --max_caption_tokens 30" in out


def test_images_shared_with_the_validation_data_are_counted(command, folder):
    write(folder, rows_of(folder)[:3], "val.json")
    status, out, err = command(
        verbs.run_verb, "validate", "--data", folder / "train.json",
        "--val_data", folder / "val.json",
    )
    assert status == OK and "3 images of" in out and "are in --data" in out


def test_the_number_of_processes_does_not_change_the_findings(command, folder, monkeypatch):
    monkeypatch.setattr(validate_module, "_CHUNK", 1)
    (folder / "images" / "train_06.png").write_bytes(b"nothing")
    found = []
    for number in (1, 3):
        report = folder / f"found{number}.json"
        status, out, err = command(
            verbs.run_verb, "validate", "--data", folder / "train.json", "--json", report,
            "--num_workers", number,
        )
        assert status == PROBLEMS
        found.append(json.loads(report.read_text()))
    assert found[0] == found[1]


def test_a_process_that_dies_is_an_error_with_a_message(command, folder, monkeypatch):
    monkeypatch.setattr(validate_module, "_CHUNK", 1)
    main = os.getpid()

    def die(path):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(validate_module, "read_image_file", die)
    status, out, err = command(
        verbs.run_verb, "validate", "--data", folder / "train.json", "--num_workers", 2
    )
    assert status == cli.STOPPED and "a process that loads images has died" in err


def test_a_long_list_of_problems_is_truncated_with_a_note(command, folder):
    path = write(folder, [{"text": "a", "image": f"none_{i}.png"} for i in range(30)])
    status, out, err = command(verbs.run_verb, "validate", "--data", path)
    assert status == PROBLEMS and "all 30 are written by --json FILE" in out
    assert out.count("no such file") == validate_module.MAX_SHOWN


@pytest.mark.parametrize("flags, words", [
    (["--data", "none.json"], "none.json: no such file"),
    (["--data", "empty.json"], "an empty list"),
    (["--data", "empty.json", "--num_workers", "0"], "--num_workers is 0"),
    (["--data", "empty.json", "--json", "no/such/folder.json"], "there is no folder no/such"),
    (["--data", "utf16.json"], "not UTF-8"),
])
def test_bad_flags_and_files_are_errors_with_a_message(command, flags, words):
    (command.work / "empty.json").write_text("[]")
    (command.work / "utf16.json").write_bytes('[{"text": "é"}]'.encode("utf-16"))
    status, out, err = command(verbs.run_verb, "validate", *flags)
    assert status == cli.USAGE_ERROR and words in err and out == ""


def test_rows_of_the_validation_file_that_cannot_be_used_are_listed(command, folder):
    images = sorted((folder / "images").iterdir())
    val = folder / "val.json"
    val.write_text("[" + ",\n".join(json.dumps(row) for row in [
        {"text": "a dog", "image": str(images[0])}, {"text": "...", "image": str(images[1])},
        {"text": " ", "image": str(images[1])},
    ]) + "]")
    report = folder / "found.json"
    status, out, _ = command(
        verbs.run_verb, "validate", "--data", folder / "train.json", "--val_data", val,
        "--json", report,
    )
    assert status == PROBLEMS
    assert f"1 captions have no words to compare:\n  {val}:2\n" in out
    assert f"validation  1 rows cannot be used:\n  {val}:3: row 3: \"text\" is empty" in out
    found = json.loads(report.read_text())
    assert found["val_data_lines_without_words"] == [f"{val}:2"] and found["val_data_problems"]


def test_images_of_the_validation_file_are_read(command, folder):
    images = sorted((folder / "images").iterdir())
    (folder / "damaged.png").write_bytes(b"nothing")
    images[2].write_bytes(b"nothing")
    val = write(folder, [
        {"text": "a dog", "image": "gone.png"},
        {"text": "", "image": "no.png"},
        {"text": "a cat", "image": "damaged.png"},
        {"text": "a hen", "image": str(images[0])},
        {"text": "a cow", "image": str(images[2])},
    ], "val.json")
    train = write(folder, rows_of(folder)[:2])
    report = folder / "found.json"
    status, out, _ = command(
        verbs.run_verb, "validate", "--data", train, "--val_data", val, "--json", report
    )
    assert status == PROBLEMS and "no row has a problem" not in out
    assert "validation  4 rows cannot be used" in out and "2 rows, 2 images" in out
    places, reasons = zip(*(
        problem.split(": ", maxsplit=1)
        for problem in json.loads(report.read_text())["val_data_problems"]
    ))
    assert places == tuple(f"{val}:{line}" for line in (2, 3, 4, 6))
    assert reasons[0] == f"row 1: {folder / 'gone.png'}: no such file"
    assert reasons[2].startswith(f"row 3: {folder / 'damaged.png'}: not an image")
    assert reasons[3].startswith(f"row 5: {images[2]}: not an image")
