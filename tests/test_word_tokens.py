"""Captions tokenized word by word have the tokens that the tokenizer gives them as a whole."""

import random

import pytest

from lora_engine.data.word_tokens import WordTokens
from lora_engine.models.pretrained import load_tokenizer

NASTY = [
    "a dog", "a  dog", " a dog", "a dog ", "", " ", "don't", "it 's 3,000 $ .", "[SEP] is text",
    "<|endoftext|> too", "naïve Façade", "日本語", "😀 smile", "tab\there", "line\nbreak",
    "nb\u00a0space", "x" * 300, "A.B.C", "e\u0301", "under_score", "don 't", "...", "- -", "<s>",
    "it's the dog's", "I 'll", "THE QUICK", "12 345 6", "a\u200bb", "\ufeffmark", "\x7f", "\x00",
]
WORDS = ["a", "dog", "cat's", "runs", ",", ".", "3", "Paris", "x-ray", "(", "person", "##s"]


@pytest.fixture
def tokenize(captioner_folder):
    return load_tokenizer(captioner_folder)._tokenize


def test_tokens_are_those_of_whole_captions(tokenize):
    generator = random.Random(0)
    texts = NASTY + [" ".join(generator.choices(WORDS, k=8)) for _ in range(500)]
    words = WordTokens(tokenize)
    for _ in range(2):  # the second time all words are known
        assert words(texts) == tokenize(texts)
    assert words.is_valid and words([]) == []


def test_only_new_words_are_tokenized(tokenize):
    seen: list[str] = []
    words = WordTokens(lambda texts: seen.extend(texts) or tokenize(texts))
    words(["a dog runs", "a cat"])
    assert sorted(seen) == sorted(["a", " dog", " runs", " cat", "a dog runs", "a cat"])
    seen.clear()
    words(["a cat runs"])
    assert seen == ["a cat runs"]  # the check


def test_a_tokenizer_that_does_not_split_at_spaces_gets_whole_captions():
    def tokenize(texts):
        return [[len(text)] for text in texts]

    words = WordTokens(tokenize)
    assert words(["a dog", "a cat sits"]) == [[5], [10]] and not words.is_valid
    assert words(["one two"]) == [[7]]


def test_the_memory_of_words_is_bounded(monkeypatch, tokenize):
    monkeypatch.setattr("lora_engine.data.word_tokens._MAX_WORDS", 10)
    words = WordTokens(tokenize)
    for number in range(50):
        text = f"word{number} and{number}"
        assert words([text]) == tokenize([text])
    assert len(words._first) + len(words._later) <= 12
