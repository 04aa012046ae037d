"""Rows to train on: random pixels, and random captions with the lengths of real ones.

Speed depends on the lengths of captions, not on the contents of captions and images.
"""

import numpy as np

START_ID, FIRST_WORD_ID, LAST_WORD_ID, END_ID = 1, 200, 29_999, 102  # arbitrary: weights are random

# Number of captions by length in tokens, without start and end: 300 captions of CC3M's validation
# set, under the tokenizers of the two published checkpoints.
_CAPTIONS_BY_LENGTH = {
    "blip": {
        5: 21, 6: 33, 7: 28, 8: 36, 9: 28, 10: 24, 11: 32, 12: 17, 13: 9, 14: 12, 15: 10, 16: 14,
        17: 11, 18: 5, 19: 5, 20: 4, 21: 2, 22: 2, 23: 3, 25: 2, 31: 2,
    },
    "vit_gpt2": {
        5: 14, 6: 33, 7: 28, 8: 34, 9: 27, 10: 26, 11: 24, 12: 21, 13: 15, 14: 13, 15: 10, 16: 13,
        17: 12, 18: 4, 19: 9, 20: 6, 22: 3, 23: 3, 24: 1, 25: 2, 30: 1, 31: 1,
    },
}


class Rows:
    """`num_rows` captions, each of an image in memory; a function of the arguments alone.

    `pixels` uint8 (N, 3, H, W); `image_of_row` (num_rows,) gives the image of each row;
    `captions` are token ids with START_ID and END_ID, `lengths` (num_rows,) their lengths.
    """

    def __init__(
        self,
        num_rows: int,
        image_size: tuple[int, int],
        *,
        model: str,
        seed: int = 0,
        captions_per_image: int = 1,
    ) -> None:
        generator = np.random.default_rng(seed)
        counts = _CAPTIONS_BY_LENGTH[model]
        shares = np.array(list(counts.values())) / sum(counts.values())
        self.captions = [
            np.array([
                START_ID, *generator.integers(FIRST_WORD_ID, LAST_WORD_ID, length), END_ID
            ])
            for length in generator.choice(list(counts), num_rows, p=shares)
        ]
        self.lengths = np.array([len(caption) for caption in self.captions])
        self.image_of_row = np.arange(num_rows) // captions_per_image
        num_images = -(-num_rows // captions_per_image)
        self.pixels = generator.integers(0, 256, (num_images, 3, *image_size), dtype=np.uint8)
