"""Draw the README's picture: captions before and after training, and the loss curves.

    python -m recipes.blip_cc3m --num_threads 1 --output_path runs/picture_blip
    python -m recipes.vit_gpt2_cc3m --num_threads 1 --output_path runs/picture_vit_gpt2
    python docs/make_picture.py runs/picture_blip runs/picture_vit_gpt2

It reads a run folder's metrics.jsonl and samples.jsonl, and the images that the latter names, and
writes docs/demo.png. The first run gives the captions, all runs give curves.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

NUM_IMAGES = 4
COLORS = ("#2a78b5", "#c8501e")
GREY = "#555555"
NAMES = {"blip": "tiny BLIP", "vit_gpt2": "tiny ViT+GPT2"}  # of the demo's model folders


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo.png")
    arguments = parser.parse_args()
    figure = Figure(figsize=(10, 8))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, NUM_IMAGES, height_ratios=(1, 0.5, 1.1), left=0.07, right=0.99, top=1, bottom=0.07,
        hspace=0.04, wspace=0.06,
    )
    samples = by_image(read_lines(arguments.runs[0] / "samples.jsonl"))
    for column, image in enumerate(samples[:NUM_IMAGES]):
        draw_image(figure.add_subplot(grid[0, column]), image[0]["image"])
        draw_captions(figure.add_subplot(grid[1, column]), image[0], image[-1])
    draw_losses(figure.add_subplot(grid[2, :]), arguments.runs)
    figure.savefig(arguments.out, dpi=120)
    # A palette of 256 colors makes the file a third of the size.
    Image.open(arguments.out).convert("RGB").quantize(256).save(arguments.out, optimize=True)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.0f} kB")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_image(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The samples of each image, in the order of the steps."""
    images: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["step"]):
        images.setdefault(sample["image"], []).append(sample)
    return list(images.values())


def draw_image(axes: Axes, path: str) -> None:
    axes.imshow(Image.open(path), interpolation="lanczos")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#cccccc")


def draw_captions(axes: Axes, first: dict[str, Any], last: dict[str, Any]) -> None:
    """The caption before training, and that at the last validation."""
    axes.axis("off")
    for y, title, caption, color in (
        (1.0, "before training", first["caption"], GREY),
        (0.56, f"after {last['step']} steps", last["caption"], COLORS[0]),
    ):
        axes.text(0, y, title, va="top", fontsize=9, color=GREY)
        axes.text(0, y - 0.11, textwrap.fill(caption, 29), va="top", fontsize=10, color=color)


def draw_losses(axes: Axes, runs: list[Path]) -> None:
    for run, color in zip(runs, COLORS):
        events = read_lines(run / "metrics.jsonl")
        train = [event for event in events if event["event"] == "train"]
        validation = [event for event in events if event["event"] == "validation"]
        name = Path(json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]).name
        axes.plot(
            [event["step"] for event in train], [event["loss"] for event in train],
            color=color, alpha=0.4, linewidth=1,
        )
        losses = [event["loss"] for event in validation]
        axes.plot(
            [event["step"] for event in validation], losses, color=color, marker="o",
            label=f"{NAMES.get(name, name)}: validation loss {losses[0]:.2f} to {losses[-1]:.3f}, "
            f"CIDEr-D {validation[0]['cider_d']:.2f} to {validation[-1]['cider_d']:.2f}",
        )
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=11)


if __name__ == "__main__":
    main()
