"""Images with their references, of every format; errors for data without any."""

import json
import os
from pathlib import Path

import pytest
from tars import write_tar

from lora_engine.captioning.references import Referenced, references_of
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import AnnotationError, BadRow, SourceOptions


def write(tmp_path, value):
    path = tmp_path / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(path, *, image_root=None) -> tuple[list[Referenced], list[BadRow]]:
    """The images and bad rows of a source, as `evaluate` reads it."""
    options = SourceOptions(image_root=None if image_root is None else str(image_root))
    pairs = read_pairs(path, options, max_bad_share=1.0, needs_captions=False)
    images, table, bad = references_of(pairs, str(path), os.path.dirname(path))
    assert [image.image for image in images] == list(table)
    return images, list(bad)


def coco(images=None, annotations=None):
    return {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg"}] if images is None else images,
        "annotations": (
            [{"id": 1, "image_id": 7, "caption": "a dog"}] if annotations is None else annotations
        ),
    }


def test_captions_are_grouped_by_image(tmp_path):
    path = write(tmp_path, [
        {"text": "one", "image": "p/a.jpg"}, {"text": "two", "image": "/elsewhere/b.jpg"},
        {"text": "three", "image": "p/../p/a.jpg"},
    ])
    assert read(path) == ([
        Referenced("p/a.jpg", str(tmp_path / "p/a.jpg"), ["one", "three"]),
        Referenced("/elsewhere/b.jpg", "/elsewhere/b.jpg", ["two"]),
    ], [])


def test_coco_captions_are_matched_by_image_id(tmp_path):
    path = write(tmp_path, coco(
        [{"id": 7, "file_name": "a.jpg"}, {"id": "5", "file_name": "sub/b.jpg"}],
        [{"image_id": "5", "caption": " a cat "}, {"image_id": 7, "caption": "a dog"},
         {"image_id": "5", "caption": "cats"}],
    ))
    assert read(path) == ([
        Referenced(7, str(tmp_path / "a.jpg"), ["a dog"]),
        Referenced("5", str(tmp_path / "sub/b.jpg"), ["a cat", "cats"]),
    ], [])
    (tmp_path / "images").mkdir()
    elsewhere, _ = read(path, image_root=tmp_path / "images")
    assert elsewhere[1] == Referenced("5", str(tmp_path / "images/sub/b.jpg"), ["a cat", "cats"])


def test_images_of_tars_are_identified_by_their_names(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, [
        ("a", {"jpg": b"1", "txt": b"a dog"}),
        ("b", {"jpg": b"2"}),
        ("c", {"jpg": b"3", "txt": b"..."}),
        ("d", {"txt": b"a cat", "jpg": b"4"}),
    ])
    images, bad = read(path)
    assert images == [
        Referenced("0.tar/a.jpg", f"{path}/a.jpg", ["a dog"]),
        Referenced("0.tar/d.jpg", f"{path}/d.jpg", ["a cat"]),
    ]
    assert bad == [
        BadRow(f"{path}/b.jpg", "has no caption"),
        BadRow(f"{path}/c.jpg", "has no words to compare: '...'"),
    ]


def test_rows_without_words_are_skipped_and_listed_by_line(tmp_path):
    rows = [
        {"text": "one", "image": "a.jpg"}, {"text": "...", "image": "a.jpg"},
        {"text": "", "image": "b.jpg"},
        {"text": "\U0001f600", "image": "c.jpg"}, 7, {"text": "two", "image": "a.jpg"},
    ]
    path = write(tmp_path, "[\n" + ",\n".join(map(json.dumps, rows)) + "]")
    images, bad = read(path)
    assert images == [Referenced("a.jpg", str(tmp_path / "a.jpg"), ["one", "two"])]
    assert [location for location, _ in bad] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    assert [reason for _, reason in bad][:3] == [
        "has no words to compare: '...'", "has no caption",
        "has no words to compare: '\U0001f600'",
    ]
    assert bad[3].reason.startswith("row 5: found 7, expected an object")


def test_rows_of_several_sources_are_listed_in_their_order(tmp_path):
    paths = [str(tmp_path / name) for name in ("z.json", "a.json")]
    rows = [{"text": "one", "image": "a.jpg"}, {"text": "...", "image": "a.jpg"}, 7]
    for path in paths:
        Path(path).write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    pairs = read_pairs(paths, max_bad_share=1.0, needs_captions=False)
    _, _, bad = references_of(pairs, "name", str(tmp_path))
    assert [row.location for row in bad] == [f"{path}:{line}" for path in paths for line in (2, 3)]


def test_unusable_items_of_a_coco_file_are_skipped_and_listed(tmp_path):
    good = {"image_id": 7, "caption": "a dog"}
    path = write(tmp_path, coco(
        [{"id": 7, "file_name": "a.jpg"}, {"id": 8}, {"id": 7, "file_name": "b.jpg"},
         {"id": 9, "file_name": "c.jpg"}, {"id": [], "file_name": "d.jpg"}],
        [good, {"image_id": 7, "caption": "..."}, {"image_id": 5, "caption": "a"}, {"image_id": 7},
         {"image_id": {}, "caption": "a"}, {"image_id": 7, "caption": 3}, None],
    ))
    images, bad = read(path)
    assert images == [Referenced(7, str(tmp_path / "a.jpg"), ["a dog"])]
    assert [location for location, _ in bad] == [
        *(f'{path}: item {number} of "images"' for number in (1, 2, 4)),
        *(f'{path}: item {number} of "annotations"' for number in (2, 3, 4, 6)),
        f'{path}: item 0 of "images"',
        str(tmp_path / "a.jpg"), str(tmp_path / "c.jpg"),
    ]
    assert [reason for _, reason in bad][-3:] == [
        "the caption is 3, expected a string", "has no words to compare: '...'", "has no caption"
    ]


@pytest.mark.parametrize("value, message", [
    (coco(images=[]), '"images" is an empty list'),
    (coco([{"id": 8, "file_name": "a.jpg"}]), "no image with a caption.*has the image_id 7"),
    (coco(annotations=[]), "no image with a caption.*a.jpg: has no caption"),
    (coco(annotations=[{"image_id": 7, "caption": " "}]), "a.jpg: has no caption"),
    (coco(annotations=[{"image_id": 7}]), 'none of "annotations" has a "caption"'),
    (coco(images=[{"id": 7}]), "item 0 of \"images\": lacks 'id' or 'file_name'"),
    (coco(images=[{"id": 7, "file_name": 3}]), "the image is 3, expected the path"),
    (coco(images={}), "\"images\" is not a list"),
    ({"images": []}, 'an object with the keys "images"'),
    ('{"images": ', "not JSON"),
    ([{"text": "", "image": "a.jpg"}], "data.json:1: has no caption"),
    ([{"text": 5, "image": "a.jpg"}], "data.json:1: row 1: the caption is 5"),
    ([{"text": "...", "image": "a.jpg"}], "data.json:1: has no words to compare"),
])
def test_the_error_for_an_unusable_file_names_it(tmp_path, value, message):
    path = write(tmp_path, value)
    with pytest.raises(AnnotationError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
