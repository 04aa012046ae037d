"""Folders of images with captions: metadata files (imagefolder) and caption files (sidecars)."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from lora_engine.data.formats import image_folder, sidecars
from lora_engine.data.image_files import find_images
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    caption_complaint,
)

OPTIONS = SourceOptions()


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


@pytest.fixture
def unlistable(monkeypatch):
    """Makes a folder refuse to be listed, also for root."""

    def refuse(folder: Path) -> None:
        scandir = os.scandir

        def checked(path="."):
            if os.fspath(path) == str(folder):
                raise PermissionError(13, "Permission denied", str(folder))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", checked)

    return refuse


# --- sidecars -------------------------------------------------------------------------------


def test_each_image_has_the_text_of_the_file_beside_it(tmp_path):
    folder = write(tmp_path, {
        "b.jpg": "", "b.txt": " two dogs \n", "a.PNG": "", "a.caption": "a cat",
        "deep/er/c.webp": "", "deep/er/c.TXT": "a house",
    })
    assert list(sidecars.read(folder, OPTIONS)) == [
        Item("a.PNG", "a.PNG", ("a cat",)),
        Item("b.jpg", "b.jpg", (" two dogs \n",)),
        Item("deep/er/c.webp", "deep/er/c.webp", ("a house",)),
    ]


def test_the_files_that_img2dataset_writes_are_read(tmp_path):
    folder = write(tmp_path, {
        f"{shard:05d}/{shard:05d}{key:04d}.{suffix}": text
        for shard in (1, 0) for key in (1, 0)
        for suffix, text in (("jpg", ""), ("txt", f"caption {shard}{key}"), ("json", "{}"))
    } | {"00000_stats.json": "{}", "00000.parquet": "PAR1"})
    items = list(sidecars.read(folder, OPTIONS))
    assert [item.captions for item in items] == [
        ("caption 00",), ("caption 01",), ("caption 10",), ("caption 11",)
    ]
    assert items[0].image == "00000/000000000.jpg"


def test_an_image_without_a_caption_file_is_an_item_without_captions(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "b.jpg": "", "b.txt": "a dog"})
    assert list(sidecars.read(folder, OPTIONS))[0] == Item("a.jpg", "a.jpg", ())


def test_a_caption_file_without_an_image_is_a_problem_but_a_readme_is_not(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "x/b.txt": "a dog", "README.txt": "about", "c.json": ""})
    problems = [item for item in sidecars.read(folder, OPTIONS) if isinstance(item, Problem)]
    assert [problem.where for problem in problems] == ["x/b.txt"]
    assert "without an image of that name" in problems[0].reason


def test_of_two_caption_files_the_asked_for_is_read(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "a.txt": "from txt", "a.caption": "from caption",
                              "b.jpg": "", "b.txt": "only txt"})

    def captions(field):
        options = SourceOptions(caption_field=field)
        return [item.captions for item in sidecars.read(folder, options)]

    assert captions(None) == captions("txt") == captions(".txt") == [("from txt",), ("only txt",)]
    assert captions("caption") == [("from caption",), ("only txt",)]
    with pytest.raises(AnnotationError, match="--caption_field is title, but"):
        captions("title")


def test_hidden_files_and_folders_are_skipped(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "._a.jpg": "", ".cache/b.jpg": "", "._a.txt": "x"})
    assert [item.where for item in sidecars.read(folder, OPTIONS)] == ["a.jpg"]


def test_bytes_that_are_not_utf8_reach_the_complaint_and_a_byte_order_mark_does_not(tmp_path):
    folder = write(tmp_path, {
        "a.jpg": "", "a.txt": b"caf\xe9", "b.jpg": "", "b.txt": b"\xef\xbb\xbfcaf\xc3\xa9",
        "c.jpg": "", "c.txt": "a dog".encode("utf-16"),
    })
    latin, marked, utf16 = sidecars.read(folder, OPTIONS)
    assert latin.captions[0] == "caf\udce9"
    assert "not valid Unicode" in caption_complaint(latin.captions[0])
    assert marked.captions == ("café",)
    assert "not valid Unicode" in caption_complaint(utf16.captions[0])


def test_a_caption_file_above_one_mebibyte_is_a_problem(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "a.txt": b"x" * (1 << 20), "b.jpg": "",
                              "b.txt": b"x" * ((1 << 20) + 1)})
    accepted, refused = sidecars.read(folder, OPTIONS)
    assert isinstance(accepted, Item)
    assert refused == Problem("b.jpg", "its caption file b.txt is larger than 1 MiB: is it a "
                              "caption?")


def test_a_caption_file_that_is_no_file_is_a_problem(tmp_path):
    folder = write(tmp_path, {"a.jpg": "", "b.jpg": ""})
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("nowhere")
    assert [item.reason for item in sidecars.read(folder, OPTIONS)] == [
        "its caption file a.txt is not a regular file",
        "its caption file b.txt cannot be read: No such file or directory",
    ]


def test_a_caption_file_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch):
    folder = write(tmp_path, {"a.jpg": "", "a.txt": "a dog"})

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    assert list(sidecars.read(folder, OPTIONS)) == [
        Problem("a.jpg", "its caption file a.txt cannot be read: Permission denied")
    ]


def test_a_folder_below_that_cannot_be_listed_is_a_problem(tmp_path, unlistable):
    folder = write(tmp_path, {"a.jpg": "", "locked/b.jpg": "", "z/c.jpg": ""})
    unlistable(tmp_path / "locked")
    items = list(sidecars.read(folder, OPTIONS))
    assert [item.where for item in items] == ["a.jpg", "locked", "z/c.jpg"]
    assert items[1].reason == "cannot list this folder: Permission denied"


def test_a_folder_that_cannot_be_listed_or_has_no_images_is_an_error(tmp_path, unlistable):
    folder = write(tmp_path, {"a.txt": "a dog"})
    with pytest.raises(AnnotationError, match=f"^{folder}: no images"):
        list(sidecars.read(folder, OPTIONS))
    with pytest.raises(AnnotationError, match="missing: cannot list this folder: No such file"):
        list(sidecars.read(folder + "/missing", OPTIONS))
    unlistable(tmp_path)
    with pytest.raises(AnnotationError, match=f"^{folder}: cannot list this folder: Permission"):
        list(sidecars.read(folder, OPTIONS))


def test_links_to_folders_are_followed_once_and_never_in_a_circle(tmp_path):
    folder = write(tmp_path / "data", {"a.jpg": "", "x/b.jpg": ""})
    write(tmp_path / "disk", {"c.jpg": ""})
    for link, target in [("disk1", tmp_path / "disk"), ("disk2", tmp_path / "disk"),
                         ("x/up", tmp_path / "data"), ("x/out", tmp_path), ("x2", "x")]:
        Path(folder, link).symlink_to(target)
    (tmp_path / "disk" / "back").symlink_to(folder)
    assert [item.where for item in sidecars.read(folder, OPTIONS)] == [
        "a.jpg", "disk1/c.jpg", "x/b.jpg"
    ]
    assert len(find_images([folder])) == 3


def test_many_pairs_are_not_held_as_objects(tmp_path):
    folder = write(tmp_path, {
        f"{shard:02d}/{key:03d}.{suffix}": "a caption" * 50
        for shard in range(20) for key in range(100) for suffix in ("jpg", "txt")
    })
    tracemalloc.start()
    num_items = sum(1 for _ in sidecars.read(folder, OPTIONS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_items == 2000
    assert peak < 250_000  # the captions alone have 900,000 bytes


# --- imagefolder ----------------------------------------------------------------------------


def test_a_metadata_file_has_the_captions_of_a_folder(tmp_path):
    lines = [{"file_name": "a.jpg", "text": "a dog"}, {"file_name": "x/b.jpg", "text": "a cat"}]
    jsonl = write(tmp_path / "jsonl", {"metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n"})
    assert list(image_folder.read(jsonl, OPTIONS)) == [
        Item("metadata.jsonl:1", "a.jpg", ["a dog"]),
        Item("metadata.jsonl:2", "x/b.jpg", ["a cat"]),
    ]
    csv = write(tmp_path / "csv", {"metadata.csv": "file_name,text\na.jpg,a dog\n"})
    (item,) = image_folder.read(csv, OPTIONS)
    assert (item.where, item.image, list(item.captions)) == ("metadata.csv:2", "a.jpg", ["a dog"])


def test_metadata_jsonl_is_preferred_to_metadata_csv(tmp_path):
    folder = write(tmp_path, {
        "metadata.csv": "file_name,text\na.jpg,csv\n",
        "metadata.jsonl": '{"file_name": "a.jpg", "text": "jsonl"}\n',
    })
    assert [item.captions for item in image_folder.read(folder, OPTIONS)] == [["jsonl"]]


def test_a_bad_line_of_the_metadata_is_a_problem_with_its_file_and_line(tmp_path):
    folder = write(tmp_path, {"metadata.jsonl": '{"file_name": "a.jpg", "text": "a dog"}\n[]\n'})
    problem = list(image_folder.read(folder, OPTIONS))[1]
    assert isinstance(problem, Problem) and problem.where == "metadata.jsonl:2"


def test_a_folder_without_metadata_is_an_error(tmp_path):
    with pytest.raises(AnnotationError, match="has neither metadata.jsonl nor metadata.csv"):
        list(image_folder.read(str(tmp_path), OPTIONS))
