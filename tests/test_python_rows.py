"""Rows given from Python have the captions and pixels of the same rows in files."""

import io

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.images import ImageError, open_image
from lora_engine.data.python_rows import PythonImages, image_bytes, image_column, read
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import AnnotationError, Item, Member, Problem, SourceOptions

pytest.importorskip("pyarrow")

AUTO = SourceOptions()
PIXELS = np.random.default_rng(seed=1).integers(0, 256, (11, 13, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def assert_same_pixels(data: bytes, image: Image.Image) -> None:
    """`data` and `image` saved as a PNG decode to the same pixels."""
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(open_image(png(image))))


@pytest.mark.parametrize("kind", ["path", "PathLike", "bytes", "PIL", "array"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_each_kind_of_image_gives_the_pixels_of_its_file(tmp_path, kind, as_dict):
    picture = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    picture.save(path)
    image = {
        "path": str(path),
        "PathLike": path,
        "bytes": path.read_bytes(),
        "PIL": picture,
        "array": PIXELS,
    }[kind]
    data = [{"image": image, "caption": " a "} if as_dict else (image, " a ")]
    (item,) = read(data, AUTO)
    is_path = kind in ("path", "PathLike")
    assert item == Item(1, str(path) if is_path else Member("row 1", 0, 0), [" a "])
    assert_same_pixels(PythonImages(data, image_column(data, AUTO)).read(0), picture)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_that_png_has_keep_their_pixels(mode):
    rgba = Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]]))
    picture = rgba.convert("RGB").convert("P") if mode == "P" else rgba.convert(mode) if (
        mode != "I;16"
    ) else Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
    assert picture.mode == mode
    assert_same_pixels(image_bytes(picture), picture)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes_are_converted(mode):
    picture = Image.new(mode, (5, 4), "red" if mode != "LAB" else (50, 60, 70))
    assert_same_pixels(image_bytes(picture), picture.convert("RGB"))


def test_transparency_and_gray_arrays_are_kept():
    palette = Image.fromarray(PIXELS).convert("P")
    palette.info["transparency"] = 3
    assert_same_pixels(image_bytes(palette), palette)
    gray = PIXELS[:, ::2, 1]  # not contiguous
    assert_same_pixels(image_bytes(gray), Image.fromarray(np.ascontiguousarray(gray)))


def test_a_pil_image_is_turned_by_its_exif_and_not_changed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        data = image_bytes(picture)
        assert picture.size == (13, 11)
        assert picture.getexif()[0x0112] == 6
    turned = open_image(data)
    assert turned.size == (11, 13)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(open_image(tmp_path / "a.png")))


@pytest.mark.parametrize(
    "image, words",
    [
        (PIXELS.astype(np.float32) / 255, ["float32", "uint8"]),
        (PIXELS.transpose(2, 0, 1), ["transpose(1, 2, 0)"]),
        (PIXELS[:, :, :2], ["(11, 13, 2)", "(height, width, 3)"]),
        (np.zeros((0, 4, 3), np.uint8), ["(0, 4, 3)"]),
        (None, ["is None, expected a path"]),
        (3, ["3", "expected a path"]),
        (Image.new("F", (2, 2)), ["mode F"]),
    ],
)
def test_images_that_cannot_be_used_are_problems(image, words):
    good, problem = read([(PIXELS, "a"), (image, "b")], AUTO)
    assert isinstance(good, Item)
    assert isinstance(problem, Problem) and problem.where == 2
    assert all(word in problem.reason for word in words), problem.reason
    with pytest.raises(ValueError):
        PythonImages([(image, "b")], "").read(0)


@pytest.mark.parametrize("row, found", [
    (None, "None"), ("a.jpg", "'a.jpg'"), (3, "3"), (PIXELS, "an object of the type ndarray"),
    (("a.jpg",), "1 value"), (["a.jpg", "a", "b"], "3 values"),
])
def test_rows_that_are_not_pairs_are_problems(row, found):
    (problem,) = read([row], AUTO)
    assert problem.where == 1
    assert problem.reason.startswith(f"found {found}, expected (image, caption)")


def test_a_row_is_located_once_and_by_its_number():
    pairs = read_pairs([(PIXELS, "a"), (PIXELS, None), (PIXELS, "b")], max_bad_share=1.0)
    assert list(map(str, pairs.bad)) == [
        "row 2: the caption is missing: fill it in or remove the row"
    ]
    assert [pairs.location(row) for row in range(2)] == ["row 1", "row 3"]


def test_captions_are_one_or_several():
    data = [("a", ["x", "y"]), ("a", ("z",)), ("a", []), ("a", None), {"image": "a"}]
    several, one, empty, null, missing = read(data, AUTO)
    assert (several.captions, one.captions, null.captions) == (["x", "y"], ["z"], [None])
    assert "empty list" in empty.reason
    assert '"text"' in missing.reason


def test_the_fields_of_dictionaries_can_be_named():
    options = SourceOptions(image_field="photo", caption_field="words")
    data = [{"photo": PIXELS, "words": "a", "image": None}]
    assert list(read(data, options)) == [Item(1, Member("row 1", 0, 0), ["a"])]
    images = PythonImages(data, image_column(data, options))
    assert_same_pixels(images.read(0), Image.fromarray(PIXELS))


@pytest.mark.parametrize("data", [[], "rows.json", {"train": []}, iter([]), None, 3])
def test_data_that_are_no_rows_are_refused(data):
    with pytest.raises(AnnotationError, match="expected a list"):
        list(read(data, AUTO))


def test_a_missing_file_is_an_error_of_its_row():
    with pytest.raises(ImageError, match="no such file"):
        PythonImages([("nothing.png", "a")], "").read(0)


def test_a_dataset_gives_its_original_bytes(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(PIXELS[index:]) for index in range(5)]
    pictures[4].save(tmp_path / "a.png")
    rows = {
        "image": [{"bytes": png(picture), "path": None} for picture in pictures[:3]]
        + [None, {"bytes": None, "path": str(tmp_path / "a.png")}],
        "caption": list("abcde"),
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset = dataset.select([4, 2, 1, 3, 0])  # with an index
    path, second, third, null, last = read(dataset, AUTO)
    assert path == Item(1, str(tmp_path / "a.png"), ["e"])
    assert (second, last) == (
        Item(2, Member("row 2", 1, 0), ["c"]),
        Item(5, Member("row 5", 4, 0), ["a"]),
    )
    assert third.captions == ["b"]
    assert isinstance(null, Problem) and null.where == 4
    images = PythonImages(dataset, image_column(dataset, AUTO))
    assert [images.read(number) for number in (1, 2, 4)] == [png(pictures[i]) for i in (2, 1, 0)]
    with pytest.raises(ValueError, match="the image is missing"):
        images.read(3)
    with pytest.raises(AnnotationError, match="expected a list"):
        list(read(dataset.to_iterable_dataset(), AUTO))
