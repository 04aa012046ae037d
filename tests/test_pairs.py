"""Sources -> columns of pairs: what is skipped, what is refused, and what it costs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pictures import read_annotations
from tars import write_tar

from lora_engine.data import chunks
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import AnnotationError, BadRow, Row, SourceOptions

GOOD, BAD = {"text": "a", "image": "1.jpg"}, {"text": "", "image": "1.jpg"}


def write(folder, content, name: str = "train.json") -> str:
    """Write text, or rows as a JSON list with a line for each."""
    path = folder / name
    if not isinstance(content, str):
        content = "[" + ",\n".join(map(json.dumps, content)) + "]"
    path.write_text(content, encoding="utf-8")
    return str(path)


def complaint_about(folder, content) -> str:
    """The error's message, with the file's path shortened to its name."""
    path = write(folder, content)
    with pytest.raises(AnnotationError) as caught:
        read_annotations(path)
    return str(caught.value).replace(path, "train.json")


def test_captions_are_stripped_and_images_resolved(tmp_path):
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
        "\ufeff" + json.dumps(rows, ensure_ascii=False),
    ):
        assert read_annotations(write(tmp_path, written)) == expected


def test_relative_images_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, [GOOD])
    monkeypatch.chdir(tmp_path)
    pairs = read_pairs("train.json")
    monkeypatch.chdir("/")
    assert pairs.images[0] == os.path.realpath(tmp_path / "1.jpg")
    assert pairs.location(0) == os.path.realpath(tmp_path / "train.json") + ":1"


def test_captions_of_one_image_share_its_number(tmp_path):
    """Also if another file, or another spelling of its path, names it."""
    one = write(tmp_path, [{"text": text, "image": f"{text}/../1.jpg"} for text in "abc"])
    two = write(tmp_path, [{"text": "d", "image": "2.jpg"}, GOOD], "two.json")
    pairs = read_pairs([one, two])
    assert pairs.image_of_row.tolist() == [0, 0, 0, 1, 0]
    assert [os.path.basename(image) for image in pairs.images] == ["1.jpg", "2.jpg"]


def test_files_of_the_same_name_in_two_tars_are_two_images(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a", {"jpg": name.encode(), "txt": b"a dog"})])
    images = read_pairs(tmp_path).images
    assert list(images) == [f"{tmp_path}/0.tar/a.jpg", f"{tmp_path}/1.tar/a.jpg"]
    assert [images.read(0), images.read(1)] == [b"0.tar", b"1.tar"]


def test_chunks_of_any_size_give_the_same_columns(tmp_path, monkeypatch):
    rows = [
        {"captions": ["one", " ", "two"][: 1 + i % 3], "image": f"{i % 7}.jpg",
         "split": "ab"[i % 2]}
        for i in range(40)
    ]
    rows[20:20] = [7, {}]
    path = write(tmp_path, rows)
    whole = read_pairs(path, max_bad_share=1.0)
    assert len(whole.bad) == 2 + 2 * 13 and len(whole.images) == 7
    for size in (1, 3):
        monkeypatch.setattr(chunks, "_CHUNK", size)
        pairs = read_pairs(path, max_bad_share=1.0)
        assert list(pairs) == list(whole) and pairs.bad == whole.bad
        assert [*map(pairs.location, range(len(pairs)))] == [
            *map(whole.location, range(len(whole)))
        ]
        assert pairs.source.splits == whole.source.splits == ["a", "b"]
        for name, column in whole.source.columns.items():
            assert np.array_equal(pairs.source.columns[name], column), name


# --- what cannot be used ----------------------------------------------------------------------


def test_the_first_bad_rows_are_listed_and_all_are_counted(tmp_path):
    lines = complaint_about(tmp_path, [GOOD] + [BAD] * 7).splitlines()
    assert lines[0] == "train.json: 7 of 8 rows cannot be used; the first 5:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        [f"  train.json:{line}", f"row {line}"] for line in range(2, 7)
    ]


def test_bad_rows_are_skipped_as_long_as_they_are_few(tmp_path):
    path = write(tmp_path, [GOOD, BAD, *38 * [GOOD], BAD])
    pairs = read_pairs(path, max_bad_share=0.05)
    assert list(pairs) == 39 * [Row("a", os.path.join(os.path.realpath(tmp_path), "1.jpg"))]
    assert [str(row) for row in pairs.bad] == [
        f"{path}:{line}: row {line}: the caption is empty: fill it in or remove the row"
        for line in (2, 41)
    ]
    with pytest.raises(AnnotationError, match=r"2 of 41 rows .*more than --max_bad_share 0.04:\n"):
        read_pairs(path, max_bad_share=0.04)


def test_data_without_a_single_usable_row_are_refused_unless_all_may_be_bad(tmp_path):
    path = write(tmp_path, [BAD, BAD])
    with pytest.raises(AnnotationError, match="2 of 2 rows cannot be used, more than .* 0.99:\n"):
        read_pairs(path, max_bad_share=0.99)
    pairs = read_pairs(path, max_bad_share=1.0)  # as validate reads it, to list all of them
    assert len(pairs) == len(pairs.images) == 0 and len(pairs.bad) == 2
    with pytest.raises(AnnotationError, match="1: row 1: the caption is empty"):
        read_pairs(write(tmp_path, [BAD]))


def test_one_bad_caption_of_an_image_does_not_cost_the_others(tmp_path):
    path = write(tmp_path, [{"captions": ["a", "", 3, "b"], "image": "1.jpg"}])
    pairs = read_pairs(path, max_bad_share=0.5)
    assert list(pairs.captions()) == ["a", "b"]
    assert [row.reason for row in pairs.bad] == [
        "row 1: the caption is empty: fill it in or remove the row",
        "row 1: the caption is 3, expected a string",
    ]


def test_where_captions_are_not_needed_images_without_one_are_kept(tmp_path):
    rows = [BAD, {"text": " ", "image": "2.jpg"}, {"text": 3, "image": "3.jpg"},
            {"captions": ["a", ""], "image": "4.jpg"}]
    pairs = read_pairs(write(tmp_path, rows), max_bad_share=1.0, needs_captions=False)
    assert [(row.text, os.path.basename(row.image)) for row in pairs] == [
        ("", "1.jpg"), ("", "2.jpg"), ("a", "4.jpg"), ("", "4.jpg")
    ]
    assert [row.reason for row in pairs.bad] == ["row 3: the caption is 3, expected a string"]


def test_long_values_are_shortened(tmp_path):
    long = "x" * 100_001
    for row, words in (
        ({"text": "a", "image": [long]}, "the image is [\"xxx"),
        ({"text": {"a": long}, "image": "1.jpg"}, 'the caption is {"a": "xxx'),
        (long, 'found "xxx'),
        ({"text": long, "image": "1.jpg"}, "the caption has 100,001 characters, at most 100,000"),
        ({long: "a", "image": "1.jpg"}, 'no "text" among its keys ("xxx'),
    ):
        message = complaint_about(tmp_path, [row])
        assert words in message and len(message) < 300


def test_sources_none_of_which_can_be_read_are_named(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.tar").write_bytes(b"none" * 500)
    for share in (0.05, 1.0):
        with pytest.raises(AnnotationError) as caught:
            read_pairs(tmp_path, max_bad_share=share)
        first, *lines = str(caught.value).splitlines()
        assert first == f"{tmp_path}: none of the 7 source files can be read; the first 5:"
        assert [line.split(": ")[0] for line in lines] == [
            f"  {tmp_path}/{number}.tar" for number in range(5)
        ]


def test_the_share_of_lost_sources_is_known(tmp_path):
    for name in ("0.tar", "1.tar", "2.tar"):
        write_tar(tmp_path / name, [("a", {"jpg": b"1", "txt": b"a dog"})])
    (tmp_path / "1.tar").write_bytes(b"none" * 500)
    pairs = read_pairs(f"{tmp_path}/{{0..3}}.tar", max_bad_share=1.0)
    assert pairs.unreadable_share == 0.5 and len(pairs) == 2
    assert pairs.choose("first", lambda: [0]).unreadable_share == 0.5
    assert [row.location for row in pairs.bad] == [f"{tmp_path}/{name}.tar" for name in (3, 1)]
    with pytest.raises(AnnotationError, match="more than --max_bad_share 0.4:\n"):
        read_pairs(f"{tmp_path}/{{0..3}}.tar", max_bad_share=0.4)


def test_rows_are_found_again_by_line(tmp_path):
    texts = ("a", "b", "", "c", "b")
    path = write(tmp_path, [{"text": text, "image": "1.jpg"} for text in texts])
    pairs = read_pairs(path, max_bad_share=1.0)
    chosen = pairs.choose("b", lambda: np.flatnonzero([text == "b" for text in pairs.captions()]))
    assert [chosen.location(row) for row in range(len(chosen))] == [f"{path}:2", f"{path}:5"]
    assert chosen[0] == pairs[1] and chosen[0:2] == [pairs[1], pairs[3]]


def test_problems_are_put_in_the_order_of_their_sources(tmp_path):
    paths = [write(tmp_path, 12 * [GOOD], name) for name in ("z.json", "a.json")]
    places = [f"{paths[0]}:9", f"{paths[0]}:10", f"{paths[1]}:2", f"{paths[1]}:3"]
    rows = [BadRow(place, "") for place in ("/elsewhere/b.jpg", "/elsewhere/a:1", *places)]
    found = read_pairs(paths).in_order([rows[i] for i in (5, 3, 0, 2, 1, 4)])
    assert found == rows


def test_fingerprints_depend_on_captions_and_names_but_not_on_folders(tmp_path):
    (tmp_path / "other").mkdir()
    one = read_pairs(write(tmp_path, [GOOD, {"text": "b", "image": "2.jpg"}]))
    moved = [GOOD | {"image": "x/1.jpg"}, {"text": "b", "image": "/y/2.jpg"}]
    assert one.fingerprint() == read_pairs(write(tmp_path / "other", moved)).fingerprint()
    not_text = [GOOD | {"image": "\udcff.jpg"}]  # as Python reads such a file's name
    for changed in (moved[::-1], [moved[0], moved[1] | {"text": "c"}], moved[:1], not_text):
        assert one.fingerprint() != read_pairs(write(tmp_path / "other", changed)).fingerprint()


def test_fields_and_the_folder_of_images_can_be_named(tmp_path):
    (tmp_path / "far").mkdir()
    path = write(tmp_path, [{"text": "no", "image": "no", "said": "a", "file": "1.jpg"}])
    pairs = read_pairs(path, SourceOptions(
        image_field="file", caption_field="said", image_root=str(tmp_path / "far")
    ))
    assert list(pairs) == [Row("a", f"{tmp_path}/far/1.jpg")]


def test_many_rows_take_little_memory(tmp_path):
    """A tenth of what a million may take: 600 MB above the interpreter."""
    rows = [
        {"text": f"a picture of thing number {i} in some place", "image": f"{i // 1000}/{i}.jpg"}
        for i in range(100_000)
    ]
    path = write(tmp_path, json.dumps(rows))
    program = (
        "import sys\n"
        "from lora_engine.data.read_pairs import read_pairs\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "used = lambda: int(status().split('VmHWM:')[1].split()[0])\n"
        "before = used()\n"
        "pairs = read_pairs(sys.argv[1], max_bad_share=0.0)\n"
        "print(len(pairs), (used() - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    num_rows, megabytes = map(int, done.stdout.split())
    assert num_rows == 100_000 and 10 < megabytes < 60
