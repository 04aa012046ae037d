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
from itertools import product
from typing import Any

import tyro
from tqdm import tqdm

from lora_engine import cli
from lora_engine.captioning.adapted_captioner import load_captioners
from lora_engine.captioning.captioner import Caption
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.captioning.java_metrics import JAVA_SCORES, check_java, java_score
from lora_engine.captioning.metrics import (
    SCORE_NAMES,
    CaptionScores,
    References,
    bootstrap_intervals,
)
from lora_engine.captioning.references import Referenced, references_of
from lora_engine.commands.captioning_flags import CaptioningConfig, SkippedImages, check_writable
from lora_engine.commands.source_flags import SourceConfig
from lora_engine.data.image_table import ImageTable
from lora_engine.data.read_pairs import name_of, paths_of
from lora_engine.data.rows import BadRow
from lora_engine.data.subsets import evaluation_split, named_split
from lora_engine.features.store import cache_folder
from lora_engine.files import replaced_file
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
class EvaluateConfig(GenerationSettings, CaptioningConfig, SourceConfig):
    """Flags of `evaluate`."""

    data: str | tuple[str, ...]
    """Images with reference captions, in any format that training reads."""
    split: str | None = None
    """Split to score. Default: test or val, if there are splits."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter: a run folder, an adapter folder, or owner/name on the Hub; its base model is scored
    for comparison. Repeat the flag to compare several adapters."""
    out: str | None = None
    """Write one JSON line per image, with its captions and their scores, to this file; replaces it
    if it exists."""
    coco_out: str | None = None
    """Write the captions (the adapter's, if there is one) in COCO's results format to this file."""
    meteor_spice: bool = False
    """Also compute METEOR and SPICE; needs Java and the coco extra."""
    generate: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Settings of generation that replace those of the flags, such as num_beams=4,top_k=0. Repeat
    the flag to compare several settings; images are encoded once."""

    def check(self) -> None:
        super().check()
        self.settings()
        if len(set(self.adapter)) < len(self.adapter):
            raise ValueError(f"--adapter {' '.join(self.adapter)}: give each of them once")
        for flag in ("adapter", "generate"):
            if len(getattr(self, flag)) > 1 and self.coco_out is not None:
                raise ValueError(
                    f"--coco_out takes one caption per image, but there are several --{flag}"
                )

    def adapter_names(self) -> list[str]:
        """What the adapters are called in the results: one alone is "adapter"."""
        several = len(self.adapter) > 1
        return [f"{ADAPTER} {name}" if several else ADAPTER for name in self.adapter]

    def settings(self) -> dict[str, GenerationSettings]:
        """The settings to compare by their --generate; the only ones by "".

        Raises ValueError for settings that cannot be used.
        """
        if not self.generate:
            self._check_settings(self, "--")
            return {"": self.generation}
        found: dict[str, GenerationSettings] = {}
        for changes in self.generate:
            try:
                settings = self.changed(changes)
                self._check_settings(settings)
            except ValueError as error:
                raise ValueError(f"--generate {changes}: {error}") from None
            if found.setdefault("".join(changes.split()), settings) is not settings:
                raise ValueError(f"--generate {changes} is given twice")
        return found if len(found) > 1 else {"": settings}

    @staticmethod
    def _check_settings(settings: GenerationSettings, prefix: str = "") -> None:
        settings.check_generation(prefix)
        if settings.num_return_sequences > 1:
            raise ValueError(
                f"{prefix}num_return_sequences is {settings.num_return_sequences}, but one caption "
                f"of each image is scored; `caption` writes several"
            )


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
        for flag, path in (("--out", config.out), ("--coco_out", config.coco_out)):
            check_writable(flag, path, inputs=paths_of(config.data))
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
    """The base and the adapters on it, by name; the base continues the first adapter's prompt."""
    base, adapted = load_captioners(
        config.model, config.adapter, revision=config.revision, prompt=config.prompt,
        force=config.force,
    )
    return dict(zip((BASE, *config.adapter_names()), (base, *adapted)))


def _caption(
    config: EvaluateConfig,
    data: Sequence[Referenced],
    images: ImageTable,
    captioners: dict[str, Captioner],
    skipped: SkippedImages,
    ranks: Ranks,
) -> tuple[list[Referenced], dict[str, list[Caption]]]:
    """The images that could be read, and the captions of each column of the table."""
    scored: list[Referenced] = []
    settings = config.settings()
    captions: dict[str, list[Caption]] = {
        _column(name, changes): [] for changes, name in product(settings, captioners)
    }
    with config.captions(
        list(captioners.values()), images, list(settings.values()), ranks=ranks
    ) as captioned:
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


def _column(name: str, changes: str) -> str:
    """The name of a captioner's scores with settings that are named as in `settings`."""
    return f"{name} {changes}".rstrip()


def _table(config: EvaluateConfig, results: dict[str, CaptionScores]) -> str:
    settings = config.settings()
    columns: list[tuple[str, str, dict[str, str]]] = []  # (a line above, head, cells by score)
    for changes in settings:
        base = results[_column(BASE, changes)]
        columns.append((changes, BASE, _scores(base)))
        for name in config.adapter_names():
            adapted = results[_column(name, changes)]
            columns.append((name.removeprefix(ADAPTER).strip(), ADAPTER, _scores(adapted)))
            columns.append(("", "difference", _differences(base, adapted)))
    above, heads, scores = zip(*columns)
    rows = [["", *heads]]
    if any(above):
        rows.insert(0, ["", *above])
    rows += [
        [title, *(column.get(score, "") for column in scores)]
        for score, title in SCORE_NAMES.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    first = results[_column(BASE, next(iter(settings)))].corpus
    return "\n".join([
        f"{first.num_images:,} images of {name_of(config.data)}, {first.num_references:,} "
        f"references ({first.mean_reference_length:.3g} tokens on average), "
        + (f"{len(settings)} settings" if len(settings) > 1 else _search(*settings.values())),
        "COCO's scores on PTB-style tokens; in brackets 95 % of 1,000 bootstrap samples",
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
          for row in rows),
    ])


def _scores(scores: CaptionScores) -> dict[str, str]:
    """The cells of a column by score; those in BOOTSTRAPPED have intervals."""
    cells = {score: f"{getattr(scores.corpus, score):.3g}" for score in SCORE_NAMES}
    for score, (low, high) in bootstrap_intervals(scores).items():
        cells[score] = f"{getattr(scores.corpus, score):z.3f} [{low:z.3f}, {high:z.3f}]"
    return cells


def _differences(base: CaptionScores, adapter: CaptionScores) -> dict[str, str]:
    """The cells of a column by score: adapter minus base."""
    return {
        score: f"{getattr(adapter.corpus, score) - getattr(base.corpus, score):+z.3f} "
               f"[{low:+z.3f}, {high:+z.3f}]"
        for score, (low, high) in bootstrap_intervals(adapter, baseline=base).items()
    }


def _search(settings: GenerationSettings) -> str:
    """How captions are found: "4 beams captions", and the settings that are not the defaults."""
    search = "greedy" if settings.num_beams == 1 else f"{settings.num_beams} beams"
    search = search if settings.temperature is None else "sampled"
    changed = [
        f"{field.name} {getattr(settings, field.name)}" for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != field.default and field.name != "num_beams"
    ]
    return ", ".join([f"{search} captions", *changed])


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
