"""A few fixed validation images whose captions are followed through a run (samples.jsonl)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_engine.annotations import Row
from lora_engine.captioning import caption_features
from lora_engine.features import FeatureSource
from lora_engine.images import ImageError
from lora_engine.pretrained import Captioner
from lora_engine.run_folder import RunFolder
from lora_engine.summary import Sample

MAX_NEW_TOKENS = 30


class SampleCaptions:
    """Captions of `num_samples` different images, spread over `rows`, greedy.

    One that cannot be read is left out; the validation beside this counts and lists it.
    """

    def __init__(
        self,
        captioner: Captioner,
        rows: Sequence[Row],
        features: FeatureSource,
        *,
        num_samples: int,
        prompt: str,
    ) -> None:
        self.captioner = captioner
        self.source = features
        self.prompt = prompt
        first_rows = list({row.image: row for row in reversed(rows)}.values())[::-1]
        count = min(num_samples, len(first_rows))
        chosen = np.linspace(0, len(first_rows) - 1, count).astype(int)
        self.rows = [first_rows[index] for index in chosen]
        self.features: list[Tensor] | None = None
        self.captions: dict[int, list[str]] = {}  # by step

    def caption(self, step: int) -> None:
        """Caption the images with the adapter of now, and remember them as those of `step`."""
        if self.features is None:
            self._get_features()
        self.captions[step] = []
        if self.features:
            tokenizer = self.captioner.tokenizer
            room = tokenizer.max_positions - len(tokenizer.prompt_ids(self.prompt))
            self.captions[step] = caption_features(
                self.captioner,
                torch.stack(self.features),
                prompt=self.prompt,
                max_new_tokens=min(MAX_NEW_TOKENS, room),
            )

    def _get_features(self) -> None:
        """Once, and after the first validation, which has encoded these images already."""
        usable = []
        self.features = []
        for row in self.rows:
            try:
                self.features.append(self.source.features_of(row.image))
                usable.append(row)
            except ImageError:
                pass
        self.rows = usable

    def write(self, folder: RunFolder, step: int) -> None:
        for row, caption in zip(self.rows, self.captions[step]):
            folder.append(folder.samples, {
                "step": step, "image": row.image, "reference": row.text, "caption": caption,
            })

    def compare(self, step: int) -> tuple[Sample, ...]:
        """Each image's captions before training and at `step`."""
        return tuple(
            Sample(row.image, row.text, before, after)
            for row, before, after in zip(self.rows, self.captions[0], self.captions[step])
        )
