"""Unusual images look as in a viewer, bad ones raise ImageError.

Pixels are Pillow's: of large images within one level, of all others to the bit.
"""

import errno
import io
import os
import pickle
import struct
import sys
import time
import warnings
import zlib

import fuzz_images
import numpy as np
import pytest
import torch
from fuzz_images import loads_or_refuses, mutations
from PIL import Image, ImageOps

from lora_engine.data import images
from lora_engine.data import pixels as pixels_module
from lora_engine.data.image_files import find_images
from lora_engine.data.images import MAX_PIXELS, MAX_SIDE, ImageError, open_image, read_image_file
from lora_engine.data.pixels import FAST_FROM, PixelSettings, load_pixels, normalize, to_pixels

BLIP = PixelSettings(
    resize=(384, 384),
    resample=3,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
VIT = PixelSettings(resize=(224, 224), resample=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DEIT = PixelSettings(
    resize=(256, 256),
    resample=3,
    crop=(224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def row_of(*pixels, mode: str) -> Image.Image:
    """An image one pixel high."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def palette_row(*indices: int) -> Image.Image:
    image = row_of(*indices, mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def noise(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(seed=1)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(height: int, width: int) -> Image.Image:
    """Soft shapes under fine grain."""
    shapes = np.asarray(noise(5, 7).resize((width, height), Image.Resampling.BICUBIC), np.uint8)
    return Image.fromarray(shapes // 4 * 3 + np.asarray(noise(height, width)) // 4)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any declared size, with next to no data."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3
WIDE = np.array([[0, 0x80FF, 0xFFFF]], dtype=np.uint16)  # clipped, all but 0 would be white
WIDE_PIXELS = [BLACK, (128,) * 3, WHITE]
HALF_RED = (255, 127, 127)  # red at alpha 128 on white

# name: (a file's bytes, its pixels row by row)
ODD_IMAGES = {
    "rgba": (
        encode(row_of((*RED, 255), (*RED, 128), (*RED, 0), mode="RGBA"), "PNG"),
        [RED, HALF_RED, WHITE],
    ),
    "rgba webp": (
        encode(row_of((*RED, 255), (*RED, 0), mode="RGBA"), "WEBP", lossless=True),
        [RED, WHITE],
    ),
    "gray with alpha": (encode(row_of((0, 255), (0, 0), mode="LA"), "PNG"), [BLACK, WHITE]),
    "rgb with a color key": (
        encode(row_of(RED, GREEN, mode="RGB"), "PNG", transparency=GREEN),
        [RED, WHITE],
    ),
    "gray with a color key": (
        encode(row_of(0, 7, mode="L"), "PNG", transparency=0),
        [WHITE, (7,) * 3],
    ),
    "palette": (encode(palette_row(2, 0, 1), "PNG"), [BLUE, RED, GREEN]),
    "palette with an index key": (
        encode(palette_row(2, 0, 1), "GIF", transparency=0),
        [BLUE, WHITE, GREEN],
    ),
    "palette with alphas": (
        encode(palette_row(2, 0, 1), "PNG", transparency=b"\x80\xff\x00"),
        [WHITE, HALF_RED, GREEN],
    ),
    "1 bit": (encode(row_of(0, 255, mode="1"), "PNG"), [BLACK, WHITE]),
    "cmyk": (
        encode(row_of((0, 255, 255, 0), (0, 0, 0, 255), mode="CMYK"), "TIFF"),
        [RED, BLACK],
    ),
    "16-bit gray png": (encode(Image.fromarray(WIDE), "PNG"), WIDE_PIXELS),
    "16-bit gray png with a key": (
        encode(Image.fromarray(WIDE), "PNG", transparency=0),
        [WHITE, (128,) * 3, WHITE],
    ),
    "16-bit gray tiff": (encode(Image.fromarray(WIDE), "TIFF"), WIDE_PIXELS),
    "16-bit big-endian tiff": (encode(Image.fromarray(WIDE.astype(">u2")), "TIFF"), WIDE_PIXELS),
    "16-bit pgm": (b"P5 3 1 65535\n" + WIDE.astype(">u2").tobytes(), WIDE_PIXELS),
    "12-bit pgm": (b"P5 2 1 4095\n\x00\x00\x0f\xff", [BLACK, WHITE]),
    "animated gif": (
        encode(
            palette_row(0, 0), "GIF", save_all=True, append_images=[palette_row(1, 1)], duration=50
        ),
        [RED, RED],
    ),
    "animated png": (
        encode(row_of(RED, mode="RGB"), "PNG", save_all=True,
               append_images=[row_of(BLUE, mode="RGB")]),
        [RED],
    ),
    "unreadable exif": (
        encode(row_of(RED, mode="RGB"), "PNG", exif=b"Exif\0\0II*\0"),
        [RED],
    ),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_unusual_images_have_the_pixels_that_viewers_show(name):
    data, pixels = ODD_IMAGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(data)
    assert image.mode == "RGB"
    assert np.asarray(image).reshape(-1, 3).tolist() == [list(pixel) for pixel in pixels]


# Of the image RED GREEN / BLUE WHITE; the first column is what EXIF's orientation says.
@pytest.mark.parametrize(
    "value, rows",
    [
        (1, [[RED, GREEN], [BLUE, WHITE]]),
        (2, [[GREEN, RED], [WHITE, BLUE]]),
        (3, [[WHITE, BLUE], [GREEN, RED]]),
        (4, [[BLUE, WHITE], [RED, GREEN]]),
        (5, [[RED, BLUE], [GREEN, WHITE]]),
        (6, [[BLUE, RED], [WHITE, GREEN]]),
        (7, [[WHITE, GREEN], [BLUE, RED]]),
        (8, [[GREEN, WHITE], [RED, BLUE]]),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(value, rows, format):
    stored = Image.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8))
    image = open_image(encode(stored, format, exif=orientation(value)))
    assert np.asarray(image).tolist() == np.array(rows).tolist()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_exif_orientation_turns_lossy_formats_too(format):
    stored = Image.new("RGB", (32, 64))
    assert open_image(encode(stored, format, exif=orientation(6))).size == (64, 32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_known_by_content_and_not_by_the_name(tmp_path, format):
    path = tmp_path / "image.txt"
    path.write_bytes(encode(Image.new("RGB", (8, 6), RED), format))
    assert open_image(path).size == open_image(str(path)).size == (8, 6)


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_is_closed_and_the_image_stands_alone(tmp_path, format):
    path = tmp_path / "image"
    path.write_bytes(encode(noise(8, 8), format))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = open_image(path)
    path.unlink()
    assert pickle.loads(pickle.dumps(image)).size == image.resize((8, 8)).size == (8, 8)
    assert to_pixels(image, VIT).shape == (3, 224, 224)


def write_bad_files(folder):
    whole = encode(noise(64, 64), "JPEG")
    files = {
        "empty.jpg": b"",
        "text.jpg": b"not an image at all, but long enough to be looked at",
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": encode(noise(64, 64), "PNG")[:2000],
        "truncated.webp": encode(noise(64, 64), "WEBP")[:500],
        "bomb.png": png_header(60000, 60000),
        "large.png": png_header(12000, 12000),
        "row.png": png_header(MAX_PIXELS, 1),
        "column.png": png_header(1, 2**16),
        "float.tif": encode(Image.new("F", (2, 2), 0.5), "TIFF"),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.jpg", "no such file"),
        ("text.jpg/below.jpg", "cannot be read: Not a directory"),
        ("folder.jpg", "is a folder"),
        ("pipe.jpg", "not a regular file"),
        ("nul\0.jpg", "not a possible file name"),
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "not an image in a known format"),
        ("script.eps", "not an image in a known format"),
        ("truncated.jpg", "damaged or truncated"),
        ("truncated.png", "damaged or truncated"),
        ("truncated.webp", "damaged or truncated"),
        ("bomb.png", "too large"),
        ("large.png", "too large: 12000 x 12000 is 144,000,000 pixels, the limit is 134,217,728"),
        ("row.png", "too long: 134217728 x 1 pixels, the limit of a side is 65,535"),
        ("column.png", "too long: 1 x 65536 pixels"),
        ("float.tif", "32-bit pixels"),
    ],
)
def test_a_bad_file_is_an_error_with_path_and_reason(tmp_path, name, reason):
    write_bad_files(tmp_path)
    with warnings.catch_warnings(), pytest.raises(ImageError) as caught:
        warnings.simplefilter("error")
        open_image(tmp_path / name)
    assert caught.value.path == str(tmp_path / name)
    assert caught.value.reason.startswith(reason) or reason in caught.value.reason
    assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(noise(2, 2), "PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        open_image(path)


def test_bad_bytes_are_an_error_without_a_path():
    for data in (b"", b"nothing known"):
        with pytest.raises(ImageError) as caught:
            open_image(data)
        assert caught.value.path == "<bytes>"


def test_the_pixel_limit_is_checked_before_decoding():
    data = encode(noise(10, 10), "PNG")
    assert open_image(data, max_pixels=100).size == (10, 10)
    limit = pytest.raises(ImageError, match="10 x 10 is 100 pixels, the limit is 99")
    with limit:
        open_image(data[:50], max_pixels=99)  # decoding it would say "damaged"
    with limit:
        load_pixels(data[:50], VIT, max_pixels=99)


def test_an_image_of_the_longest_side_is_good():
    data = encode(Image.new("RGB", (MAX_SIDE, 1), RED), "PNG")
    assert load_pixels(data, VIT)[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("name, owner", [
    ("load", Image.Image), ("exif_transpose", ImageOps), ("convert", Image.Image),
    ("resize", Image.Image), ("_crop", pixels_module),
])
def test_running_out_of_memory_is_an_image_error(tmp_path, monkeypatch, name, owner):
    path = tmp_path / "image.png"
    path.write_bytes(encode(palette_row(0, 1), "PNG"))

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ImageError, match="too large for the free memory") as caught:
        load_pixels(path, DEIT)
    assert caught.value.path == str(path)


def test_a_file_too_large_for_the_memory_is_an_image_error(tmp_path, monkeypatch):
    class Large(io.BytesIO):
        def read(self, size=-1):
            raise MemoryError

    monkeypatch.setattr(images, "_open_regular_file", lambda source, path: Large())
    with pytest.raises(ImageError, match="a.png: too large for the free memory"):
        read_image_file("a.png")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_running_out_of_descriptors_is_not_an_image_error(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "image.png"
    path.write_bytes(encode(palette_row(0), "PNG"))
    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError) as caught:
        load_pixels(path, VIT)
    assert caught.value.errno == number


def many_scans(size: int, num_scans: int) -> bytes:
    """A progressive JPEG with further scans that hold nothing, of 10 bytes each."""
    whole = encode(Image.new("L", (size, size), 90), "JPEG", progressive=True)
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0)
    return whole[:-2] + num_scans * scan + whole[-2:]


def test_a_jpeg_of_many_scans_is_bad_after_a_time_limit(tmp_path):
    """30,000 scans take a minute and a half; one block of Pillow's holds 6,500 of them."""
    path = tmp_path / "image.jpg"
    path.write_bytes(many_scans(4000, 30_000))
    begin_s = time.thread_time()
    with pytest.raises(ImageError, match="decoding takes more than 0.05 s") as caught:
        load_pixels(path, VIT, limit_s=0.05)
    assert caught.value.path == str(path)
    assert time.thread_time() - begin_s < 1
    assert load_pixels(many_scans(100, 30), VIT).shape == (3, 224, 224)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_give_pixels_or_an_image_error(format):
    """`python tests/fuzz_images.py SECONDS` tries more of them."""
    for data in mutations(format, seed=0, count=200):
        loads_or_refuses(data)


def test_an_image_beyond_pillows_warning_opens_without_one():
    data = encode(Image.new("1", (9500, 9500)), "TIFF", compression="group4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (9500, 9500)


def test_an_image_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "the file is empty")))
    assert (error.path, error.reason) == ("a.jpg", "the file is empty")
    assert str(error) == "a.jpg: the file is empty"


def heic(image: Image.Image, **options) -> bytes:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    return encode(image, "HEIF", quality=-1, chroma=444, **options)


def test_heic_is_decoded_within_the_limits():
    picture = Image.new("RGB", (64, 48), (200, 100, 50))
    data = heic(picture)
    opened = open_image(data)
    assert (opened.mode, opened.size) == ("RGB", (64, 48))
    error = np.abs(np.asarray(opened, int) - np.asarray(picture, int))
    assert error.max() <= 3  # the colors pass through YCbCr
    with pytest.raises(ImageError, match="too large: 64 x 48"):
        open_image(data, max_pixels=64 * 48 - 1)


def test_heic_is_turned_once():
    picture = Image.new("RGB", (64, 48), "white")
    picture.paste("black", (0, 0, 32, 48))
    opened = open_image(heic(picture, exif=orientation(6).tobytes()))
    assert opened.size == (48, 64)
    assert opened.getpixel((24, 10)) < (9, 9, 9) and opened.getpixel((24, 54)) > (246, 246, 246)


def test_damaged_heic_gives_pixels_or_an_image_error(monkeypatch):
    data = heic(noise(40, 50))
    monkeypatch.setitem(fuzz_images.FORMATS, "HEIF", [("RGB", {}), ("RGBA", {})])
    for length in (12, 40, len(data) // 2, len(data) - 9):
        with pytest.raises(ImageError):
            open_image(data[:length])
    for damaged in mutations("HEIF", seed=0, count=100):
        loads_or_refuses(damaged)


def test_heic_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "IMG_0001.HEIC"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # import raises ImportError
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        path.write_bytes(struct.pack(">I", 24) + b"ftyp" + brands + bytes(100))
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert caught.value.reason == (
            "is HEIC; install pillow-heif to read it: pip install 'lora_engine[heic]'"
        )


def test_avif_is_left_to_pillow(monkeypatch):
    data = encode(noise(8, 9), "AVIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert b"mif1" in data[:64]  # a brand that it shares with HEIC
    assert open_image(data).size == (9, 8)


def test_a_file_and_its_bytes_give_the_same_pixels(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(photo(400, 500), "JPEG", exif=orientation(8)))
    pixels = load_pixels(path, VIT)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    assert np.array_equal(pixels, load_pixels(str(path), VIT))
    assert np.array_equal(pixels, load_pixels(path.read_bytes(), VIT))
    assert np.array_equal(pixels, to_pixels(open_image(path), VIT))


@pytest.mark.parametrize("height, width", [(120, 97), (330, 250), (224, 224), (31, 640)])
@pytest.mark.parametrize("family", ["blip", "vit", "deit"])
def test_pixels_equal_those_of_transformers(family, height, width):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    settings = {"blip": BLIP, "vit": VIT, "deit": DEIT}[family]
    processor = {
        "blip": BlipImageProcessorPil(
            size=384, image_mean=list(BLIP.mean), image_std=list(BLIP.std)
        ),
        "vit": ViTImageProcessorPil(
            size=224, resample=2, image_mean=list(VIT.mean), image_std=list(VIT.std)
        ),
        "deit": DeiTImageProcessorPil(image_mean=list(DEIT.mean), image_std=list(DEIT.std)),
    }[family]
    assert_pixels_equal(noise(height, width), settings, processor)


@pytest.mark.parametrize("height, width", [(84, 70), (70, 84), (40, 40)])
@pytest.mark.parametrize("crop", [(48, 48), (31, 90), (101, 64)])  # some larger than the image
def test_shortest_edge_and_crop_equal_those_of_transformers(height, width, crop):
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

    settings = PixelSettings(resize=57, resample=2, crop=crop, mean=(0.5,) * 3, std=(0.25,) * 3)
    processor = DeiTImageProcessorPil(
        size={"shortest_edge": 57},
        crop_size={"height": crop[0], "width": crop[1]},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    assert_pixels_equal(noise(height, width), settings, processor)


def resized_by_pillow(image, height, width, resample):
    """Pillow's resize in two steps, as Pillow 13 may take the other one first."""
    return image.resize((width, image.height), resample).resize((width, height), resample)


@pytest.mark.parametrize("height, width", [(60, 500), (60, 60), (201, 60), (96, 60)])
@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("draw", [noise, photo])
def test_a_large_image_is_within_one_level_of_pillow(draw, resample, height, width):
    settings = PixelSettings((40, 30), resample, mean=VIT.mean, std=VIT.std)
    image = draw(height, width)
    plain = np.asarray(resized_by_pillow(image, 40, 30, resample)).transpose(2, 0, 1)
    differences = np.abs(to_pixels(image, settings).astype(int) - plain)
    assert differences.max() <= 1 and differences.mean() < 0.05


@pytest.mark.parametrize("crop", [(24, 24), (50, 20), (31, 64)])  # some larger than the image
def test_a_large_image_is_cropped_as_pillow_does(crop):
    settings = PixelSettings(resize=30, resample=2, crop=crop, mean=VIT.mean, std=VIT.std)
    middle = resized_by_pillow(photo(90, 111), 30, 37, 2)
    top, left = (30 - crop[0]) // 2, (37 - crop[1]) // 2
    plain = middle.crop((left, top, left + crop[1], top + crop[0]))
    pixels = to_pixels(photo(90, 111), settings)
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - np.asarray(plain).transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("resample", [2, 3])
def test_a_large_jpeg_is_turned_and_converted_before_it_shrinks(resample, mode, value):
    data = encode(photo(150, 230).convert(mode), "JPEG", exif=orientation(value))
    settings = PixelSettings((48, 48), resample, mean=VIT.mean, std=VIT.std)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert seen.size == ((230, 150) if value < 5 else (150, 230))
    plain = np.asarray(resized_by_pillow(seen, 48, 48, resample)).transpose(2, 0, 1)
    assert np.abs(load_pixels(data, settings).astype(int) - plain).max() <= 1


@pytest.mark.parametrize(
    "height, width, resample, is_fast",
    [
        (60, 45, 3, True),
        (60, 45, 2, True),
        (59, 450, 3, False),
        (600, 44, 2, False),
        (60, 45, 1, False),  # a filter that torch lacks
    ],
)
def test_only_large_images_are_resized_by_torch(monkeypatch, height, width, resample, is_fast):
    calls = []
    monkeypatch.setattr(
        pixels_module, "_shrink",
        lambda image, size, mode: calls.append(mode) or np.zeros((3, *size)),
    )
    settings = PixelSettings((40, 30), resample, mean=VIT.mean, std=VIT.std)
    image = noise(height, width)
    pixels = to_pixels(image, settings)
    assert len(calls) == is_fast and FAST_FROM == 1.5
    if not is_fast:
        plain = np.asarray(image.resize((30, 40), resample)).transpose(2, 0, 1)
        assert pixels.flags.c_contiguous and np.array_equal(pixels, plain)


def assert_pixels_equal(image, settings, processor):
    ours = to_pixels(image, settings)
    assert ours.dtype == np.uint8 and ours.shape == (3, *settings.size)
    plain = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(ours, plain["pixel_values"][0])
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    floats = normalize(torch.from_numpy(ours)[None], settings)
    assert floats.dtype == torch.float32
    torch.testing.assert_close(floats, theirs, rtol=0, atol=1e-6)


def test_normalize_does_not_change_its_input():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    before = pixels.clone()
    values = normalize(pixels, BLIP)
    assert torch.equal(pixels, before)
    assert values[0, 2, 3, 3].item() == pytest.approx((47 / 255 - BLIP.mean[2]) / BLIP.std[2])
    assert values[1, 0, 0, 0].item() == pytest.approx((48 / 255 - BLIP.mean[0]) / BLIP.std[0])


def test_to_pixels_refuses_what_open_image_would_not_give():
    with pytest.raises(ValueError, match="mode L, expected RGB"):
        to_pixels(Image.new("L", (4, 4)), VIT)
    strip = Image.new("RGB", (1_000_000, 1))
    settings = PixelSettings(resize=224, resample=2, crop=(224, 224), mean=VIT.mean, std=VIT.std)
    with pytest.raises(ImageError, match="a.png: too long and thin"):
        to_pixels(strip, settings, path="a.png")
    assert to_pixels(strip, VIT).shape == (3, 224, 224)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"resize": 224}, "shortest edge only"),
        ({"resize": (0, 224)}, "must be positive"),
        ({"resize": (1, 2**16)}, "at most 65,535"),
        ({"resize": 2**16, "crop": (224, 224)}, "at most 65,535"),
        ({"crop": (2**14, 2**14)}, "at most 134,217,728"),
        ({"resize": 224, "crop": (224, -1)}, "must be positive"),
        ({"resample": 9}, "not a Pillow filter"),
        ({"std": (0.5, 0.0, 0.5)}, "no std of 0"),
        ({"mean": (0.5,)}, "three numbers"),
    ],
)
def test_impossible_pixel_settings_are_refused(changed, message):
    values = {"resize": (224, 224), "resample": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=message):
        PixelSettings(**{**values, **changed})


def test_find_images_expands_folders_in_order(tmp_path):
    for name in ["b.JPG", "a/z.png", "a/y.webp", "notes.txt", ".hidden.jpg", ".git/c.jpg"]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    single = tmp_path / "no_extension"
    single.touch()
    photos = tmp_path / "photos"
    assert find_images([single, str(photos)]) == [
        single, photos / "a/y.webp", photos / "a/z.png", photos / "b.JPG",
    ]


def test_find_images_refuses_what_is_not_there(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="missing.jpg: no such file or folder"):
        find_images([tmp_path / "missing.jpg"])
    with pytest.raises(ValueError, match="no images in this folder"):
        find_images([tmp_path])
