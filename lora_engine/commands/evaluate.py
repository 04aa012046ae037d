"""python -m lora_engine evaluate: score captions, with and without an adapter.

Under torchrun the images are split across processes; the main one scores and writes.
"""

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.captioner import Caption
from lora_engine.captioning.java_metrics import JAVA_SCORES, check_java, java_score
from lora_engine.captioning.metrics import (
    BOOTSTRAPPED,
    SCORE_NAMES,
    CaptionScores,
    References,
    bootstrap_intervals,
)
from lora_engine.captioning.references import Referenced, references_of
from lora_engine.commands.loading import (
    CaptioningConfig,
    SkippedImages,
    check_writable,
    load_base,
    load_onto,
)
from lora_engine.commands.source_flags import SourceConfig
from lora_engine.data.image_table import ImageTable
from lora_engine.data.read_pairs import name_of, paths_of
from lora_engine.data.rows import BadRow
from lora_engine.data.subsets import evaluation_split, named_split
from lora_engine.features.store import cache_folder
from lora_engine.files import replaced_file
from lora_engine.lora.adapter import read_adapter
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import Ranks, open_ranks
from lora_engine.terminal import printable

logger = logging.getLogger(__name__)

UNREADABLE = 1  # exit status: some images or captions are not scored
BASE, ADAPTER = "base", "adapter"
NO_CIDER_D = (
    "CIDEr-D is 0 by definition here: it weighs words by how few of the images have them, and all "
    "images have the same references"
)


@dataclass(frozen=True)
class EvaluateConfig(CaptioningConfig, SourceConfig):
    """Flags of `evaluate`."""

    data: str | tuple[str, ...]
    """Images with reference captions, in any format that training reads."""
    split: str | None = None
    """Split to score. Default: test or val, if there are splits."""
    adapter: str | None = None
    """Adapter: a run folder, an adapter folder, or owner/name on the Hub; its base model is scored
    for comparison."""
    out: str | None = None
    """Write one JSON line per image, with its captions and their scores, to this file."""
    coco_out: str | None = None
    """Write the captions (the adapter's, if there is one) in COCO's results format to this file."""
    meteor_spice: bool = False
    """Also compute METEOR and SPICE; needs Java and the coco extra."""


def evaluate(args: list[str]) -> int:
    """Score captions against references, with and without an adapter -> exit status."""
    with open_ranks() as ranks:
        # The older name of --image_root.
        args = [re.sub(r"^--image[-_]folder(?==|$)", "--image_root", arg) for arg in args]
        config = cli.parse(
            EvaluateConfig, args, prog="python -m lora_engine evaluate",
            description="Score the captions of a base model, and of an adapter for comparison. "
                        "Start it with torchrun to split the images across processes.",
        )
        return _evaluate(config, ranks)


def _evaluate(config: EvaluateConfig, ranks: Ranks) -> int:
    config.check()
    if ranks.is_main:
        check_writable("--out", config.out)
        check_writable("--coco_out", config.coco_out)
        if config.meteor_spice:
            check_java()
    config.take_share(ranks)
    with ranks.machine_first():
        data, images, bad_rows = _read(config)
    config.check_same(images, ranks)
    skipped = SkippedImages(config.out if ranks.is_main else None, bad_rows)
    scored, captions = _caption(config, data, images, _captioners(config), skipped, ranks)
    if not scored:
        raise ValueError(f"{name_of(config.data)}: none of the images could be read")
    if ranks.is_main:
        _report(config, scored, captions)
    return UNREADABLE if skipped.lines else 0


def _read(config: EvaluateConfig) -> tuple[list[Referenced], ImageTable, Sequence[BadRow]]:
    """The images to score, as `references_of`."""
    pairs = config.read(
        config.data, index_folder=cache_folder(config.cache_dir), max_bad_share=1.0,
        needs_captions=False,
    )
    if config.split is not None:
        pairs = named_split(pairs, config.split)
    else:
        pairs = evaluation_split(pairs, ["test", "val"])
    return references_of(pairs, name_of(config.data), _folder_of(config.data))


