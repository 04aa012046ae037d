"""Number formats of kept features: their effect on loss, bytes and time.

    python -m benchmarks.features --model blip
    python -m benchmarks.features --model vit_gpt2 --cache_dir /a/disk/of/this/machine

The loss is that of the demo's captioner on validation scenes, in fp32 except for the features,
which go through each format. It is measured with the plain captions that the captioner was trained
on, and with CC3M-like captions after NUM_EPOCHS epochs of LoRA on those. Sizes and speeds are those
of the full-size encoder: packing its features into rows, unpacking a batch for the decoder, reading
rows from the disk with an empty page cache, and encoding the images again. The last table is the
time that a trainer waits for kept rows: they are read ahead while it is busy, for STEP_S per batch.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, get_args

import numpy as np
import torch

from benchmarks import plots
from benchmarks.contenders import checkpoint, make_case
from benchmarks.measure import (
    cells,
    finish,
    flags,
    interleave,
    read_flags,
    seconds_a_call,
    spread,
    table,
)
from benchmarks.ours import Ours
from benchmarks.rows import Rows
from lora_engine.data.batches import PixelBatch
from lora_engine.data.image_table import ImageTable
from lora_engine.data.pixels import to_pixels
from lora_engine.data.seen_images import ImageList
from lora_engine.demo import captioner_folder
from lora_engine.demo.pretrain import batch_of
from lora_engine.demo.scenes import Scene, cc3m_caption, draw, plain_caption, scenes
from lora_engine.devices import autocast
from lora_engine.features.cache import FeatureCache
from lora_engine.features.encoder import FeatureEncoder, encode_pixels
from lora_engine.features.format import CacheDtype, FeatureFormat
from lora_engine.features.source import FeatureSource
from lora_engine.features.store import FeatureStore, read_rate
from lora_engine.lora.injection import cast_frozen
from lora_engine.models.pretrained import Captioner, load_captioner, load_model
from lora_engine.training.validation import validation_loss

FORMATS: tuple[CacheDtype, ...] = get_args(CacheDtype)
NUM_SCENES, NUM_EPOCHS, TRAINING_BATCH, LEARNING_RATE = 512, 8, 32, 1e-3
NUM_KEPT_BATCHES, STEP_S = 24, 0.1  # about a GPU's time for 64 captions


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument(
        "--cache_dir", type=Path, default=Path(gettempdir()), help="on the disk to read from"
    )
    arguments = read_flags(parser, argv)
    losses = measure_losses(
        arguments.model, arguments.device, num_scenes=16 if arguments.quick else NUM_SCENES
    )
    num_bytes, speeds, waits = measure_speeds(arguments)
    rows = [["", *(f"loss, {captions}, nats" for captions in losses), "kB per image"]]
    for name in FORMATS:
        row: list[str] = [name]
        for by_format in losses.values():
            difference = by_format[name] - by_format["fp32"]
            row.append(
                f"{by_format[name]:.6f} ({difference:+.1e}, {difference / by_format['fp32']:+.1e})"
            )
        rows.append([*row, f"{num_bytes[name] / 1e3:.0f}"])
    rates = [["images/s", "median", "min", "max"]]
    rates += [cells(name, figures, ".1f") for name, figures in speeds.items()]
    waiting = [["ms per image", "median", "min", "max"]]
    waiting += [cells(name, figures, ".2f") for name, figures in waits.items()]
    plain = losses["plain"]
    faster = speeds["read int8"]["median"] / speeds["encode"]["median"]
    finish(
        "features", arguments,
        {
            "loss_nats": losses, "bytes_an_image": num_bytes, "images_per_s": speeds,
            "waiting_ms": waits,
        },
        text=f"{table(rows)}\n\n{table(rates)}\n\n{table(waiting)}",
        headline=(
            f"int8 moves the loss by {plain['int8'] - plain['fp32']:+.1e} nats of "
            f"{plain['fp32']:.4f}, bf16 by {plain['bf16'] - plain['fp32']:+.1e}; reading int8 is "
            f"{faster:.0f} times as fast as encoding"
        ),
        draw=lambda axes: _draw(axes, speeds),
    )


def measure_losses(
    model: str, device: torch.device, *, num_scenes: int
) -> dict[str, dict[str, float]]:
    """Loss in nats per token, by style of caption and by format."""
    captioner = load_captioner(captioner_folder(model))
    trained = list(islice(scenes("train", 1), num_scenes))
    drawn = list(islice(scenes("validation", 1), num_scenes))
    rows = Rows(num_scenes, captioner.pixels.size, model=model)
    captions = captioner.tokenizer.encode(map(cc3m_caption, trained))
    rows.lengths = captions.lengths
    rows.captions = [captions[row] for row in range(num_scenes)]
    rows.pixels = np.stack([to_pixels(draw(scene), captioner.pixels) for scene in trained])
    ours = Ours(
        Path(captioner_folder(model)), rows, captioner.pixels, device=device, dtype=torch.float32,
        batch_size=TRAINING_BATCH, lr=LEARNING_RATE,
    )

    def by_format(caption: Callable[[Scene], str]) -> dict[str, float]:
        batch = batch_of(captioner, drawn, caption)
        features = encode_pixels(ours.model, batch.pixels.to(device), captioner.pixels)
        losses: dict[str, float] = {}
        for name in FORMATS:
            form = FeatureFormat(features.shape[1], features.shape[2], name)
            kept = batch.with_features(form.unpack(form.pack(features), torch.float32))
            losses[name] = validation_loss(ours.model, [kept]).loss
        return losses

    plain = by_format(plain_caption)  # new adapters change nothing yet
    for epoch in range(NUM_EPOCHS):
        ours.later_epoch(epoch)
    return {"plain": plain, "CC3M-like": by_format(cc3m_caption)}


Figures = dict[str, dict[str, float]]


def measure_speeds(arguments: Any) -> tuple[dict[str, int], Figures, Figures]:
    """Bytes per image by format, images/s by operation, and ms of waiting per image."""
    device, dtype = arguments.device, arguments.dtype
    with checkpoint(arguments.model, small=arguments.quick) as folder:
        case = make_case(folder, arguments, num_rows=arguments.batch_size)
        model = load_model(folder)
    cast_frozen(model, dtype)
    model.to(device)
    pixels = torch.from_numpy(case.rows.pixels).to(device)

    def encode() -> torch.Tensor:
        with autocast(device, dtype):
            return encode_pixels(model, pixels, case.settings)

    def rate(call: Callable[[], object], _: int) -> float:
        return len(pixels) / seconds_a_call(call, device)

    features = encode()
    contenders: dict[str, Callable[[int], float]] = {"encode": partial(rate, encode)}
    num_bytes: dict[str, int] = {}
    for name in FORMATS:
        form = FeatureFormat(features.shape[1], features.shape[2], name)
        packed = form.pack(features)
        num_bytes[name] = form.row_bytes
        contenders |= {
            f"pack {name}": partial(rate, partial(form.pack, features)),
            f"unpack {name}": partial(rate, partial(form.unpack, packed, dtype)),
        }
    contenders["bytes read"] = lambda _: read_rate(arguments.cache_dir)
    figures = interleave(contenders, num_rounds=arguments.rounds, show=False)
    num_read = figures.pop("bytes read")
    for kind, row_bytes in num_bytes.items():
        figures[f"read {kind}"] = [rate / row_bytes for rate in num_read]
    no_tokenizer: Any = None
    encoder = FeatureEncoder(
        Captioner(model, no_tokenizer, case.settings, "", "", Path(), None, {}),
        device=device, dtype=dtype,
    )
    waits = measure_waiting(encoder, arguments)
    return num_bytes, _spreads(figures), _spreads(waits)


def _spreads(figures: dict[str, list[float]]) -> Figures:
    return {name: spread(values) for name, values in figures.items()}


def measure_waiting(encoder: FeatureEncoder, arguments: Any) -> dict[str, list[float]]:
    """ms per image that a trainer waits for batches of kept rows that the page cache lacks."""
    num_batches = 2 if arguments.quick else NUM_KEPT_BATCHES
    size, row_bytes = arguments.batch_size, encoder.format.row_bytes
    num_rows = num_batches * size
    images = ImageList(ImageTable.of_files(map(str, range(num_rows))))
    digests = [(1 + number).to_bytes(16, "big") for number in range(num_rows)]
    for number, digest in enumerate(digests):
        images.record(number, None, digest)
    noise = np.frombuffer(os.urandom(row_bytes), dtype=np.uint8)  # as incompressible as features

    def batches() -> Iterator[PixelBatch]:
        none, pixels = torch.empty(0), torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        order = np.random.default_rng(0).permutation(num_rows).tolist()
        for begin in range(0, num_rows, size):
            rows = order[begin : begin + size]
            yield PixelBatch(none, none, none, 0, rows, rows, [], pixels, [])

    def wait(step_s: float, _: int) -> float:
        file = os.open(store.folder / "features.bin", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        begin_s, busy_s = time.perf_counter(), 0.0
        for _batch in source.attach(batches(), images):
            time.sleep(step_s)
            busy_s += step_s
        return 1e3 * (time.perf_counter() - begin_s - busy_s) / num_rows

    with TemporaryDirectory(dir=arguments.cache_dir) as folder:
        cache = FeatureCache(encoder.device)
        cache.store = store = filled_store(Path(folder), digests, noise)
        with FeatureSource(encoder, cache) as source:
            return interleave(
                {
                    "kept rows, idle trainer": partial(wait, 0.0),
                    f"kept rows, {1e3 * STEP_S:.0f} ms per step": partial(wait, STEP_S),
                },
                num_rounds=arguments.rounds, show=False,
            )


def filled_store(folder: Path, digests: Sequence[bytes], row: np.ndarray) -> FeatureStore:
    """A store that has the row, uint8 (row_bytes,), for each of the digests."""
    num_bytes = 2 * len(digests) * len(row)
    store = FeatureStore(folder, {}, row_bytes=len(row), limit_bytes=num_bytes)
    for digest in digests:
        store.offer(digest, row)
    store.close(timeout_s=600.0)
    if store.stopped_because:
        raise OSError(store.stopped_because)
    return FeatureStore(folder, {}, row_bytes=len(row), limit_bytes=num_bytes)


def _draw(axes: Any, speeds: dict[str, dict[str, float]]) -> None:
    plots.bars(axes, speeds, "images/s")
    axes.set_xscale("log")


if __name__ == "__main__":
    main()
