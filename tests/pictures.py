"""Small pictures with captions, and settings that train on them in a second."""

import dataclasses
import json
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageDraw

from lora_engine.config import TrainingConfig
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import Row

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
PLACES = ("", " above the sea", " on a table with small white flower at night", " in the city")


def caption_of(index: int) -> str:
    """Captions of many lengths; the first 24 differ."""
    colour, place = COLOURS[index % 6], PLACES[index // 6 % 4]
    return f"a {colour} circle{place}"


def write_pictures(folder: Path, *, num_images: int = 20, name: str = "train.json") -> Path:
    """Draw a captioned circle on each of `num_images` pictures -> their annotation file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_images):
        picture = Image.new("RGB", (60, 48), (10 * index % 256, 90, 40 * (index % 6)))
        ImageDraw.Draw(picture).ellipse(
            (index, index % 7, index + 30, index % 7 + 30), fill=COLOURS[index % 6]
        )
        path = Path("images") / f"{Path(name).stem}_{index:02d}.png"
        picture.save(folder / path)
        rows.append({"text": caption_of(index), "image": str(path)})
    (folder / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / name


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that says to be this large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def settings(model: Path, data: Path, run: Path, **changes) -> TrainingConfig:
    """A run of ten steps on the captioner in folder `model`."""
    config = TrainingConfig(
        model=str(model),
        train_data_path=str(data / "train.json"),
        val_data_path=str(data / "val.json"),
        output_path=str(run),
        epochs=2,
        batch_size=4,
        lr=1e-3,
        lora_dropout=0.1,
        device="cpu",
        num_workers=0,
        num_samples=2,
        log_every=1,
    )
    return dataclasses.replace(config, **changes)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_annotations(path: str | Path) -> list[Row]:
    """The rows of a file in which every row must be usable."""
    return list(read_pairs(path, max_bad_share=0.0))
