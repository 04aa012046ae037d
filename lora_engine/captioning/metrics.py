"""Scores of captions against references: BLEU, ROUGE-L, CIDEr-D, and signs of degenerate output.

BLEU, ROUGE-L and CIDEr-D are those of the COCO caption evaluation (arXiv:1504.00325, in the code of
salaniz/pycocoevalcap): equal to the last digits for equal tokens. METEOR and SPICE need Java:
`java_metrics.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from lora_engine.captioning.caption_tokens import tokenize

MAX_NGRAM = 4
# Names of the scores for people, the most common ones first.
SCORE_NAMES = {
    "cider_d": "CIDEr-D",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "ended": "Share with an end token",
    "distinct": "Share of distinct captions",
    "repetition": "Share of repeated 3-grams",
    "mean_length": "Mean length (tokens)",
}
BOOTSTRAPPED = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")

_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
# What the reference implementation adds to numerators and denominators of BLEU.
_TINY, _SMALL = 1e-15, 1e-9

Tokens = Sequence[str]
Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of a whole set of captions.

    BLEU and ROUGE-L are between 0 and 1, CIDEr-D between 0 and 10 (and 0 for a single image, whose
    words are all equally frequent). `distinct` is the share of distinct captions, `repetition` the
    mean share of a caption's 3-grams that repeat an earlier one (seq-rep-3, arXiv:1908.04319),
    `ended` the share of captions that reached the end token, or None if unknown. Mean lengths are
    in tokens.
    """

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    distinct: float
    repetition: float
    mean_length: float
    mean_reference_length: float
    ended: float | None
    num_images: int
    num_references: int

    def as_dict(self) -> dict[str, float]:
        """The known scores by name, as in metrics.jsonl."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """Scores of a set of captions, and of each of them: arrays (I,) over the images, in order.

    `bleu_counts` (I, 2 * MAX_NGRAM + 1) are the counts that BLEU is computed from, see `bleu`.
    """

    corpus: Scores
    bleu_4: np.ndarray
    rouge_l: np.ndarray
    cider_d: np.ndarray
    bleu_counts: np.ndarray


class Interval(NamedTuple):
    low: float
    high: float


class References:
    """The references of I images, tokenized and counted once for any number of `score` calls.

    `references[i]` are the texts of image i. CIDEr-D takes its document frequencies from them.
    `tokenize` splits references and captions; pass `str.split` if they are tokenized already.
    Raises ValueError if there is no image, an image has no reference, or a reference no token.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        *,
        tokenize: Callable[[str], list[str]] = tokenize,
    ) -> None:
        if len(references) == 0:
            raise ValueError("no images to score, expected the references of at least one")
        self._tokenize = tokenize
        self._tokens = [self._tokenize_references(*item) for item in enumerate(references)]
        counts = [[ngram_counts(tokens) for tokens in image] for image in self._tokens]
        self._max_counts = [_largest_counts(image) for image in counts]
        self._log_images = math.log(len(references))
        self._idf = {
            ngram: self._log_images - math.log(num_images)
            for ngram, num_images in Counter(chain.from_iterable(self._max_counts)).items()
        }
        self._vectors = [[self._vector(ngrams) for ngrams in image] for image in counts]

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def weighs_words(self) -> bool:
        """Whether some words occur for some images only. Otherwise no word tells images apart, its
        weight is log 1 = 0, and so is every CIDEr-D: for one image, or the same references for all.
        """
        return any(self._idf.values())

    def score(
        self, captions: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> CaptionScores:
        """Score one caption for each image; `ended[i]`: whether caption i reached its end token.

        A caption without a token scores 0. Raises ValueError unless there is one text, and one
        value of `ended`, for each image.
        """
        for name, values in (("captions", captions), ("values of `ended`", ended)):
            if values is not None and len(values) != len(self):
                raise ValueError(
                    f"received {len(values):,} {name} for {len(self):,} images, expected one for "
                    "each image, in their order"
                )
        tokens = [self._tokenize_text(f"caption {i}", text) for i, text in enumerate(captions)]
        counts = [ngram_counts(caption) for caption in tokens]
        bleu_counts = np.array([
            _bleu_counts(*image) for image in zip(tokens, counts, self._tokens, self._max_counts)
        ])
        rouge = np.array([rouge_l(*image) for image in zip(tokens, self._tokens)])
        cider = np.array([
            _cider_d(self._vector(ngrams), image) for ngrams, image in zip(counts, self._vectors)
        ])
        reference_lengths = [len(reference) for image in self._tokens for reference in image]
        bleu_1, bleu_2, bleu_3, bleu_4 = bleu(bleu_counts.sum(axis=0)).tolist()
        corpus = Scores(
            bleu_1=bleu_1,
            bleu_2=bleu_2,
            bleu_3=bleu_3,
            bleu_4=bleu_4,
            rouge_l=float(rouge.mean()),
            cider_d=float(cider.mean()),
            distinct=len(set(map(tuple, tokens))) / len(tokens),
            repetition=float(np.mean([_repetition(caption) for caption in tokens])),
            mean_length=float(np.mean([len(caption) for caption in tokens])),
            mean_reference_length=float(np.mean(reference_lengths)),
            ended=None if ended is None else float(np.mean(ended)),
            num_images=len(self),
            num_references=len(reference_lengths),
        )
        return CaptionScores(corpus, bleu(bleu_counts)[:, -1], rouge, cider, bleu_counts)

    def _tokenize_references(self, image: int, texts: Sequence[str]) -> list[list[str]]:
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(
                f"image {image} has {texts!r} as references, expected a list of strings"
            )
        tokens = [self._tokenize_text(f"a reference of image {image}", text) for text in texts]
        for text, found in zip(texts, tokens):
            if not found:
                raise ValueError(
                    f"image {image} has the reference {text!r}, which has no words; remove it, and "
                    "the image if it has no other"
                )
        return tokens

    def _tokenize_text(self, name: str, text: str) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}, expected a string")
        return self._tokenize(text)

    def _vector(self, counts: Mapping[Ngram, int]) -> "_Vector":
        weights = {
            ngram: count * self._idf.get(ngram, self._log_images)
            for ngram, count in counts.items()
        }
        squares = [0.0] * MAX_NGRAM
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        num_bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Vector(weights, [math.sqrt(square) for square in squares], num_bigrams)


