"""Damaged image files of each format; as a script it tries them for SECONDS.

    PYTHONPATH=. python tests/fuzz_images.py SECONDS
"""

import io
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import count as numbers

import numpy as np
from PIL import Image

from lora_engine.data.images import ImageError
from lora_engine.data.pixels import PixelSettings, load_pixels

SETTINGS = PixelSettings(resize=12, resample=3, mean=(0.5,) * 3, std=(0.5,) * 3, crop=(8, 8))
FORMATS = {  # options with which an image is saved, and its mode
    "JPEG": [("RGB", {}), ("L", {"progressive": True}), ("CMYK", {"restart_marker_rows": 1})],
    "PNG": [("RGB", {}), ("P", {"transparency": 3}), ("I;16", {}), ("RGBA", {"dpi": (9, 9)})],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True})],
    "GIF": [("P", {"transparency": 1, "comment": b"x" * 300}), ("L", {"interlace": 1})],
    "BMP": [("RGB", {}), ("P", {}), ("1", {})],
    "TIFF": [("RGB", {"compression": "tiff_lzw"}), ("CMYK", {}), ("1", {"compression": "group4"}),
             ("L", {"compression": "jpeg"}), ("I;16", {"compression": "tiff_deflate"})],
    "AVIF": [("RGB", {"speed": 10}), ("RGBA", {"speed": 10})],
    "JPEG2000": [("RGB", {}), ("L", {"tile_size": (8, 8), "num_resolutions": 2})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {})],
}


def mutations(format: str, *, seed: int, count: int) -> Iterator[bytes]:
    """Files of small images in `format`, each damaged in some places."""
    generator = np.random.default_rng(seed)
    originals = [_encoded(format, mode, options) for mode, options in FORMATS[format]]
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        for _ in range(generator.integers(1, 5)):
            _damage(data, generator)
        yield _with_checksums(bytes(data)) if format == "PNG" else bytes(data)


def _encoded(format: str, mode: str, options: dict) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 21, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, format, **({"exif": exif} if format in ("JPEG", "PNG") else {}), **options)
    return buffer.getvalue()


def _damage(data: bytearray, generator: np.random.Generator) -> None:
    """Change a byte, a number, or a stretch of bytes; headers more often than the rest."""
    end = len(data) if generator.random() < 0.5 else min(len(data), 64)
    place, length = int(generator.integers(end)), int(generator.integers(1, 9))
    part = data[place : place + length]
    other = int(generator.integers(len(data)))
    new = [
        generator.bytes(1), generator.bytes(length), b"\xff" * length, bytes(length), b"",
        part + part, part * 50, data[other : other + 64],
    ][generator.integers(8)]
    data[place : place + (1 if len(new) == 1 else length)] = new
    if generator.random() < 0.1:
        del data[place:]
    data[:] = data or b"\0"


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are damaged but have a correct CRC."""
    new, place = data[:8], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunk = data[place + 4 : place + 8 + length]
        new += data[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += length + 12
    return new


def loads_or_refuses(data: bytes) -> bool:
    """Whether the file has pixels; raises anything but an ImageError."""
    try:
        pixels = load_pixels(data, SETTINGS)
    except ImageError as error:
        assert error.path == "<bytes>" and error.reason
        return False
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    return True


def main(seconds: float) -> None:
    found: Counter[tuple[str, bool]] = Counter()
    end_s = time.monotonic() + seconds
    slowest_s = 0.0
    for seed in numbers():
        for format in FORMATS:
            for data in mutations(format, seed=seed, count=100):
                begin_s = time.monotonic()
                found[format, loads_or_refuses(data)] += 1
                slowest_s = max(slowest_s, time.monotonic() - begin_s)
        if time.monotonic() > end_s:
            break
    print(f"{found.total():,} files, the slowest took {slowest_s:.2f} s")
    for format in FORMATS:
        print(f"{format}: {found[format, True]:,} have pixels, {found[format, False]:,} refused")


if __name__ == "__main__":
    main(float(sys.argv[1]))
