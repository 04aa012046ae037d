"""Images per second and core, from a file's bytes to pixels: plain Pillow against this engine.

    python -m benchmarks.input_path --model blip
    python -m benchmarks.input_path --model vit_gpt2 --images PHOTOS --num_workers 1 8 16

Four paths over the same JPEGs, drawn here at five sizes or taken from a folder of photos:

- Pillow: what transformers' Pillow processors do; differences are in levels (0 to 255) from it;
- ours: `lora_engine.data.images.load_pixels`;
- unguarded: ours without the checks, orientation and transparency of `open_image`;
- draft: ours, after libjpeg decoded a JPEG to 1/2, 1/4 or 1/8 of its size if that is still
  DRAFT_MARGIN times as large as needed. The engine does not use it: it has no effect on images of
  up to seven (BLIP) or two megapixels, differs a hundred times more, and is unsafe before Pillow 13
  for lossless JPEGs, where the decoder does not scale and writes beyond the end of Pillow's buffer.

These speeds use the processor time of one process, so other programs hardly affect them. Several
loading processes together are timed by the clock.
"""

import argparse
import io
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.measure import interleave, spread, table, write_result
from lora_engine.data.image_files import find_images
from lora_engine.data.pixels import PixelSettings, load_pixels, to_pixels

SETTINGS = {  # sizes and filters; means do not matter here
    "blip": PixelSettings((384, 384), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "vit_gpt2": PixelSettings((224, 224), 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SIZES = ((400, 300), (640, 480), (1024, 768), (2048, 1536), (4000, 3000))  # (width, height)
LOADED = "1024x768"  # what the loading processes read without --images
NEEDED_PER_S = 1000
DRAFT_MARGIN = 3


def pillow(data: bytes, settings: PixelSettings) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = image.resize(settings.size[::-1], resample=Image.Resampling(settings.resample))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def unguarded(data: bytes, settings: PixelSettings) -> np.ndarray:
    return to_pixels(Image.open(io.BytesIO(data)).convert("RGB"), settings)


def draft(data: bytes, settings: PixelSettings) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    for scale in (8, 4, 2):
        width, height = image.width // scale, image.height // scale
        # A remaining fraction of a pixel at the edge would shift all other pixels.
        divides = (width * scale, height * scale) == image.size
        if divides and min(width, height) >= DRAFT_MARGIN * max(settings.size):
            image.draft(None, (width, height))  # type: ignore[arg-type]
            break
    ImageOps.exif_transpose(image, in_place=True)
    return to_pixels(image if image.mode == "RGB" else image.convert("RGB"), settings)


InputPath = Callable[[bytes, PixelSettings], np.ndarray]
PATHS: dict[str, InputPath] = {
    "Pillow": pillow, "ours": load_pixels, "unguarded": unguarded, "draft": draft,
}


def draw(width: int, height: int, *, seed: int) -> Image.Image:
    """Draw clouds with detail at every scale: a JPEG takes two bits per pixel, as for photos.

    Pictures beyond 1024 x 768 repeat one of that size: drawing them would take too long.
    """
    generator = torch.Generator().manual_seed(seed)
    tile = min(height, 768), min(width, 1024)
    pixels = torch.zeros(1, 3, *tile)
    for octave in range(9):
        shape = (1, 4, max(tile[0] >> octave, 2), max(tile[1] >> octave, 2))
        noise = torch.randn(shape, generator=generator)
        noise = noise[:, :1] + 0.3 * noise[:, 1:]  # gray, with some color
        pixels += 1.4**octave * F.interpolate(noise, tile, mode="bicubic")
    levels = (pixels / pixels.std() * 60 + 118).clamp(0, 255).to(torch.uint8)
    repeats = -(-height // tile[0]), -(-width // tile[1])
    picture = np.tile(levels[0].permute(1, 2, 0).numpy(), (*repeats, 1))  # (H, W, 3)
    return Image.fromarray(picture[:height, :width])


def write_pictures(folder: Path, *, quick: bool) -> dict[str, list[Path]]:
    """Draw JPEGs of quality 90 into the folder -> their paths by size."""
    files: dict[str, list[Path]] = {}
    for width, height in SIZES:
        for index in range(2 if quick or width > 2000 else 8):
            path = folder / f"{width}x{height}_{index}.jpg"
            draw(width, height, seed=index).save(path, quality=90)
            files.setdefault(f"{width}x{height}", []).append(path)
    return files


def measure(
    files: list[Path], settings: PixelSettings, *, num_rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By path: speed, speed relative to Pillow within a round, and difference from its pixels."""
    def speed(path: InputPath, _: int) -> float:
        begin_s = time.process_time()
        for file in files:
            path(file.read_bytes(), settings)
        return len(files) / (time.process_time() - begin_s)

    speeds = interleave(
        {name: partial(speed, path) for name, path in PATHS.items()}, num_rounds=num_rounds
    )
    contents = [file.read_bytes() for file in files]
    plain = [pillow(data, settings).astype(int) for data in contents]
    result = {}
    for name, path in PATHS.items():
        levels = np.abs([path(data, settings) - pixels for data, pixels in zip(contents, plain)])
        result[name] = {
            "images_per_s_and_core": spread(speeds[name]),
            "against_pillow": spread([a / b for a, b in zip(speeds[name], speeds["Pillow"])]),
            "levels_from_pillow": {
                "mean": float(levels.mean()),
                "p99.9": float(np.percentile(levels, 99.9)),
                "max": float(levels.max()),
            },
        }
    return result


def measure_loading(
    files: list[Path], settings: PixelSettings, num_workers: list[int], *, num_rounds: int
) -> dict[str, dict[str, float]]:
    """Images per second from each number of processes, which stay alive between rounds."""
    def epoch(loader: DataLoader, _: int) -> float:
        begin_s = time.perf_counter()
        count = sum(len(batch) for batch in loader)
        return count / (time.perf_counter() - begin_s)

    loaders: dict[str, Callable[[int], float]] = {
        str(count): partial(epoch, DataLoader(
            files,  # type: ignore[arg-type]
            batch_size=32, collate_fn=partial(_load_batch, settings),
            num_workers=count, persistent_workers=count > 0,
        ))
        for count in num_workers
    }
    speeds = interleave(loaders, num_rounds=num_rounds)
    return {name: spread(figures) for name, figures in speeds.items()}


def _load_batch(settings: PixelSettings, files: list[Path]) -> Tensor:
    return torch.from_numpy(np.stack([load_pixels(file, settings) for file in files]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SETTINGS, default="blip", help="whose pixels")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--images", type=Path, help="a folder of photos; default: drawn pictures")
    parser.add_argument(
        "--num_workers", type=int, nargs="*", default=sorted({1, os.cpu_count() or 1}),
        help="numbers of loading processes to time (default: 1, and one per core)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images and 2 rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2
    torch.set_num_threads(1)  # as in a loading process
    settings = SETTINGS[arguments.model]

    with tempfile.TemporaryDirectory() as name:
        if arguments.images:
            files = {"photos": find_images([arguments.images])[: 4 if arguments.quick else None]}
        else:
            files = write_pictures(Path(name), quick=arguments.quick)
        sizes = {}
        for size in files:
            print(f"{size}: {len(files[size])} files, images/s and core")
            sizes[size] = measure(files[size], settings, num_rounds=arguments.rounds)
        loaded = files.get(LOADED) or files["photos"]
        loaded *= -(-(64 if arguments.quick else 512) // len(loaded))
        print(f"{len(loaded)} files by loading processes, images/s")
        loading = measure_loading(
            loaded, settings, arguments.num_workers, num_rounds=arguments.rounds
        )
    result = {
        "benchmark": "input_path",
        "model": arguments.model,
        "sizes": sizes,
        "images_per_s_by_loading_processes": loading,
        "num_rounds": arguments.rounds,
    }
    print("\n" + _as_table(result))
    suffix = "-quick" if arguments.quick else ""
    path = write_result(
        f"input_path-{arguments.model}{suffix}", result, device=torch.device(arguments.device)
    )
    _plot(result, path.with_suffix(".png"))
    print(f"written to {path} and {path.with_suffix('.png').name}")


def _as_table(result: dict[str, Any]) -> str:
    rows = [["", "images/s, core", "/ Pillow", f"cores for {NEEDED_PER_S}/s",
             "difference, levels: mean", "p99.9", "max"]]
    for size, paths in result["sizes"].items():
        for name, figures in paths.items():
            speed = figures["images_per_s_and_core"]["median"]
            apart = figures["levels_from_pillow"]
            rows.append([
                f"{size}  {name}", f"{speed:.1f}", f"{figures['against_pillow']['median']:.2f}",
                str(math.ceil(NEEDED_PER_S / speed)), f"{apart['mean']:.3f}",
                f"{apart['p99.9']:.0f}", f"{apart['max']:.0f}",
            ])
    processes = [["loading processes", "images/s"]]
    for count, speeds in result["images_per_s_by_loading_processes"].items():
        processes.append([count, f"{speeds['median']:.0f}"])
    return f"{result['model']}\n{table(rows)}\n\n{table(processes)}"


def _plot(result: dict[str, Any], path: Path) -> None:
    """Plot images per second and core by image size."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = list(result["sizes"])
    for name in PATHS:
        speeds = [result["sizes"][size][name]["images_per_s_and_core"] for size in sizes]
        medians = np.array([speed["median"] for speed in speeds])
        axes.errorbar(
            sizes, medians,
            [medians - [s["min"] for s in speeds], [s["max"] for s in speeds] - medians],
            marker="o", capsize=3, label=name,
        )
    axes.set(
        yscale="log", xlabel="JPEG, pixels", ylabel="images/s of one core",
        title=f"From a file's bytes to pixels for {result['model']}",
    )
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
