"""A few fixed validation images whose captions are followed through a run (samples.jsonl)."""

from collections.abc import Sequence

import numpy as np
import torch

from lora_engine.annotations import Row
from lora_engine.captioning import caption_pixels
from lora_engine.images import ImageError, open_image, to_pixels
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
        *,
        num_samples: int,
        prompt: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.captioner = captioner
        self.prompt = prompt
        self.device = device
        self.dtype = dtype
        self.rows: list[Row] = []
        self.pixels: list[np.ndarray] = []
        self.captions: dict[int, list[str]] = {}  # by step
        first_rows = list({row.image: row for row in reversed(rows)}.values())[::-1]
        count = min(num_samples, len(first_rows))
        for index in np.linspace(0, len(first_rows) - 1, count).astype(int):
            try:
                self.pixels.append(
                    to_pixels(open_image(first_rows[index].image), captioner.pixels)
                )
                self.rows.append(first_rows[index])
            except ImageError:
                pass

    def caption(self, step: int) -> None:
        """Caption the images with the adapter of now, and remember them as those of `step`."""
        self.captions[step] = []
        if self.rows:
            tokenizer = self.captioner.tokenizer
            room = tokenizer.max_positions - len(tokenizer.prompt_ids(self.prompt))
            self.captions[step] = caption_pixels(
                self.captioner,
                np.stack(self.pixels),
                prompt=self.prompt,
                device=self.device,
                dtype=self.dtype,
                max_new_tokens=min(MAX_NEW_TOKENS, room),
            )

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
