"""Captions as token ids: which tokens are targets, and decoding."""

import pytest
import torch
from checkpoints import CAPTIONS, MAX_POSITIONS, WORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_engine.data.captions import IGNORED, CaptionTokenizer, TokenizedCaptions, collate_captions
from lora_engine.models.pretrained import load_captioner

PROMPT = "a picture of"


@pytest.fixture(scope="module")
def tokenizer(captioner_folder) -> CaptionTokenizer:
    return load_captioner(captioner_folder).tokenizer


def rows(tokens: TokenizedCaptions) -> list[list[int]]:
    return [tokens[index].tolist() for index in range(len(tokens))]


def collate(tokenizer, tokens: TokenizedCaptions, prompt: str = ""):
    return collate_captions(
        [tokens[index] for index in range(len(tokens))],
        prompt_length=len(tokenizer.prompt_ids(prompt)), pad_id=tokenizer.pad_id,
    )


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]


# --- encoding -------------------------------------------------------------------------------


def test_a_caption_is_start_tokens_end(tokenizer):
    for caption, row in zip(CAPTIONS, rows(tokenizer.encode(CAPTIONS))):
        assert row == [tokenizer.start_id, *plain_ids(tokenizer, caption), tokenizer.end_id]


def test_a_caption_is_tokenized_stripped_and_without_a_space_before_it(tokenizer):
    bare, padded = rows(tokenizer.encode(["two people", " \n two people\t"]))
    assert bare == padded == [
        tokenizer.start_id, *plain_ids(tokenizer, "two people"), tokenizer.end_id
    ]


def test_a_caption_after_a_prompt_continues_its_text(tokenizer):
    for prompt in (PROMPT, f"{PROMPT} "):
        row = rows(tokenizer.encode(["two people"], prompt=prompt))[0]
        text = plain_ids(tokenizer, f"{PROMPT} two people")
        assert row == [tokenizer.start_id, *text, tokenizer.end_id]
        prefix = tokenizer.prompt_ids(prompt)
        assert prefix == [tokenizer.start_id, *plain_ids(tokenizer, PROMPT)] == row[: len(prefix)]


def test_generation_without_a_prompt_starts_from_the_start_token_alone(tokenizer):
    assert tokenizer.prompt_ids() == tokenizer.prompt_ids("  ") == [tokenizer.start_id]


def test_captions_are_concatenated(tokenizer):
    tokens = tokenizer.encode(CAPTIONS)
    assert tokens.ids.tolist() == [token for row in rows(tokens) for token in row]
    assert tokens.ids.dtype.itemsize <= 2 and tokens.num_truncated == 0
    assert tokens.lengths.tolist() == [len(row) for row in rows(tokens)]
    assert len(tokens) == len(CAPTIONS) and len(tokenizer.encode([])) == 0


def test_many_captions_are_tokenized_in_chunks_without_a_difference(tokenizer, monkeypatch):
    expected = tokenizer.encode(CAPTIONS * 3, max_caption_tokens=5)
    monkeypatch.setattr("lora_engine.data.captions._CHUNK", 4)
    tokens = tokenizer.encode(iter(CAPTIONS * 3), max_caption_tokens=5)
    assert rows(tokens) == rows(expected)
    assert tokens.num_truncated == expected.num_truncated == 3 * 4


def test_a_truncated_caption_has_no_end_token(tokenizer):
    whole = rows(tokenizer.encode(CAPTIONS, prompt=PROMPT))
    length = min(map(len, whole)) - len(tokenizer.prompt_ids(PROMPT)) - 1  # of the shortest
    tokens = tokenizer.encode(CAPTIONS, prompt=PROMPT, max_caption_tokens=length)
    assert tokens.num_truncated == len(CAPTIONS) - 1
    for row, full in zip(rows(tokens), whole):
        if len(row) == len(full):
            assert row == full and row[-1] == tokenizer.end_id
        else:
            assert row == full[: len(tokenizer.prompt_ids(PROMPT)) + length]
            assert tokenizer.end_id not in row[1:]


