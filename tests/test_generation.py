"""Greedy and beam search give the tokens of Hugging Face's `generate`; samples are drawn from its
distributions."""

import inspect
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from checkpoints import MAX_POSITIONS, hugging_face, random_pixels, varied
from torch import Tensor

from lora_engine.captioning import generation
from lora_engine.captioning.generation import _Sampler, generate, process_logits
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.lora.injection import inject
from lora_engine.models import cross_attention
from lora_engine.models.pretrained import load_captioner

NUM_IMAGES = 8
PROMPT = "a picture of"


@pytest.fixture(params=["blip", "vit_gpt2"])
def pair(request):
    """Ours and Hugging Face's model of a family, `varied` by `pair.raised`."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    captioner, theirs = load_captioner(folder), hugging_face(folder)
    raised = SimpleNamespace(amount=0.0)
    varied(captioner, theirs, raised=raised)
    pixels = random_pixels(NUM_IMAGES, seed=5)
    with torch.no_grad():
        features = captioner.model.encode(pixels)
    return SimpleNamespace(
        model=captioner.model, features=features, tokenizer=captioner.tokenizer, theirs=theirs,
        pixels=pixels, raised=raised,
        end_id=captioner.tokenizer.end_id, pad_id=captioner.tokenizer.pad_id,
    )


def ours(pair, prompt: str = "", **settings) -> Tensor:
    return generate(
        pair.model, pair.features, prompt_ids=pair.tokenizer.prompt_ids(prompt),
        end_id=pair.end_id, pad_id=pair.pad_id, **settings,
    )


def hugging_faces(pair, prompt: str = "", **settings) -> Tensor:
    prompt_ids = pair.tokenizer.prompt_ids(prompt)
    if pair.theirs.config.model_type == "blip":
        # It puts [DEC] first and drops the last token, which its processor would make [SEP].
        given = {"input_ids": torch.tensor([[0, *prompt_ids[1:], pair.end_id]] * NUM_IMAGES)}
    else:
        given = {"decoder_input_ids": torch.tensor([prompt_ids] * NUM_IMAGES)}
    tokens = pair.theirs.generate(
        pixel_values=pair.pixels, do_sample=False, **(given if prompt else {}), **settings
    )
    # Its beam search takes a padding of 0 for none and fills up with the end token instead.
    for row, length in zip(tokens, new_lengths(pair, tokens, prompt)):
        row[len(prompt_ids) + length :] = pair.pad_id
    return tokens


def new_lengths(pair, tokens: Tensor, prompt: str) -> list[int]:
    """Number of new tokens of each row, with its end token."""
    rows = tokens[:, len(pair.tokenizer.prompt_ids(prompt)) :].tolist()
    return [row.index(pair.end_id) + 1 if pair.end_id in row else len(row) for row in rows]


def assert_rows_end_at_different_lengths(pair, tokens: Tensor, prompt: str) -> None:
    ended = {length for length, row in zip(new_lengths(pair, tokens, prompt), tokens.tolist())
             if pair.end_id in row[len(pair.tokenizer.prompt_ids(prompt)) :]}
    assert len(ended) >= 3 and max(ended) >= 4


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_greedy_tokens_equal_hugging_faces(pair, prompt):
    pair.raised.amount = 1.0
    tokens = ours(pair, prompt, max_new_tokens=12)
    assert torch.equal(tokens, hugging_faces(pair, prompt, max_new_tokens=12, num_beams=1))
    assert_rows_end_at_different_lengths(pair, tokens, prompt)


@pytest.mark.parametrize("prompt", ["", PROMPT])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beam_search_tokens_equal_hugging_faces(pair, prompt, length_penalty):
    pair.raised.amount = 1 + length_penalty / 2  # the penalty favors longer captions
    settings = {"num_beams": 4, "max_new_tokens": 12, "length_penalty": length_penalty}
    tokens = ours(pair, prompt, **settings)
    assert torch.equal(tokens, hugging_faces(pair, prompt, **settings))
    assert_rows_end_at_different_lengths(pair, tokens, prompt)


@pytest.mark.parametrize("num_beams", [1, 2, 4])
@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_captions_that_never_end_have_max_new_tokens_as_hugging_faces(
    pair, num_beams, max_new_tokens
):
    pair.raised.amount = -100.0
    settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    tokens = ours(pair, PROMPT, **settings)
    assert tokens.shape[1] == len(pair.tokenizer.prompt_ids(PROMPT)) + max_new_tokens
    assert torch.equal(tokens, hugging_faces(pair, PROMPT, **settings))


def test_captions_that_end_at_once_have_one_new_token(pair):
    pair.raised.amount = 100.0
    for num_beams in (1, 4):
        tokens = ours(pair, num_beams=num_beams, max_new_tokens=5)
        assert tokens.tolist() == [[pair.tokenizer.start_id, pair.end_id]] * NUM_IMAGES


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_gives_each_image_the_caption_it_gets_alone(pair, num_beams):
    pair.raised.amount = 1.0
    settings = {"num_beams": num_beams, "max_new_tokens": 8}
    together = ours(pair, **settings)
    for index in range(NUM_IMAGES):
        pair.features, features = pair.features[index : index + 1], pair.features
        alone = ours(pair, **settings)[0].tolist()
        pair.features = features
        rest = together[index].tolist()[len(alone):]
        assert together[index].tolist()[: len(alone)] == alone
        assert rest == [pair.pad_id] * len(rest)


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("form", ["absorbed", "projected"])
def test_captions_that_have_ended_leave_the_batch(pair, monkeypatch, num_beams, form):
    """In both forms of cross-attention: with keys and values that are kept, and with none."""
    monkeypatch.setattr(cross_attention, "absorbs", lambda *_, **__: form == "absorbed")
    sizes = []
    decode = pair.model.decode
    monkeypatch.setattr(
        pair.model, "decode",
        lambda ids, features, cache: sizes.append((len(ids), len(features)))
        or decode(ids, features, cache),
    )
    pair.raised.amount = 1.0
    tokens = ours(pair, num_beams=num_beams, max_new_tokens=12)
    assert torch.equal(tokens, hugging_faces(pair, max_new_tokens=12, num_beams=num_beams))
    assert all(rows == num_beams * images for rows, images in sizes)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3


@pytest.mark.parametrize("num_beams", [1, 4])
def test_no_caption_ends_before_min_new_tokens(pair, num_beams):
    pair.raised.amount = 3.0
    settings = {"num_beams": num_beams, "max_new_tokens": 12, "min_new_tokens": 5}
    tokens = ours(pair, PROMPT, **settings)
    assert torch.equal(tokens, hugging_faces(pair, PROMPT, **settings))
    assert min(new_lengths(pair, tokens, PROMPT)) == 6  # the end token among them
    assert min(new_lengths(pair, ours(pair, PROMPT, max_new_tokens=12), PROMPT)) < 6


def test_an_adapters_part_of_the_features_is_formed_once(pair, monkeypatch):
    inject(pair.model, ["attention"], rank=2)
    pair.model.eval()
    calls = []
    real = cross_attention.low_rank_inputs
    monkeypatch.setattr(
        cross_attention, "low_rank_inputs", lambda *args: calls.append(1) or real(*args)
    )
    pair.raised.amount = -100.0
    ours(pair, max_new_tokens=6)
    assert len(calls) == 1


# --- settings that change logits, and several captions ---------------------------------------

PENALTIES = [
    {"repetition_penalty": 1.3, "min_new_tokens": 2},
    {"repetition_penalty": 0.7, "no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 4},
    {"num_beams": 3, "num_return_sequences": 3, "repetition_penalty": 1.5, "min_new_tokens": 2},
    {"num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "length_penalty": -1.0},
]


def test_penalties_and_several_beams_give_hugging_faces_tokens(pair):
    for number, settings in enumerate(PENALTIES):
        prompt = PROMPT if number % 2 else ""
        pair.raised.amount = 1.5 if "num_beams" in settings else 1.0
        settings = {"num_beams": 1, "max_new_tokens": 7, **settings}
        tokens = ours(pair, prompt, **settings)
        assert torch.equal(tokens, hugging_faces(pair, prompt, **settings)), settings
        plain = ours(pair, prompt, num_beams=settings["num_beams"], max_new_tokens=7)
        assert tokens.tolist() != plain.tolist(), settings
        assert len(tokens) == NUM_IMAGES * settings.get("num_return_sequences", 1)


def test_samples_are_drawn_from_hugging_faces_distributions(pair):
    given = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3,
             "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 6}
    prompt_ids = pair.tokenizer.prompt_ids(PROMPT)
    pair.raised.amount = 3.0
    theirs = hugging_faces_samples(pair, PROMPT, **given)
    for step, (logits, scores) in enumerate(zip(theirs.logits, theirs.scores)):
        processed = process_logits(
            logits, theirs.sequences[:, : len(prompt_ids) + step], GenerationSettings(**given),
            prompt_length=len(prompt_ids), end_id=pair.end_id,
        )
        assert torch.equal(processed, scores)
        assert processed.isfinite().sum(dim=1).max() <= 20


def hugging_faces_samples(pair, prompt: str, **settings):
    prompt_ids = torch.tensor([pair.tokenizer.prompt_ids(prompt)] * NUM_IMAGES)
    name = "decoder_input_ids"
    if pair.theirs.config.model_type == "blip":
        name, prompt_ids = "input_ids", torch.nn.functional.pad(prompt_ids, (0, 1))
    return pair.theirs.generate(
        pixel_values=pair.pixels, do_sample=True, output_logits=True, output_scores=True,
        return_dict_in_generate=True, **{name: prompt_ids}, **settings,
    )


@pytest.mark.parametrize("settings", [
    {"top_k": 3}, {"top_k": 99}, {"top_p": 0.5}, {"top_p": 1e-9}, {"top_k": 4, "top_p": 0.9},
    {"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 9},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.7, "no_repeat_ngram_size": 3},
])
def test_ties_and_extreme_settings_are_processed_as_by_hugging_face(settings):
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    settings = {"temperature": 1.0, **settings}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 12, generator=generator).mul(2).round()  # with many equal ones
    logits[0] = torch.tensor(4 * [0.0] + 8 * [-torch.inf])  # half of it is exactly top_p 0.5
    tokens = torch.randint(4, (64, 7), generator=generator)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=12))
    config = GenerationConfig(do_sample=True, eos_token_id=0, **({"top_k": 0} | settings))
    model._prepare_special_tokens(config)
    expected = model._get_logits_processor(config, input_ids_seq_length=2)(tokens, logits.clone())
    found = process_logits(
        logits, tokens, GenerationSettings(**settings), prompt_length=2, end_id=0
    )
    assert torch.equal(found, expected)


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    count = 20_000
    sampler = _Sampler(GenerationSettings(temperature=1.0, max_new_tokens=1, seed=1), range(count))
    drawn = sampler(logits.expand(count, -1), torch.arange(count), 0)
    shares = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(shares, logits.softmax(dim=-1), atol=0.015, rtol=0)


def test_samples_depend_on_seed_and_image_and_share_the_images_features(pair, monkeypatch):
    pair.raised.amount = 3.5
    settings = {"temperature": 1.5, "top_k": 50, "seed": 3, "min_new_tokens": 2}
    settings["max_new_tokens"] = 12
    once = ours(pair, **settings)
    decode, sizes = pair.model.decode, []
    monkeypatch.setattr(
        pair.model, "decode",
        lambda ids, features, cache: sizes.append((len(ids), len(features)))
        or decode(ids, features, cache),
    )
    several = ours(pair, num_return_sequences=3, **settings)
    assert all(rows == 3 * images for rows, images in sizes) and len(set(sizes)) >= 2
    lengths = new_lengths(pair, several, "")
    for number in (0, 3, 7):
        rows = [
            row[: 1 + length]
            for row, length in zip(several.tolist(), lengths)
        ][3 * number : 3 * number + 3]
        assert len(set(map(tuple, rows))) >= 2
        assert once[number].tolist()[: len(rows[0])] == rows[0]
        alone = generate(
            pair.model, pair.features[number : number + 1], numbers=[number],
            prompt_ids=pair.tokenizer.prompt_ids(), end_id=pair.end_id, pad_id=pair.pad_id,
            num_return_sequences=3, **settings,
        )
        assert [row[: len(own)] for row, own in zip(alone.tolist(), rows)] == rows
    for row, length in zip(several.tolist(), lengths):
        assert row[1 + length :] == [pair.pad_id] * (len(row) - 1 - length)
    assert len(set(lengths)) >= 3


def test_default_settings_leave_logits_as_they_are(pair, monkeypatch):
    monkeypatch.setattr(generation, "process_logits", None)
    for num_beams in (1, 2):
        ours(pair, num_beams=num_beams, max_new_tokens=2)


def test_generate_has_the_settings_as_keywords():
    keywords = inspect.signature(generate).parameters
    for field in fields(GenerationSettings):
        assert keywords[field.name].default == field.default
        assert keywords[field.name].annotation in (int, float, float | None)


@pytest.mark.parametrize("settings, message", [
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
    ({"num_beams": 0}, "num_beams is 0; it must be at least 1 and at most 1000"),
    ({"min_new_tokens": 31}, r"min_new_tokens is 31; it must be from 0 to max_new_tokens \(30\)"),
    ({"num_beams": 2.0}, "num_beams is 2.0; it must be a whole number"),
    ({"num_beams": "2"}, "num_beams is '2'; it must be a whole number"),
    ({"temperature": 0}, "temperature is 0; it must be 1e-06 or more"),
    ({"temperature": 1, "top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 5}, "top_k is for sampling: give temperature 1, too"),
    ({"top_p": 0.9}, "top_p is for sampling"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be at least 0.01"),
    ({"length_penalty": float("nan"), "num_beams": 2}, "is nan; it must be at least -10"),
    ({"length_penalty": 1e3, "num_beams": 2}, "must be at least -10 and at most 10"),
    ({"length_penalty": 2.0}, "length_penalty ranks beams: give num_beams 4, too"),
    ({"num_return_sequences": 3}, "greedy search finds one caption: give num_beams 3, or temp"),
    ({"num_return_sequences": 3, "num_beams": 2}, r"it must be at most num_beams \(2\)"),
    ({"num_beams": 2, "temperature": 1.0}, "temperature samples and num_beams searches"),
])
def test_settings_out_of_range_or_that_contradict_each_other_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings).check_generation()


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-6, "repetition_penalty": 0.01, "top_p": 0.5},
    {"temperature": 1e-6, "repetition_penalty": 100.0},
    {"num_beams": 2, "length_penalty": 10.0},
    {"num_beams": 2, "length_penalty": -10.0, "repetition_penalty": 0.01},
])
def test_settings_at_the_ends_of_their_ranges_do_not_overflow(pair, settings):
    assert len(ours(pair, max_new_tokens=3, **settings)) == NUM_IMAGES


def test_settings_are_changed_by_text():
    settings = GenerationSettings(max_new_tokens=9)
    assert settings.changed("--num-beams=4, length_penalty=0.5") == GenerationSettings(
        max_new_tokens=9, num_beams=4, length_penalty=0.5
    )
    for text, message in (
        ("colors=4", "no setting 'colors'; expected num_beams, max_new_tokens"),
        ("num_beams=4.5", "num_beams is '4.5'; it must be a whole number"),
        ("temperature=hot", "temperature is 'hot'; it must be a number"),
        ("", "no setting ''"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.changed(text)


def test_end_and_pad_ids_need_not_be_the_checkpoints(pair):
    """Rows are filled with the given pad id, even if the checkpoint has another one."""
    pair.raised.amount, pair.pad_id = 1.0, 77
    for num_beams in (1, 4):
        tokens = ours(pair, num_beams=num_beams, max_new_tokens=12)
        for row, length in zip(tokens.tolist(), new_lengths(pair, tokens, "")):
            assert row[length + 1 :] == [77] * (len(row) - length - 1)


def test_captions_longer_than_the_decoders_positions_are_an_error(pair):
    with pytest.raises(ValueError, match=(
        f"prompt of 1 tokens and max_new_tokens={MAX_POSITIONS} need {MAX_POSITIONS + 1} "
        f"positions, but the decoder has {MAX_POSITIONS}"
    )):
        ours(pair, max_new_tokens=MAX_POSITIONS)


def test_the_last_position_can_be_used(pair):
    pair.raised.amount = -100.0
    assert ours(pair, max_new_tokens=MAX_POSITIONS - 1).shape == (NUM_IMAGES, MAX_POSITIONS)
