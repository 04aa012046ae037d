"""Captions as token ids: start, prompt, caption, end; tokenized once, kept in one flat array.

    <start> prompt caption <end>        BLIP: [DEC] ... [SEP]; GPT-2: <|endoftext|> at both ends

Each position predicts the next token. The prompt is given, so it is not a target. One end token
is a target (none of a truncated caption), although GPT-2's padding has the same id: padding is
identified by length, not by id. Captions are stripped and otherwise tokenized as they are; after a
prompt a caption begins with a space, as in running text.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_engine.data.columns import Columns, ColumnWriter
from lora_engine.data.word_tokens import WordTokens

IGNORED = -100  # as a target: F.cross_entropy's ignore_index

# What normalizers and pre-tokenizers distinguish: case, accents, spaces, scripts, signs, digits.
_PROBE = (
    "The QUICK fox's 3,000 naïve Façades e.g. \u201cÜNÏTED\u201d\u00a0日本語 \t e\u0301 - [SEP]!"
)

_CHUNK = 10_000  # captions tokenized per call; bounds the Python lists of a large data set


@dataclass(frozen=True)
class TokenizedCaptions:
    """Token ids of many captions, concatenated in one array.

    `lengths` (number of captions,) counts each caption's tokens with start, prompt and end; `ends`
    is where each ends in `ids`. `num_truncated` captions were longer than allowed and have no end
    token, so that the model does not learn to stop in the middle of a sentence. `num_unknown` of
    the captions' `num_tokens` own tokens stand for characters that the tokenizer does not know.
    """

    ids: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    num_truncated: int = 0
    num_unknown: int = 0
    num_tokens: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        end = int(self.ends[index])
        return self.ids[end - int(self.lengths[index]) : end]


class TokenChunk(NamedTuple):
    """Tokens of some captions: ids, lengths, and the counts of `TokenizedCaptions`."""

    ids: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


def write_tokens(writer: ColumnWriter, chunks: Iterable[TokenChunk]) -> None:
    """Append chunks to the columns that `tokenized` reads."""
    num_ids, counts = 0, np.zeros(3, dtype=np.uint64)
    for chunk in chain(chunks, [TokenChunk(*map(np.array, _NO_TOKENS))]):
        writer.append("ids", chunk.ids.astype(np.uint64))
        writer.append("length", chunk.lengths.astype(np.int16))
        writer.append("end", num_ids + np.cumsum(chunk.lengths, dtype=np.uint64))
        num_ids += len(chunk.ids)
        counts += chunk.counts.astype(np.uint64)
    writer.append("counts", counts)


_NO_TOKENS: tuple[list[int], list[int], list[int]] = ([], [], [0, 0, 0])  # there may be no caption


def tokenized(columns: Columns) -> TokenizedCaptions:
    """Tokenized captions from the columns that `write_tokens` has written."""
    return TokenizedCaptions(
        columns["ids"], columns["length"], columns["end"], *map(int, columns["counts"])
    )


class CaptionTokenizer:
    """A checkpoint's tokenizer, with the ids that its decoder starts, ends and pads with.

    `tokenizer` is a Hugging Face tokenizer. It need not have a token for `start_id`: BLIP's has
    none.
    """

    def __init__(self, tokenizer, *, start_id: int, end_id: int, pad_id: int, max_positions: int):
        self.tokenizer = tokenizer
        self.start_id = start_id
        self.end_id = end_id
        self.pad_id = pad_id
        self.max_positions = max_positions
        unknown: Any = getattr(tokenizer, "unk_token_id", None)
        # GPT-2's "unknown" token is its end token, but as it works on bytes it knows everything.
        is_special = unknown is None or unknown in (start_id, end_id, pad_id)
        self.unknown_id = -1 if is_special else unknown

    def prompt_ids(self, prompt: str = "") -> list[int]:
        """The tokens that generation starts from: the start token and the prompt."""
        return [self.start_id, *self._tokenize([prompt.rstrip()])[0]]

    def encode(
        self,
        captions: Iterable[str],
        *,
        prompt: str = "",
        max_caption_tokens: int = 64,
    ) -> TokenizedCaptions:
        """Tokenize captions for training, truncating each to `max_caption_tokens` tokens.

        Raises ValueError if prompt and caption together may exceed the decoder's positions.
        """
        self.check_length(prompt, max_caption_tokens)
        writer = ColumnWriter(None)
        write_tokens(
            writer,
            self.encode_chunks(captions, prompt=prompt, max_caption_tokens=max_caption_tokens),
        )
        return tokenized(writer.finish())

    def check_length(self, prompt: str, max_caption_tokens: int) -> None:
        """Raises ValueError if prompt and caption together may exceed the decoder's positions."""
        needed = len(self.prompt_ids(prompt)) + max_caption_tokens
        if needed > self.max_positions:
            raise ValueError(
                f"prompt and caption may need {needed} positions, but the decoder has "
                f"{self.max_positions}; choose a smaller --max_caption_tokens "
                f"(now {max_caption_tokens}) or a shorter --prompt"
            )

    def encode_chunks(
        self, captions: Iterable[str], *, prompt: str, max_caption_tokens: int
    ) -> Iterator[TokenChunk]:
        """Tokenize captions as `encode` does, a chunk at a time."""
        prefix = self.prompt_ids(prompt)
        space = " " if prompt.strip() else ""
        tokenize = WordTokens(self._tokenize)
        captions = iter(captions)
        while texts := [space + caption.strip() for caption in islice(captions, _CHUNK)]:
            chunk: list[int] = []
            lengths = np.empty(len(texts), dtype=np.int16)
            num_truncated = num_unknown = num_tokens = 0
            for index, ids in enumerate(tokenize(texts)):
                is_too_long = len(ids) > max_caption_tokens
                tail = ids[:max_caption_tokens] if is_too_long else [*ids, self.end_id]
                chunk += prefix
                chunk += tail
                lengths[index] = len(prefix) + len(tail)
                num_truncated += is_too_long
                num_unknown += ids.count(self.unknown_id)
                num_tokens += len(ids)
            counts = np.array([num_truncated, num_unknown, num_tokens], dtype=np.uint64)
            yield TokenChunk(np.array(chunk, dtype=np.uint64), lengths, counts)

    def count_tokens(self, captions: Iterable[str]) -> tuple[np.ndarray, int]:
        """The number of tokens of each caption alone, int (number of captions,), and of unknown
        tokens in all of them."""
        tokenize, captions = WordTokens(self._tokenize), iter(captions)
        lengths: list[int] = []
        num_unknown = 0
        while chunk := list(islice(captions, _CHUNK)):
            for ids in tokenize(chunk):
                lengths.append(len(ids))
                num_unknown += ids.count(self.unknown_id)
        return np.array(lengths, dtype=int), num_unknown

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids (without start and prompt), up to the first end token."""
        kept = takewhile(lambda token: token != self.end_id, ids)
        return self.tokenizer.decode(list(kept), skip_special_tokens=True).strip()

    def behavior(self) -> list:
        """Everything that token ids depend on, as JSON: vocabulary, special ids, and encoded texts.

        A tokenizer's own serialization would differ between versions of its library.
        """
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        words = [token for token, _ in vocabulary]
        texts = [" ".join(words[begin : begin + 256]) for begin in range(0, len(words), 256)]
        special_ids = [self.start_id, self.end_id, self.pad_id]
        return [vocabulary, special_ids, self._tokenize([*texts, _PROBE])]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # "[SEP]" in a caption is text, not an end token
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]


def collate_captions(
    rows: Sequence[np.ndarray], *, prompt_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Pad token rows to the longest -> (input_ids, targets), both (B, T).

    `targets[b, t]` is the token that follows `input_ids[b, t]`, or `IGNORED` where that is padding
    or part of the prompt (`prompt_length` counts it with the start token).
    """
    num_tokens = max((len(row) - 1 for row in rows), default=0)
    input_ids = np.full((len(rows), num_tokens), pad_id, dtype=np.int64)
    targets = np.full((len(rows), num_tokens), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row) - 1] = row[:-1]
        targets[index, prompt_length - 1 : len(row) - 1] = row[prompt_length:]
    return torch.from_numpy(input_ids), torch.from_numpy(targets)
