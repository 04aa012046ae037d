"""Annotation files: their rows, and errors with location, reason and fix."""

import json
import os
import subprocess
import sys

import pytest
from pictures import read_annotations

from lora_engine.data.annotations import locations_of, usable_rows
from lora_engine.data.rows import AnnotationError, Row


def write(folder, content) -> str:
    path = folder / "train.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


def complaint_about(folder, content) -> str:
    """The error's message, with the file's path shortened to its name."""
    path = write(folder, content)
    with pytest.raises(AnnotationError) as caught:
        read_annotations(path)
    return str(caught.value).replace(path, "train.json")


def test_rows_are_stripped_and_images_resolved(tmp_path):
    rows = [
        {"text": "  a dog ", "image": "images/1.jpg"},
        {"text": "ein Hündchen 😀, \"so\" [{,", "image": "/far/2.jpg", "id": [{"text": 3}]},
        {"text": "again", "image": "./images//x/../1.jpg"},
    ]
    folder = os.path.realpath(tmp_path)
    expected = [
        Row("a dog", f"{folder}/images/1.jpg"),
        Row("ein Hündchen 😀, \"so\" [{,", "/far/2.jpg"),
        Row("again", f"{folder}/images/1.jpg"),
    ]
    for written in (
        json.dumps(rows),
        json.dumps(rows, ensure_ascii=False, indent=2),
        "\r\n\t " + json.dumps(rows, separators=("\n,\t", "\r\n: ")) + "\n",
    ):
        assert read_annotations(write(tmp_path, written)) == expected
    with_mark = json.dumps(rows, ensure_ascii=False).encode("utf-8-sig")
    assert read_annotations(write(tmp_path, with_mark)) == expected


def test_relative_images_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, '[{"text": "a", "image": "1.jpg"}]')
    monkeypatch.chdir(tmp_path)
    assert read_annotations("train.json")[0].image == os.path.realpath("1.jpg")


def test_captions_of_one_image_share_its_path(tmp_path):
    path = write(tmp_path, json.dumps([{"text": c, "image": "1.jpg"} for c in "abc"]))
    assert len({id(row.image) for row in read_annotations(path)}) == 1


def test_the_first_bad_rows_are_listed_and_all_are_counted(tmp_path):
    rows = [{"text": "a", "image": "1.jpg"}] + [{"text": "", "image": "1.jpg"}] * 7
    lines = complaint_about(tmp_path, "[" + ",\n".join(map(json.dumps, rows)) + "]").splitlines()
    assert lines[0] == "train.json: 7 of 8 rows cannot be used; the first 5:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        [f"  train.json:{line}", f"row {line}"] for line in range(2, 7)
    ]


def test_bad_rows_are_skipped_as_long_as_they_are_few(tmp_path):
    good, bad = {"text": "a", "image": "1.jpg"}, {"text": "", "image": "1.jpg"}
    rows = [good, bad, *38 * [good], bad]
    path = write(tmp_path, "[" + ",\n".join(map(json.dumps, rows)) + "]")
    usable, skipped = usable_rows(path, max_bad_share=0.05)
    assert usable == 39 * [Row("a", os.path.join(os.path.realpath(tmp_path), "1.jpg"))]
    assert [str(row) for row in skipped] == [
        f'{path}:{line}: row {line}: "text" is empty: fill it in or remove the row'
        for line in (2, 41)
    ]
    with pytest.raises(AnnotationError, match=r"2 of 41 rows .*more than --max_bad_share 0.04:\n"):
        usable_rows(path, max_bad_share=0.04)
    path = write(tmp_path, json.dumps([bad, bad]))
    with pytest.raises(AnnotationError, match="2 of 2 rows cannot be used:\n"):
        usable_rows(path, max_bad_share=1.0)


def test_rows_are_found_again_by_line(tmp_path):
    rows = [{"text": text, "image": "1.jpg"} for text in ("a", "b", "", "c", "b")]
    path = write(tmp_path, "[" + ",\n".join(map(json.dumps, rows)) + "]")
    wanted = {row for row in usable_rows(path, max_bad_share=1.0)[0] if row.text == "b"}
    assert locations_of(path, wanted) == [f"{path}:2", f"{path}:5"]


def test_many_rows_take_little_memory(tmp_path):
    """A tenth of what a million may take: 600 MB above the interpreter."""
    rows = [
        {"text": f"a picture of thing number {i} in some place", "image": f"{i // 1000}/{i}.jpg"}
        for i in range(100_000)
    ]
    path = write(tmp_path, json.dumps(rows))
    program = (
        "import sys\n"
        "from lora_engine.data.annotations import usable_rows\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "used = lambda: int(status().split('VmHWM:')[1].split()[0])\n"
        "before = used()\n"
        "rows, _ = usable_rows(sys.argv[1], max_bad_share=0.0)\n"
        "print(len(rows), (used() - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    num_rows, megabytes = map(int, done.stdout.split())
    assert num_rows == 100_000 and 10 < megabytes < 60
