"""Images with their references, from our format and from COCO's; and what bad files get."""

import json

import pytest

from lora_engine.annotations import AnnotationError
from lora_engine.references import Referenced, read_references


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


def test_an_images_captions_come_together(tmp_path):
    path = write(tmp_path, [
        {"text": "one", "image": "p/a.jpg"}, {"text": "two", "image": "/elsewhere/b.jpg"},
        {"text": "three", "image": "p/../p/a.jpg"},
    ])
    assert read_references(path) == [
        Referenced("p/a.jpg", str(tmp_path / "p/a.jpg"), ["one", "three"]),
        Referenced("/elsewhere/b.jpg", "/elsewhere/b.jpg", ["two"]),
    ]


def test_cocos_captions_follow_their_ids(tmp_path):
    path = write(tmp_path, coco(
        [{"id": 7, "file_name": "a.jpg"}, {"id": 5, "file_name": "sub/b.jpg"}],
        [{"image_id": 5, "caption": " a cat "}, {"image_id": 7, "caption": "a dog"},
         {"image_id": 5, "caption": "cats"}],
    ))
    assert read_references(path) == [
        Referenced(7, str(tmp_path / "a.jpg"), ["a dog"]),
        Referenced(5, str(tmp_path / "sub/b.jpg"), ["a cat", "cats"]),
    ]
    elsewhere = read_references(path, image_folder=tmp_path / "images")
    assert elsewhere[1].image == str(tmp_path / "images/sub/b.jpg")


@pytest.mark.parametrize("value, message", [
    (coco(images=[]), "annotation 0 is of image_id 7, which is not among"),
    (coco(images=[], annotations=[]), "no images; each image needs"),
    (coco(annotations=[]), "1 images have no caption, first .*a.jpg"),
    (coco(annotations=[{"image_id": 7, "caption": " "}]), "the caption of annotation 0 is ' '"),
    (coco(annotations=[{"image_id": 7}]), "item 0 of \"annotations\" lacks"),
    (coco(images=[{"id": 7}]), "item 0 of \"images\" lacks 'id' or 'file_name'"),
    (coco(images=[{"id": 7, "file_name": 3}]), "has the id 7 and the file_name 3"),
    (coco(images=2 * [{"id": 7, "file_name": "a.jpg"}]), "two of \"images\" have the id 7"),
    (coco(images={}), "\"images\" is no list"),
    ({"images": []}, "an object with the keys \"images\""),
    ('{"images": ', "not JSON"),
    ([{"text": "", "image": "a.jpg"}], '"text" is empty'),
])
def test_a_file_that_cannot_be_used_is_told_with_its_name(tmp_path, value, message):
    path = write(tmp_path, value)
    with pytest.raises(AnnotationError, match=message) as error:
        read_references(path)
    assert str(path) in str(error.value)