def test_names_of_special_tokens_in_a_caption_are_plain_text(tokenizer):
    """Otherwise a caption could end, or hold a pad, in the middle."""
    special = set(tokenizer.tokenizer.all_special_tokens)
    assert special
    for name in special:
        row = rows(tokenizer.encode([f"a {name} b"]))[0]
        assert not set(row[1:-1]) & set(tokenizer.tokenizer.all_special_ids)
        assert len(row) > len(tokenizer.encode(["a b"])[0]) + 1


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_captions_may_use_every_position_but_not_one_more(tokenizer, prompt):
    num_left = MAX_POSITIONS - len(tokenizer.prompt_ids(prompt))
    longest = tokenizer.encode(["a " * 200], prompt=prompt, max_caption_tokens=num_left)
    assert longest.lengths.tolist() == [MAX_POSITIONS]
    with pytest.raises(ValueError) as caught:
        tokenizer.encode(CAPTIONS, prompt=prompt, max_caption_tokens=num_left + 1)
    for part in (str(MAX_POSITIONS), str(MAX_POSITIONS + 1), "--max_caption_tokens", "--prompt"):
        assert part in str(caught.value)


# --- targets --------------------------------------------------------------------------------


def test_every_position_predicts_the_next_token(tokenizer):
    tokens = tokenizer.encode(CAPTIONS)
    input_ids, targets = collate(tokenizer, tokens)
    assert input_ids.shape == targets.shape == (len(CAPTIONS), max(tokens.lengths) - 1)
    assert input_ids.dtype == targets.dtype == torch.int64
    for index, row in enumerate(rows(tokens)):
        length = len(row) - 1
        assert input_ids[index, :length].tolist() == row[:-1]
        assert targets[index, :length].tolist() == row[1:]
        assert (input_ids[index, length:] == tokenizer.pad_id).all()
        assert (targets[index, length:] == IGNORED).all()


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_exactly_one_end_token_is_a_target_even_where_it_is_the_padding_too(tokenizer, prompt):
    tokens = tokenizer.encode(CAPTIONS, prompt=prompt)
    input_ids, targets = collate(tokenizer, tokens, prompt)
    if tokenizer.pad_id == tokenizer.end_id:
        assert (input_ids == tokenizer.end_id).sum(dim=1).max() > 1
    assert ((targets == tokenizer.end_id).sum(dim=1) == 1).all()
    last = torch.from_numpy(tokens.lengths).long() - 2
    assert (targets[torch.arange(len(targets)), last] == tokenizer.end_id).all()


def test_the_prompt_is_no_target_but_the_first_caption_token_is(tokenizer):
    tokens = tokenizer.encode(CAPTIONS, prompt=PROMPT)
    input_ids, targets = collate(tokenizer, tokens, PROMPT)
    prompt_length = len(tokenizer.prompt_ids(PROMPT))
    assert prompt_length > 2
    assert (targets[:, : prompt_length - 1] == IGNORED).all()
    assert torch.equal(targets[:, prompt_length - 1], input_ids[:, prompt_length])
    num_targets = (targets != IGNORED).sum(dim=1)
    assert num_targets.tolist() == (tokens.lengths - prompt_length).tolist()


# --- back to text ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_decoding_inverts_encoding(tokenizer, prompt):
    tokens = tokenizer.encode(CAPTIONS, prompt=prompt)
    start = len(tokenizer.prompt_ids(prompt))
    assert [tokenizer.decode(row[start:]) for row in rows(tokens)] == CAPTIONS


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join))
def test_decoding_inverts_encoding_of_any_words(tokenizer, caption):
    assert tokenizer.decode(tokenizer.encode([caption])[0][1:]) == caption


def test_gpt2_keeps_any_text_byte_for_byte(vit_gpt2_folder):
    tokenizer = load_captioner(vit_gpt2_folder).tokenizer
    for text in ("Café № 5 — “Ünï”", "two  spaces ,comma", "日本語 🙂", "don't"):
        assert tokenizer.decode(tokenizer.encode([text])[0][1:]) == text


def test_decoding_stops_at_the_first_end_token(tokenizer):
    ids = plain_ids(tokenizer, "two people")
    for tail in ([], [tokenizer.end_id], [tokenizer.end_id, tokenizer.pad_id, *ids]):
        assert tokenizer.decode(ids + tail) == "two people"
        assert tokenizer.decode(torch.tensor(ids + tail)) == "two people"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.end_id]) == ""


def test_ids_that_the_tokenizer_does_not_know_are_left_out(tokenizer):
    first, *rest = plain_ids(tokenizer, "two people")
    unknown = len(tokenizer.tokenizer)  # BLIP's own start token is one
    assert tokenizer.decode([unknown, first, unknown + 1, *rest]) == "two people"
