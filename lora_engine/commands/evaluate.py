"""python -m lora_engine evaluate: how good captions are, with the adapter and without it."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm import tqdm

from lora_engine import cli
from lora_engine.adapter import read_adapter
from lora_engine.batches import default_num_workers
from lora_engine.captioning import Caption, Speaker, caption_images
from lora_engine.commands.loading import (
    check_at_least_1,
    check_writable,
    load_base,
    place,
    speaker_of,
)
from lora_engine.devices import resolve_device, resolve_dtype
from lora_engine.files import replaced_file
from lora_engine.java_metrics import check_java, java_scores
from lora_engine.metrics import CaptionScores, References, bootstrap_intervals
from lora_engine.references import Referenced, read_references

UNREADABLE = 1  # exit status: some images could not be scored
BASE, ADAPTER = "base", "adapter"

# Names of scores, and how people write them.
COMPARED = {
    "cider_d": "CIDEr-D", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L",
}
SHOWN = {
    "ended": "ended by themselves", "distinct": "distinct captions",
    "repetition": "repeated 3-grams", "mean_length": "mean length, tokens",
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Flags of `evaluate`."""

    data: str
    """Annotations with the references: a JSON list of {"text", "image"}, or COCO's captions."""
    adapter: str | None = None
    """Adapter folder, such as RUN/adapter; it and its base are scored side by side."""
    model: str | None = None
    """Base model: folder or Hub name. Default: the one that the adapter was trained on."""
    revision: str | None = None
    """Revision of a Hub name."""
    image_folder: str | None = None
    """Where the images of a COCO file are. Default: beside the file."""
    out: str | None = None
    """Write a JSON line for each image, with its captions and their scores, to this file."""
    coco_out: str | None = None
    """Write the captions (the adapter's, if there is one) in COCO's results format to this file."""
    meteor_spice: bool = False
    """Score METEOR and SPICE, too; needs Java and the coco extra."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int = 30
    """Longest caption, in tokens."""
    batch_size: int = 16
    """Images at a time."""
    prompt: str | None = None
    """Words to continue. Default: the prompt that the adapter was trained with."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format of matrix products; auto: bf16 (else fp16) on CUDA, else fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; default: CUDA if there is one."""
    num_workers: int | None = None
    """Processes that load images. Default: half of the processors, at most 8, beside a GPU; else 0.
    """


def evaluate(args: list[str]) -> int:
    """Score captions against references, with and without an adapter -> exit status."""
    config = cli.parse(
        EvaluateConfig, args, prog="python -m lora_engine evaluate",
        description="Score the captions of a base model, and of an adapter on it, side by side.",
    )
    check_at_least_1(config, "num_beams", "max_new_tokens", "batch_size")
    check_writable("--out", config.out)
    check_writable("--coco_out", config.coco_out)
    if config.meteor_spice:
        check_java()
    data = read_references(config.data, image_folder=config.image_folder)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    speakers = _speakers(config)
    place(list(speakers.values()), device, dtype)
    scored, captions = _caption(config, data, speakers, device, dtype)
    if not scored:
        raise ValueError(f"{config.data}: not one image could be read")

    references = References([image.references for image in scored])
    results = {
        name: references.score(
            [caption.text for caption in said], ended=[caption.ended for caption in said]
        )
        for name, said in captions.items()
    }
    extra = {}
    if config.meteor_spice:
        extra = {
            name: java_scores(
                [caption.text for caption in said], [image.references for image in scored]
            )
            for name, said in captions.items()
        }
    print(_table(config, results, extra))
    if config.out is not None:
        with replaced_file(config.out) as new:
            with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
                for line in _lines(scored, captions, results):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"each image  {config.out}")
    if config.coco_out is not None:
        with replaced_file(config.coco_out) as new:
            new.write_text(json.dumps([
                {"image_id": image.id, "caption": caption.text}
                for image, caption in zip(scored, list(captions.values())[-1])
            ]), encoding="utf-8")
        print(f"COCO        {config.coco_out}")
    return 0 if len(scored) == len(data) else UNREADABLE