def _report(
    config: EvaluateConfig, scored: Sequence[Referenced], captions: dict[str, list[Caption]]
) -> None:
    """Score the captions, print the scores, and write the files that the flags name."""
    texts = [image.references for image in scored]
    references = References(texts)
    results = {
        name: references.score(
            [caption.text for caption in column], ended=[caption.ended for caption in column]
        )
        for name, column in captions.items()
    }
    print(printable(_table(config, results)))
    if not references.weighs_words:
        print(f"\n{NO_CIDER_D}")
    if config.meteor_spice:
        _print_java_scores(captions, texts)
    if config.out is not None:
        with replaced_file(config.out) as new:
            with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
                for line in _lines(scored, captions, results):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(printable(f"each image  {config.out}"))
    if config.coco_out is not None:
        with replaced_file(config.coco_out) as new:
            new.write_text(json.dumps([
                {"image_id": image.id, "caption": caption.text}
                for image, caption in zip(scored, list(captions.values())[-1])
            ]), encoding="utf-8")
        print(printable(f"COCO        {config.coco_out}"))


def _folder_of(data: str | tuple[str, ...]) -> str:
    """The folder of the data, which images are named relative to in results."""
    path = os.path.realpath(paths_of(data)[0])
    return path if os.path.isdir(path) else os.path.dirname(path)


def _captioners(config: EvaluateConfig) -> dict[str, Captioner]:
    """The base and, if there is one, the adapter on it, both with the same prompt."""
    adapters = [] if config.adapter is None else [read_adapter(find_adapter(config.adapter))]
    base = load_base(config.model, config.revision, adapters)
    prompt = config.prompt
    if prompt is None:
        prompt = adapters[0].prompt if adapters else ""
    captioners = {BASE: dataclasses.replace(base, prompt=prompt)}
    if adapters:
        captioners[ADAPTER] = load_onto(base, adapters[0], prompt=prompt, force=config.force)
    return captioners


def _caption(
    config: EvaluateConfig,
    data: Sequence[Referenced],
    images: ImageTable,
    captioners: dict[str, Captioner],
    skipped: SkippedImages,
    ranks: Ranks,
) -> tuple[list[Referenced], dict[str, list[Caption]]]:
    """The images that could be read, and each captioner's captions of them."""
    scored: list[Referenced] = []
    captions: dict[str, list[Caption]] = {name: [] for name in captioners}
    with config.captions(list(captioners.values()), images, ranks=ranks) as captioned:
        progress = tqdm(captioned, total=len(data), unit="image", disable=not sys.stderr.isatty())
        for image, result in zip(data, progress):
            if result.reason is not None:
                skipped.add(result)
                continue
            scored.append(image)
            for column, caption in zip(captions.values(), result.captions):
                column.append(caption)
    skipped.finish()
    return scored, captions


def _table(config: EvaluateConfig, results: dict[str, CaptionScores]) -> str:
    first = results[BASE].corpus
    search = "greedy" if config.num_beams == 1 else f"{config.num_beams} beams"
    columns = {
        name: {
            score: f"{getattr(scores.corpus, score):z.3f} [{low:z.3f}, {high:z.3f}]"
            for score, (low, high) in bootstrap_intervals(scores).items()
        }
        for name, scores in results.items()
    }
    if ADAPTER in results:
        after = results[ADAPTER].corpus
        differences = bootstrap_intervals(results[ADAPTER], baseline=results[BASE])
        columns["difference"] = {
            score: f"{getattr(after, score) - getattr(first, score):+z.3f} "
                   f"[{low:+z.3f}, {high:+z.3f}]"
            for score, (low, high) in differences.items()
        }
    rows = [["", *columns]]
    for score, title in SCORE_NAMES.items():
        if score in BOOTSTRAPPED:
            rows.append([title, *(column[score] for column in columns.values())])
        else:
            values = (getattr(scores.corpus, score) for scores in results.values())
            rows.append([title, *(f"{value:.3g}" for value in values)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join([
        f"{first.num_images:,} images of {name_of(config.data)}, {first.num_references:,} "
        f"references ({first.mean_reference_length:.3g} tokens on average), {search} captions",
        "COCO's scores on PTB-style tokens; in brackets 95 % of 1,000 bootstrap samples",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in rows),
    ])


def _print_java_scores(
    captions: dict[str, list[Caption]], references: Sequence[Sequence[str]]
) -> None:
    """A program that fails costs a warning, but not the other scores."""
    for score in JAVA_SCORES:
        try:
            values = {
                name: java_score(score, [caption.text for caption in column], references)
                for name, column in captions.items()
            }
        except ValueError as error:
            logger.warning(str(error))
        else:
            parts = (f"{name} {value:z.3f}" for name, value in values.items())
            print(f"{score.upper()}: {', '.join(parts)}")


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
