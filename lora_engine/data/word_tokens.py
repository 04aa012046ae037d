"""Captions -> token ids, word by word: each different word is tokenized once.

Captions repeat a few ten thousand words, and both families' tokenizers split text at spaces before
anything else: BERT's drops the spaces, GPT-2's leaves each one with the word after it. So the
tokens of a caption are those of its words, and looking words up takes a tenth of the time of
tokenizing captions. Whether this holds for a tokenizer is not assumed but checked, on a sample of
all captions; if it does not, whole captions are tokenized.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from lora_engine.data.sampling import evenly_spaced

Tokenize = Callable[[list[str]], list[list[int]]]

_NUM_CHECKED = 64  # captions of each call that are also tokenized whole
_MAX_WORDS = 2**20


class WordTokens:
    """Tokenizes texts as `tokenize` does, with a lookup per word where that gives the same ids."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize
        self.is_valid = True
        self._first: dict[str, list[int]] = {}  # of words at the beginning of a text
        self._later: dict[str, list[int]] = {}  # of words after a space

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [i for i, text in enumerate(texts) if _is_plain(text)] if self.is_valid else []
        if not plain:
            return self.tokenize(list(texts)) if texts else []
        split = {i: texts[i].split(" ") for i in plain}
        self._learn(split.values())
        ids = {
            i: [*self._first[first], *chain.from_iterable(map(self._later.__getitem__, later))]
            for i, (first, *later) in split.items()
        }
        checked = [plain[i] for i in evenly_spaced(len(plain), _NUM_CHECKED)]
        other = [i for i in range(len(texts)) if i not in split]
        whole = dict(zip([*checked, *other], self.tokenize([texts[i] for i in [*checked, *other]])))
        if any(ids[i] != whole[i] for i in checked):
            self.is_valid = False
            return self.tokenize(list(texts))
        ids |= whole
        return [ids[i] for i in range(len(texts))]

    def _learn(self, texts: Iterable[list[str]]) -> None:
        """Tokenize the words that are not known yet."""
        if len(self._first) + len(self._later) > _MAX_WORDS:
            self._first.clear()
            self._later.clear()
        texts = list(texts)
        for known, space, words in (
            (self._first, "", {words[0] for words in texts}),
            (self._later, " ", set(chain.from_iterable(words[1:] for words in texts))),
        ):
            new = list(words - known.keys())
            known.update(zip(new, self.tokenize([space + word for word in new]) if new else []))


def _is_plain(text: str) -> bool:
    """Whether a text is words of ASCII letters, digits and signs with single spaces between."""
    return text.isascii() and text.isprintable() and "  " not in text and not text.endswith(" ")