def _speakers(config: EvaluateConfig) -> dict[str, Speaker]:
    adapters = [] if config.adapter is None else [read_adapter(config.adapter)]
    captioner = load_base(config.model, config.revision, adapters)
    prompt = config.prompt
    if prompt is None:
        prompt = adapters[0].prompt if adapters else ""
    speakers = {BASE: Speaker(captioner, prompt)}
    if adapters:
        speakers[ADAPTER] = speaker_of(captioner, adapters[0], prompt)
    return speakers


def _caption(
    config: EvaluateConfig,
    data: Sequence[Referenced],
    speakers: dict[str, Speaker],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Referenced], dict[str, list[Caption]]]:
    """The images that could be read, and what each speaker says of them."""
    outcomes = caption_images(
        list(speakers.values()),
        [image.image for image in data],
        batch_size=config.batch_size,
        num_workers=default_num_workers(device, config.num_workers),
        device=device,
        dtype=dtype,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    scored: list[Referenced] = []
    captions: dict[str, list[Caption]] = {name: [] for name in speakers}
    progress = tqdm(outcomes, total=len(data), unit="image", disable=not sys.stderr.isatty())
    for image, outcome in zip(data, progress):
        if outcome.reason is not None:
            print(f"skipped {outcome.image}: {outcome.reason}", file=sys.stderr)
            continue
        scored.append(image)
        for said, caption in zip(captions.values(), outcome.captions):
            said.append(caption)
    if len(scored) < len(data):
        print(f"{len(data) - len(scored)} images could not be read", file=sys.stderr)
    return scored, captions


def _table(
    config: EvaluateConfig,
    results: dict[str, CaptionScores],
    extra: dict[str, dict[str, float]],
) -> str:
    first = next(iter(results.values())).corpus
    search = "greedy" if config.num_beams == 1 else f"{config.num_beams} beams"
    rows = [["", *results, *(["difference"] if len(results) > 1 else [])]]
    intervals = {name: bootstrap_intervals(scores) for name, scores in results.items()}
    if len(results) > 1:
        differences = bootstrap_intervals(results[ADAPTER], baseline=results[BASE])
    for name, title in COMPARED.items():
        values = [getattr(scores.corpus, name) for scores in results.values()]
        row = [title] + [
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value, (low, high) in zip(values, (found[name] for found in intervals.values()))
        ]
        if len(values) > 1:
            low, high = differences[name]
            row.append(f"{values[1] - values[0]:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append(row)
    for name in sorted({name for scores in extra.values() for name in scores}):
        rows.append([name.upper()] + [f"{scores[name]:.3f}" for scores in extra.values()])
    for name, title in SHOWN.items():
        rows.append([title] + [
            f"{getattr(scores.corpus, name):.3g}" for scores in results.values()
        ])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join([
        f"{first.num_images:,} images of {config.data}, {first.num_references:,} references "
        f"({first.mean_reference_length:.3g} tokens on average), {search} captions",
        "COCO's scores, on tokens cut here as PTB's; in brackets 95 % of 1,000 bootstrap samples",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in rows),
    ])


def _lines(
    scored: Sequence[Referenced],
    captions: dict[str, list[Caption]],
    results: dict[str, CaptionScores],
) -> Iterator[dict[str, Any]]:
    for number, image in enumerate(scored):
        line: dict[str, Any] = {"image": image.image, "references": image.references}
        for name, scores in results.items():
            line[name] = {
                "caption": captions[name][number].text,
                "ended": captions[name][number].ended,
                "cider_d": float(scores.cider_d[number]),
                "bleu_4": float(scores.bleu_4[number]),
                "rouge_l": float(scores.rouge_l[number]),
            }
        yield line