def ngram_counts(tokens: Tokens) -> Counter[Ngram]:
    """How often each n-gram of 1 to MAX_NGRAM tokens occurs."""
    return Counter(
        chain.from_iterable(
            zip(*(tokens[start:] for start in range(n))) for n in range(1, MAX_NGRAM + 1)
        )
    )


def _largest_counts(counts: Iterable[Counter[Ngram]]) -> Counter[Ngram]:
    largest: Counter[Ngram] = Counter()
    for ngrams in counts:
        largest |= ngrams
    return largest


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 (..., MAX_NGRAM) from summed counts (..., 2 * MAX_NGRAM + 1).

    The counts are, for each n, the caption's n-grams found in a reference (each at most as often
    as in one of them) and all its n-grams; and the length of the reference closest in length. They
    add up over captions, and BLEU is computed from the sums (Papineni et al., 2002).
    """
    matched, total, reference_length = np.split(counts, [MAX_NGRAM, 2 * MAX_NGRAM], axis=-1)
    precisions = (matched + _TINY) / (total + _SMALL)
    length_ratio = (total[..., :1] + _TINY) / (reference_length + _SMALL)
    brevity_penalty = np.exp(np.minimum(1 - 1 / length_ratio, 0))
    roots = 1 / np.arange(1, MAX_NGRAM + 1)
    return np.cumprod(precisions, axis=-1) ** roots * brevity_penalty


def _bleu_counts(
    caption: Tokens,
    counts: Mapping[Ngram, int],
    references: Sequence[Tokens],
    max_counts: Mapping[Ngram, int],
) -> list[int]:
    matched = [0] * MAX_NGRAM
    for ngram, count in counts.items():
        matched[len(ngram) - 1] += min(count, max_counts.get(ngram, 0))
    total = [max(len(caption) - n, 0) for n in range(MAX_NGRAM)]
    _, closest_length = min((abs(len(r) - len(caption)), len(r)) for r in references)
    return [*matched, *total, closest_length]


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """F-measure of the longest common subsequence; recall has 1.44 times the weight of precision.

    The best precision and the best recall may come from different references, as in the COCO
    caption evaluation.
    """
    common = [_common_length(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(length / len(reference) for length, reference in zip(common, references))
    square = _ROUGE_BETA**2
    return (1 + square) * precision * recall / (recall + square * precision)


def _common_length(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence, one row of its table at a time, as bits.

    Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): a bit of the row is 0 if the
    length grows by one there.
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(one):
        positions[token] = positions.get(token, 0) | 1 << index
    full = row = (1 << len(one)) - 1
    for token in other:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(one) - row.bit_count()


class _Vector(NamedTuple):
    """tf-idf weights of a text's n-grams, their norm for each n, and the text's length.

    The length counts bigrams, one less than tokens, as in the reference implementation.
    """

    weights: dict[Ngram, float]
    norms: list[float]
    length: int


def _cider_d(caption: _Vector, references: Sequence[_Vector]) -> float:
    """10 times the mean cosine over references and n, clipped, with a penalty for unequal lengths.

    arXiv:1411.5726, section "CIDEr-D".
    """
    total = 0.0
    for reference in references:
        products = [0.0] * MAX_NGRAM
        for ngram, weight in caption.weights.items():
            other = reference.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, other) * other
        penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * _CIDER_SIGMA**2))
        for product, *norms in zip(products, caption.norms, reference.norms):
            if all(norms):
                total += product / math.prod(norms) * penalty
    return 10 * total / MAX_NGRAM / len(references)


def _repetition(caption: Tokens) -> float:
    trigrams = list(zip(caption, caption[1:], caption[2:]))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def bootstrap_intervals(
    scores: CaptionScores,
    *,
    baseline: CaptionScores | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % percentile intervals of the scores in BOOTSTRAPPED over resampled images, by name.

    With a `baseline`, other captions of the same images, the intervals are those of the difference
    `scores` minus `baseline`, both on the same resamples. CIDEr-D uses the document frequencies of
    the whole set. Raises ValueError if the baseline has a different number of images.
    """
    resampled = _resampled(scores, num_resamples, seed)
    if baseline is not None:
        if baseline.corpus.num_images != scores.corpus.num_images:
            raise ValueError(
                f"cannot compare scores of {scores.corpus.num_images:,} images with a baseline of "
                f"{baseline.corpus.num_images:,}; score both on the same images"
            )
        resampled -= _resampled(baseline, num_resamples, seed)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0).tolist()
    return dict(zip(BOOTSTRAPPED, map(Interval, low, high)))


def _resampled(scores: CaptionScores, num_resamples: int, seed: int) -> np.ndarray:
    """Corpus scores (num_resamples, 6) of as many images, drawn with replacement."""
    summands = np.column_stack([scores.bleu_counts, scores.rouge_l, scores.cider_d])
    num_images, num_columns = summands.shape
    generator = np.random.default_rng(seed)
    sums = np.empty((num_resamples, num_columns))
    for resample in sums:
        drawn = generator.integers(num_images, size=num_images)
        resample[:] = np.bincount(drawn, minlength=num_images) @ summands
    return np.column_stack([bleu(sums[:, :-2]), sums[:, -2:] / num_images])
