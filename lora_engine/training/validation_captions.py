"""Greedy captions of fixed validation images, followed through a run, and their scores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lora_engine.captioning.caption_tokens import has_words
from lora_engine.captioning.captioner import Caption, caption_features
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.captioning.metrics import CaptionScores, References, Scores
from lora_engine.data.batches import FeatureBatch, SampleIndex, in_batches
from lora_engine.data.rows import Row
from lora_engine.data.sampling import evenly_spaced
from lora_engine.models.pretrained import Captioner
from lora_engine.ranks import OneProcess, Ranks, collect
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.summary import Sample

MAX_NEW_TOKENS = 30


class ValidationCaptions:
    """Captions of `num_scored` different images, evenly spread over `rows` (at most all of them).

    Each is scored against all captions with words that `rows` have for its image; an image without
    such a caption is left out. `num_samples` of the images, evenly spread again, are shown to
    people (samples.jsonl), scored or not. An image that cannot be read is left out here; the
    validation loss counts and lists it.
    """

    def __init__(
        self,
        captioner: Captioner,
        rows: Sequence[Row],
        *,
        num_scored: int,
        num_samples: int,
    ) -> None:
        self.captioner = captioner
        self.rows = rows
        self.num_samples = num_samples
        self.texts: dict[str, list[str]] = {}  # all captions of an image that can be scored against
        first_rows: dict[str, int] = {}
        for number, row in enumerate(rows):
            if has_words(row.text):
                self.texts.setdefault(row.image, []).append(row.text)
            first_rows.setdefault(row.image, number)
        self.is_scored = num_scored > 0 and bool(self.texts)
        candidates = [
            row for image, row in first_rows.items() if image in self.texts or not self.is_scored
        ]
        self.wanted = [
            candidates[i] for i in evenly_spaced(len(candidates), max(num_scored, num_samples))
        ]
        self.references: tuple[list[int], References] | None = None  # and whose: rows
        self.captions: dict[int, dict[int, Caption]] = {}  # by step, by row
        self.scores: dict[int, CaptionScores] = {}  # by step

    def order(self, batch_size: int) -> list[list[SampleIndex]]:
        """The batches of rows to caption."""
        return in_batches(self.wanted, batch_size)

    def caption(
        self, step: int, batches: Iterable[FeatureBatch], ranks: Ranks = OneProcess()
    ) -> Scores | None:
        """Caption this process' batches of `order` with the current adapter, as those of `step`.

        Returns the scores of the captions of all processes, if captions are scored.
        """
        tokenizer = self.captioner.tokenizer
        num_left = tokenizer.max_positions - len(tokenizer.prompt_ids(self.captioner.prompt))
        settings = GenerationSettings(max_new_tokens=min(MAX_NEW_TOKENS, num_left))
        mine: list[list[tuple[int, Caption]]] = []  # by batch
        for batch in batches:
            found = []
            if batch.rows:
                found = caption_features(self.captioner, batch.features, settings)
            mine.append(list(zip(batch.rows, found)))
        self.captions[step] = {
            row: Caption(*caption) for batch in collect(mine, ranks) for row, caption in batch
        }
        scores = self._score(step) if ranks.is_main else None
        values = ranks.gather(None if scores is None else asdict(scores))[0]
        return None if values is None else Scores(**values)

    def _score(self, step: int) -> Scores | None:
        captions = self.captions[step]
        if not self.is_scored or not captions:
            return None
        self.scores[step] = self._references(list(captions)).score(
            [caption.text for caption in captions.values()],
            ended=[caption.ended for caption in captions.values()],
        )
        return self.scores[step].corpus

    def state_dict(self, best_step: int) -> dict[str, Any]:
        """The captions that are needed later: those before training and of the best step."""
        return {
            str(step): [[row, *caption] for row, caption in self.captions[step].items()]
            for step in dict.fromkeys((0, best_step))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore captions, and score them again.

        Raises ValueError for captions of other rows than those of `order`.
        """
        wanted = set(self.wanted)
        for step, captions in state.items():
            if not wanted.issuperset(row for row, *_ in captions):
                raise ValueError(
                    f"the captions of step {step} are of other validation rows than this run's"
                )
            self.captions[int(step)] = {row: Caption(*rest) for row, *rest in captions}
            self._score(int(step))

    def _references(self, rows: list[int]) -> References:
        """References of the images that could be read this time: nearly always the same ones."""
        if self.references is None or self.references[0] != rows:
            self.references = rows, References([self.texts[self.rows[row].image] for row in rows])
        return self.references[1]

    def _samples(self, *steps: int) -> list[int]:
        """The rows to show, among those with a caption at all of these steps."""
        rows = [row for row in self.wanted if all(row in self.captions[step] for step in steps)]
        return [rows[i] for i in evenly_spaced(len(rows), self.num_samples)]

    def write(self, folder: RunFolder, step: int) -> None:
        """Add the samples of `step` to samples.jsonl."""
        for row in self._samples(step):
            folder.append(folder.samples, {
                "step": step,
                "image": self.rows[row].image,
                "reference": self.rows[row].text,
                "caption": self.captions[step][row].text,
            })

    def write_best(self, folder: RunFolder, step: int) -> None:
        """Write every scored image's captions before training and at `step` to captions.jsonl."""
        if step in self.scores and 0 in self.scores:
            folder.write_lines(folder.captions, self._lines(step))

    def _lines(self, step: int) -> Iterator[dict]:
        before, after = (
            dict(zip(self.captions[at], self.scores[at].cider_d.round(4).tolist()))
            for at in (0, step)
        )
        for row in before:
            if row not in after:
                continue
            yield {
                "image": self.rows[row].image,
                "references": self.texts[self.rows[row].image],
                "before": self.captions[0][row].text,
                "after": self.captions[step][row].text,
                "cider_d_before": before[row],
                "cider_d_after": after[row],
            }

    def compare(self, step: int) -> tuple[Sample, ...]:
        """Each sample's captions before training and at `step`."""
        return tuple(
            Sample(
                self.rows[row].image,
                self.rows[row].text,
                self.captions[0][row].text,
                self.captions[step][row].text,
            )
            for row in self._samples(0, step)
        )
