"""Images with their references, from our format and from COCO's; errors for bad files."""

import json

import pytest

from lora_engine.captioning.references import Referenced, read_references
from lora_engine.data.rows import AnnotationError


def write(tmp_path, value):
    path = tmp_path / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


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
    assert read_references(path) == ([
        Referenced("p/a.jpg", str(tmp_path / "p/a.jpg"), ["one", "three"]),
        Referenced("/elsewhere/b.jpg", "/elsewhere/b.jpg", ["two"]),
    ], [])


def test_coco_captions_are_matched_by_image_id(tmp_path):
    path = write(tmp_path, coco(
        [{"id": 7, "file_name": "a.jpg"}, {"id": 5, "file_name": "sub/b.jpg"}],
        [{"image_id": 5, "caption": " a cat "}, {"image_id": 7, "caption": "a dog"},
         {"image_id": 5, "caption": "cats"}],
    ))
    assert read_references(path) == ([
        Referenced(7, str(tmp_path / "a.jpg"), ["a dog"]),
        Referenced(5, str(tmp_path / "sub/b.jpg"), ["a cat", "cats"]),
    ], [])
    elsewhere, _ = read_references(path, image_folder=tmp_path / "images")
    assert elsewhere[1].image == str(tmp_path / "images/sub/b.jpg")


def test_rows_without_words_are_skipped_and_listed_by_line(tmp_path):
    rows = [
        {"text": "one", "image": "a.jpg"}, {"text": "...", "image": "a.jpg"},
        {"text": "", "image": "b.jpg"},
        {"text": "\U0001f600", "image": "c.jpg"}, 7, {"text": "two", "image": "a.jpg"},
    ]
    path = write(tmp_path, "[\n" + ",\n".join(map(json.dumps, rows)) + "]")
    images, bad = read_references(path)
    assert images == [Referenced("a.jpg", str(tmp_path / "a.jpg"), ["one", "two"])]
    assert [location for location, _ in bad] == [f"{path}:{line}" for line in (3, 4, 5, 6)]
    assert [reason for _, reason in bad][::2] == [
        'row 2: "text" has no words to compare', 'row 4: "text" has no words to compare',
    ]


def test_unusable_items_of_a_coco_file_are_skipped_and_listed(tmp_path):
    good = {"image_id": 7, "caption": "a dog"}
    path = write(tmp_path, coco(
        [{"id": 7, "file_name": "a.jpg"}, {"id": 8}, {"id": 7, "file_name": "b.jpg"},
         {"id": 9, "file_name": "c.jpg"}, {"id": [], "file_name": "d.jpg"}],
        [good, {"image_id": 7, "caption": "..."}, {"image_id": 5, "caption": "a"}, {"image_id": 7},
         {"image_id": {}, "caption": "a"}, {"image_id": 7, "caption": 3}, None],
    ))
    images, bad = read_references(path)
    assert images == [Referenced(7, str(tmp_path / "a.jpg"), ["a dog"])]
    listed = [f'{path}: item {number} of "{name}"' for name, numbers in (
        ("images", (1, 2, 4)), ("annotations", (2, 3, 4, 5, 6, 1)), ("images", (3,))
    ) for number in numbers]
    assert [location for location, _ in bad] == listed


@pytest.mark.parametrize("value, message", [
    (coco(images=[]), "item 0 of \"annotations\": has the image_id 7, which is not among"),
    (coco(images=[], annotations=[]), "no image with a caption"),
    (coco(annotations=[]), "no image with a caption.*a.jpg has no caption"),
    (coco(annotations=[{"image_id": 7, "caption": " "}]), "annotations\": has no words: \" \""),
    (coco(annotations=[{"image_id": 7}]), "item 0 of \"annotations\": lacks"),
    (coco(images=[{"id": 7}]), "item 0 of \"images\": lacks 'id' or 'file_name'"),
    (coco(images=[{"id": 7, "file_name": 3}]), "has the id 7 and the file_name 3"),
    (coco(images={}), "\"images\" is not a list"),
    ({"images": []}, "an object with the keys \"images\""),
    ('{"images": ', "not JSON"),
    ([{"text": "", "image": "a.jpg"}], '1: row 1: "text" is empty'),
    ([{"text": "...", "image": "a.jpg"}], '1: row 1: "text" has no words'),
])
def test_the_error_for_an_unusable_file_names_it(tmp_path, value, message):
    path = write(tmp_path, value)
    with pytest.raises(AnnotationError, match=message) as error:
        read_references(path)
    assert str(path) in str(error.value)
