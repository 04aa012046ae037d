"""validate: every row and image is read once, and each row that cannot be used has a reason."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from pictures import write_pictures
from tars import write_tar

from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.commands import validate as validate_module
from lora_engine.data.image_table import ImageTable

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
    assert [problem["location"] for problem in found["problems"]] == [
        f"{path}:{line}" for line in (3, 4, 5, 6, 12, 13)
    ]
    reasons = [problem["reason"] for problem in found["problems"]]
    assert reasons[0].startswith(f"{images / 'train_01.png'}: not an image in a known format")
    assert reasons[1] == f"{images / 'train_02.png'}: no such file" and reasons[5] == reasons[0]
    assert reasons[2].startswith("row 4: the caption is empty")
    assert reasons[3].startswith("row 5: found") and "expected an object" in reasons[3]
    assert "not a possible file name" in reasons[4]
    assert found["num_rows"] == 12 and found["num_images"] == 8
    assert found["num_usable_images"] == 5
    assert "training stops (--max_bad_share 0.05)" in out
    assert found["num_repeated_rows"] == 1 and found["num_repeated_images"] == 1
    assert f"  {path}:3: {reasons[0]}\n  {path}:4: {reasons[1]}\n" in out
    assert "6 of 12 rows cannot be used" in out


def test_rows_that_training_would_skip_are_reported(command, folder):
    rows = [dict(row) for row in 5 * rows_of(folder)]
    rows[1], rows[3]["text"], rows[20]["text"] = {}, "...", "\U0001f600"
    path = write(folder, rows)
    status, out, err = command(verbs.run_verb, "validate", "--data", path, "--json", "found.json")
    assert status == PROBLEMS and "1 of 40 rows cannot be used; training skips them" in out
    assert f"2 captions have no words to compare:\n  {path}:5\n  {path}:22\n" in out
    assert json.loads(Path("found.json").read_text())["rows_without_words"] == [
        f"{path}:5", f"{path}:22"
    ]


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

    def die(images, number):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ImageTable, "read", die)
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
    (["--data", "empty.json", "--json", "empty.json"], "--json empty.json would replace the data"),
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
    assert f"validation  1 rows cannot be used:\n  {val}:3: row 3: the caption is empty" in out
    found = json.loads(report.read_text())
    assert found["rows_without_words"] == [f"{val}:2"] and len(found["val_data_problems"]) == 1


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
    assert reasons[0] == f"{folder / 'gone.png'}: no such file"
    assert reasons[1].startswith("row 2: the caption is empty")
    assert reasons[2].startswith(f"{folder / 'damaged.png'}: not an image")
    assert reasons[3].startswith(f"{images[2]}: not an image")


def test_a_file_without_a_single_usable_row_is_listed_like_any_other(command, folder):
    path = write(folder, [{"text": "", "image": "a.png"}, 7])
    status, out, err = command(
        verbs.run_verb, "validate", "--data", path, "--json", folder / "found.json"
    )
    assert status == PROBLEMS and err == ""
    assert "2 rows, 0 images" in out and "2 of 2 rows cannot be used; training stops" in out
    found = json.loads((folder / "found.json").read_text())
    assert [problem["location"] for problem in found["problems"]] == [f"{path}:2", f"{path}:3"]


def test_tars_are_checked_like_files(command, folder):
    images = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    write_tar(folder / "0.tar", [
        ("a", {"png": images[0], "txt": b"a red circle"}),
        ("b", {"png": b"nothing", "txt": b"a circle"}),
        ("c", {"png": images[2]}),
    ])
    write_tar(folder / "1.tar", [
        (f"{number:03d}", {"png": images[number % 8], "txt": b"..."}) for number in range(50)
    ])
    report = folder / "found.json"
    status, out, err = command(
        verbs.run_verb, "validate", "--data", folder / "0.tar", folder / "1.tar", "--json", report
    )
    assert status == PROBLEMS and "2 WebDataset tars: 53 rows, 52 images" in out
    assert "2 of 53 rows cannot be used; training skips them" in out
    assert f"  {folder}/0.tar/b.png: not an image in a known format" in out  # named once
    found = json.loads(report.read_text())
    assert found["data"] == [str(folder / "0.tar"), str(folder / "1.tar")]
    assert [problem["location"] for problem in found["problems"]] == [
        f"{folder}/0.tar/c.png", f"{folder}/0.tar/b.png"
    ]
    assert found["problems"][0]["reason"] == "has no caption"
    assert found["rows_without_words"] == [f"{folder}/1.tar/{n:03d}.png" for n in range(50)]
    assert found["num_repeated_images"] == 43

    (folder / "0.tar").write_bytes(b"none" * 500)
    status, out, err = command(
        verbs.run_verb, "validate", "--data", folder / "0.tar", folder / "1.tar"
    )
    assert status == PROBLEMS and f"{folder}/0.tar: not a tar archive" in out
    assert "1 of 51 rows cannot be used; training stops" in out  # half of the files


def test_one_split_is_checked(command, folder):
    rows = [row | {"split": ["train", "val"][i % 2]} for i, row in enumerate(rows_of(folder))]
    path = write(folder, rows)
    (folder / "images" / "train_00.png").unlink()
    for split, status, words in (
        ("train", PROBLEMS, "4 rows, 4 images"), ("val", OK, "4 rows, 4 images"),
        ("validation", OK, "4 rows, 4 images"),
        ("test", cli.USAGE_ERROR, "the splits are train (4 rows), val (4 rows)"),
    ):
        found, out, err = command(verbs.run_verb, "validate", "--data", path, "--split", split)
        assert found == status and words in out + err


def test_tokens_that_the_tokenizer_does_not_know_are_counted(command, folder, blip_folder):
    rows = rows_of(folder)
    rows[0]["text"] = "a red \U0001f600"
    given = ["validate", "--data", write(folder, rows), "--json", "found.json"]
    _, out, _ = command(verbs.run_verb, *given, "--model", blip_folder)
    found = json.loads(Path("found.json").read_text())
    num_tokens = sum(int(length) * n for length, n in found["caption_lengths"].items())
    assert found["num_unknown_tokens"] == 1 and found["caption_unit"] == "tokens"
    assert f"unknown     {1 / num_tokens:.2%} of the tokens stand for characters" in out
    _, out, _ = command(verbs.run_verb, *given)
    assert "unknown" not in out


def test_heic_photographs_need_a_package(command, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    photograph = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (folder / "images" / "train_02.png").write_bytes(photograph)
    status, out, err = command(verbs.run_verb, "validate", "--data", folder / "train.json")
    assert status == PROBLEMS and "7 can be used, 1 cannot" in out
    assert "train_02.png: is HEIC; install pillow-heif" in out and "lora_engine[heic]" in out
