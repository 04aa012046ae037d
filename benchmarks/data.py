"""How fast and how small are data sets of millions of pairs?

    python -m benchmarks.data --tokenizer Salesforce/blip-image-captioning-base
    python -m benchmarks.data --num_rows 100000 --images 50       a small one

- Headers: members of a tar like CC3M's (image, caption and JSON of each pair), indexed by one core.
- Index: a folder of such tars with 3.3 million pairs. The tars are links to a few sparse files, in
  which images take no space; the index does not read images. Bytes per row include the tokens and
  the digests of images. A further process opens the index, draws an epoch's order and reads 1,000
  rows; its memory is what it shares with nobody (anonymous pages), beyond what its imports take.
- Tokens: captions of about ten words, drawn from the tokenizer's vocabulary by Zipf's law.
- Loading: JPEGs from tars against the same as files, by one process, in turns.
- Blocks: an epoch in blocks over tars that are not in the page cache; what the disk has read,
  against the size of the tars.
"""

import argparse
import ctypes
import gc
import io
import json
import os
import platform
import random
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import (
    MODELS,
    in_fresh_process,
    interleave,
    ratios,
    spread,
    table,
    write_result,
)
from lora_engine.data.batches import (
    CaptionedImages,
    Collate,
    epoch_batches,
    load_batches,
    training_steps,
)
from lora_engine.data.captions import CaptionTokenizer, TokenizedCaptions
from lora_engine.data.formats.tar import read
from lora_engine.data.pairs import Pairs
from lora_engine.data.pixels import PixelSettings
from lora_engine.data.read_order import block_ends, read_ahead
from lora_engine.data.read_pairs import read_pairs
from lora_engine.data.rows import SourceOptions
from lora_engine.data.tokenization import tokenize
from lora_engine.demo import captioner_folder
from lora_engine.models.pretrained import load_tokenizer

