"""Tokenize the captions of a data set, with several processes if there are many."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from lora_engine.data.captions import (
    CaptionTokenizer,
    TokenChunk,
    TokenizedCaptions,
    tokenized,
    write_tokens,
)
from lora_engine.data.pairs import Pairs
from lora_engine.data.workers import load
from lora_engine.devices import num_processors

_ROWS_AT_ONCE = 50_000  # by one process


def tokenize(
    pairs: Pairs,
    tokenizer: CaptionTokenizer,
    *,
    fingerprint: str,
    prompt: str,
    max_caption_tokens: int,
    num_workers: int | None = None,
) -> TokenizedCaptions:
    """The captions' tokens; those of an index on disk are computed once and kept with it.

    `fingerprint` is that of the tokenizer. Raises ValueError if prompt and caption together may
    exceed the decoder's positions.
    """
    tokenizer.check_length(prompt, max_caption_tokens)
    settings = {"prompt": prompt, "max_caption_tokens": max_caption_tokens}
    chunks = partial(_chunks, pairs, tokenizer, settings, num_workers)
    columns = pairs.derived(
        "tokens", [fingerprint, settings], lambda writer: write_tokens(writer, chunks())
    )
    return tokenized(columns)


def _chunks(
    pairs: Pairs, tokenizer: CaptionTokenizer, settings: dict[str, Any], num_workers: int | None
) -> Iterator[TokenChunk]:
    parts = _Parts(pairs, tokenizer, settings)
    if len(parts) < 2:
        yield from tokenizer.encode_chunks(pairs.captions(), **settings)
        return
    num_workers = min(num_workers or num_processors(), len(parts))
    for chunks in load(parts, batch_size=None, collate_fn=list, num_workers=num_workers):
        yield from chunks


class _Parts(Dataset):
    """Ranges of rows -> their tokens."""

    def __init__(
        self, pairs: Pairs, tokenizer: CaptionTokenizer, settings: dict[str, Any]
    ) -> None:
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.settings = settings

    def __len__(self) -> int:
        return (len(self.pairs) + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE

    def __getitem__(self, number: int) -> list[TokenChunk]:
        begin = number * _ROWS_AT_ONCE
        captions = self.pairs.captions(begin, min(begin + _ROWS_AT_ONCE, len(self.pairs)))
        return list(self.tokenizer.encode_chunks(captions, **self.settings))