PIXELS = PixelSettings((384, 384), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PAIRS_PER_SHARD = 10_000
MEMBERS_PER_PAIR = 3
NUM_FILES = 4  # the other tars are links to them
IMAGE_BYTES = (15_000, 45_000)
NUM_WORDS = (7, 16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="blip", help="whose tokenizer is used")
    parser.add_argument("--num_rows", type=int, default=3_300_000)
    parser.add_argument("--images", type=int, default=400, help="JPEGs to load")
    parser.add_argument("--tokenizer", help="checkpoint folder or Hub name; default: the demo's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="folder for the files; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="check that it runs: too few rows")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.num_rows, arguments.images, arguments.rounds = 2_000, 8, 2
    name = arguments.tokenizer or captioner_folder(arguments.model)
    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shards, cache = Path(folder, "shards"), Path(folder, "cache")
        write_shards(shards, arguments.num_rows, vocabulary(tokenizer))
        result = {
            "benchmark": "data",
            "tokenizer": Path(name).name,
            **headers(shards / "00000.tar"),
            **index(shards, cache, tokenizer, name),
            **loading(Path(folder, "loading"), arguments.images, arguments.rounds),
            **blocks(Path(folder, "blocks"), num_images=arguments.images * 20),
        }
    print(as_table(result))
    suffix = "-quick" if arguments.quick else ""
    path = write_result(f"data-{arguments.model}{suffix}", result, device=torch.device("cpu"))
    print(f"written to {path}")


# --- files ----------------------------------------------------------------------------------------


def vocabulary(tokenizer: CaptionTokenizer) -> list[str]:
    """The whole words that a tokenizer knows."""
    words = (token.lstrip("Ġ") for token in tokenizer.tokenizer.get_vocab())
    return sorted({word for word in words if word.isascii() and word.isalpha()})


class Captions:
    """Draws captions: words by Zipf's law, short ones more often, 54 characters as in CC3M."""

    def __init__(self, words: list[str]) -> None:
        self.generator = random.Random(0)
        self.words = sorted(words, key=lambda word: len(word) + self.generator.gauss(0, 2))
        self.weights = np.cumsum(1 / np.arange(1, len(words) + 1)).tolist()

    def draw(self) -> str:
        count = self.generator.randint(*NUM_WORDS)
        return " ".join(self.generator.choices(self.words, cum_weights=self.weights, k=count))


def write_shards(folder: Path, num_rows: int, words: list[str]) -> None:
    """Write tars with `num_rows` pairs: sparse files, and links to them."""
    folder.mkdir()
    captions = Captions(words)
    num_shards = -(-num_rows // PAIRS_PER_SHARD)
    for shard in range(num_shards):
        path = folder / f"{shard:05d}.tar"
        if shard < NUM_FILES:
            num_pairs = min(PAIRS_PER_SHARD, num_rows - shard * PAIRS_PER_SHARD)
            write_sparse_tar(path, (captions.draw() for _ in range(num_pairs)), captions.generator)
        else:
            os.link(folder / f"{shard % NUM_FILES:05d}.tar", path)
    time.sleep(3)  # a file that has just changed could change again without a new stamp


def write_sparse_tar(path: Path, captions: Iterator[str], generator: random.Random) -> None:
    """Write a tar like img2dataset's, with holes in place of images."""
    with open(path, "wb") as file:
        for number, caption in enumerate(captions):
            record = json.dumps({
                "caption": caption, "url": f"https://example.com/pictures/{number}.jpg",
                "key": f"{number:09d}", "status": "success", "error_message": None,
                "width": 384, "height": 256, "original_width": 1024, "original_height": 683,
                "exif": "{}", "sha256": f"{number:064x}",
            })
            sizes = {"jpg": generator.randint(*IMAGE_BYTES)}
            members = {"jpg": b"", "txt": caption.encode(), "json": record.encode()}
            for field, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{field}")
                info.size = sizes.get(field, len(data))
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.write(data)
                file.seek(-(-info.size // 512) * 512 - len(data), os.SEEK_CUR)
        file.write(bytes(1024))
        file.truncate()


# --- the index ------------------------------------------------------------------------------------


def headers(shard: Path) -> dict[str, Any]:
    """Headers per second of one core, from a shard in the page cache."""
    seconds = []
    for _ in range(4):  # the first one is the warm-up
        begin_s = time.process_time()
        num_pairs = sum(1 for _ in read(str(shard), SourceOptions()))
        seconds.append(time.process_time() - begin_s)
    return {"headers_per_s_and_core": MEMBERS_PER_PAIR * num_pairs / min(seconds[1:])}


def index(shards: Path, cache: Path, tokenizer: CaptionTokenizer, name: str) -> dict[str, Any]:
    begin_s = time.perf_counter()
    pairs = read_pairs(str(shards), index_folder=cache)
    index_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    tokens = tokens_of(pairs, tokenizer)
    tokenize_s = time.perf_counter() - begin_s
    begin_s = time.perf_counter()
    tokens_of(pairs, tokenizer)
    again_s = time.perf_counter() - begin_s
    orders = {}
    ends = block_ends(pairs.images, pairs.image_of_row)
    for order, blocks_of_order in (("random", None), ("blocks", ends)):
        begin_s = time.perf_counter()
        num_batches = sum(1 for _ in epoch_batches(
            tokens.lengths, batch_size=32, seed=0, epoch=0, block_ends=blocks_of_order
        ))
        orders[f"epoch_order_{order}_s"] = time.perf_counter() - begin_s
    index_bytes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {
        "num_rows": len(pairs),
        "num_batches": num_batches,
        "index_s": index_s,
        "index_bytes_per_row": index_bytes / len(pairs),
        "tokenize_s": tokenize_s,
        "tokenize_again_s": again_s,
        "tokens_per_caption": len(tokens.ids) / len(tokens),
        **orders,
        **in_fresh_process(
            "benchmarks.data:further_process", shards=str(shards), cache=str(cache), model=name
        ),
    }


def tokens_of(pairs: Pairs, tokenizer: CaptionTokenizer) -> TokenizedCaptions:
    return tokenize(pairs, tokenizer, fingerprint="", prompt="", max_caption_tokens=64)


def further_process(shards: str, cache: str, model: str) -> dict[str, Any]:
    """Open the index as training does, and read rows in the order of an epoch."""
    tokenizer = load_tokenizer(model)
    before = private_bytes()
    begin_s = time.perf_counter()
    pairs = read_pairs(shards, index_folder=Path(cache))
    reopen_s = time.perf_counter() - begin_s
    tokens = tokens_of(pairs, tokenizer)
    order = epoch_batches(tokens.lengths, batch_size=32, seed=0, epoch=0)
    for batch in islice(order, 32):
        for row in batch.tolist():
            assert len(tokens[row]) and pairs[row].text
    return {"reopen_s": reopen_s, "further_process_bytes": private_bytes() - before}


def private_bytes() -> int:
    """Memory of this process that is not a file's."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":  # it keeps freed memory
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


# --- images ---------------------------------------------------------------------------------------


def loading(folder: Path, num_images: int, num_rounds: int) -> dict[str, Any]:
    """Images per second from tars, and from files."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    samples = {}
    for number in range(num_images):
        small = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC).save(stream, "JPEG")
        samples[f"{number:05d}"] = stream.getvalue()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key, data in samples.items():
            (folder / f"{key}.jpg").write_bytes(data)
            (folder / f"{key}.txt").write_text("a caption")
            for name in (f"{key}.jpg", f"{key}.txt"):
                tar.add(folder / name, name)
    (folder / "files").mkdir()
    for path in folder.glob("0*.[jt]*"):
        if path.suffix != ".tar":
            path.rename(folder / "files" / path.name)
    speeds = interleave(
        {
            "files": partial(images_per_s, read_pairs(str(folder / "files"))),
            "tar": partial(images_per_s, read_pairs(str(folder / "0.tar"))),
        },
        num_rounds=num_rounds,
        show=False,
    )
    return {
        "images_per_s": {name: spread(values) for name, values in speeds.items()},
        "tar_against_files": ratios(speeds["tar"], speeds["files"]),
    }


def images_per_s(pairs: Pairs, number: int) -> float:
    lengths = np.full(len(pairs), 3)
    captions = TokenizedCaptions(np.ones(3 * len(pairs), dtype=int), lengths, np.cumsum(lengths))
    dataset = CaptionedImages(
        pairs.images, pairs.image_of_row, captions, PIXELS, seed=0, substitute=False
    )
    steps = training_steps(lengths, batch_size=8, seed=number, num_epochs=1)
    order = (batch for step in steps for batch in step.micro_batches)
    collate = Collate(image_size=PIXELS.size, prompt_length=1, pad_id=0)
    begin_s = time.perf_counter()
    num_images = sum(
        len(batch.rows) for batch in load_batches(dataset, order, collate=collate, num_workers=0)
    )
    return num_images / (time.perf_counter() - begin_s)


def blocks(folder: Path, *, num_images: int) -> dict[str, Any]:
    """What the disk reads for an epoch in blocks, against the size of the tars."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = [folder / f"{shard:05d}.tar" for shard in range(8)]
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for number in range(num_images // len(paths)):
                data = generator.bytes(int(generator.integers(*IMAGE_BYTES)))
                for field, content in (("jpg", data), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{number:09d}.{field}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    pairs = read_pairs(str(folder))
    for path in paths:
        forget(path)
    ends = block_ends(pairs.images, pairs.image_of_row)
    batches = epoch_batches(
        np.zeros(len(pairs)), batch_size=8, seed=0, epoch=0, block_ends=ends
    )
    before, image_bytes = disk_bytes(), 0
    for batch in read_ahead(
        batches, pairs.images, block_ends=ends, image_of_row=pairs.image_of_row,
        rows_to_read=lambda batch: batch.tolist(),
    ):
        for image in pairs.image_of_row[batch].tolist():
            image_bytes += len(pairs.images.read(image))
    read_bytes = disk_bytes() - before
    return {
        "block_images": len(pairs),
        "block_image_bytes": image_bytes,
        "bytes_read_against_shards": read_bytes / sum(path.stat().st_size for path in paths),
    }


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """What this process has read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("read_bytes:"))
    return int(line.split()[1])


GOALS = {  # name in the result: (what it is, goal, how to show it)
    "headers_per_s_and_core": ("headers indexed per second and core", "at least 150,000", ",.0f"),
    "index_s": ("building the index, s", "", ".1f"),
    "index_bytes_per_row": ("index, bytes per row", "at most 150", ".1f"),
    "further_process_bytes": ("memory of a further process, bytes", "at most 30,000,000", ",.0f"),
    "reopen_s": ("reopening, s", "at most 1", ".3f"),
    "tokenize_s": ("tokenizing once, s", "at most 60", ".1f"),
    "tokenize_again_s": ("tokens of a later run, s", "0", ".3f"),
    "epoch_order_random_s": ("epoch order, random, s", "at most 1", ".2f"),
    "epoch_order_blocks_s": ("epoch order, blocks, s", "at most 1", ".2f"),
    "bytes_read_against_shards": ("bytes read in blocks / size of the tars", "at most 1.05", ".3f"),
}


def as_table(result: dict[str, Any]) -> str:
    rows = [[f"{result['num_rows']:,} rows", "measured", "goal"]]
    rows += [[what, format(result[key], form), goal] for key, (what, goal, form) in GOALS.items()]
    ratio = result["tar_against_files"]["median"]
    rows.append(["images/s from tars / from files", f"{ratio:.3f}", "at least 0.95"])
    return table(rows)


if __name__ == "__main__":
    main()
