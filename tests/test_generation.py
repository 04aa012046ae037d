"""Greedy and beam search give the tokens of Hugging Face's `generate`."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import MAX_POSITIONS, hugging_face, random_pixels
from torch import Tensor

from lora_engine.captioning.generation import Sampling, _Sampler, generate
from lora_engine.lora.injection import inject
from lora_engine.models import cross_attention
from lora_engine.models.pretrained import load_captioner

NUM_IMAGES = 8
PROMPT = "a picture of"


@pytest.fixture(params=["blip", "vit_gpt2"])
def pair(request):
    """Ours and Hugging Face's model of a family, with the same changes to both.

    Cross-attention is made to matter, so that images lead to different captions, and the end
    token's logit can be raised (`pair.raised.amount`), so that captions of random models end.
    """
    folder = request.getfixturevalue(f"{request.param}_folder")
    captioner, theirs = load_captioner(folder), hugging_face(folder)
    raised = SimpleNamespace(amount=0.0)
    end_id = captioner.tokenizer.end_id

    def raise_end(module, inputs, logits):
        return logits + raised.amount * (torch.arange(logits.shape[-1]) == end_id)

    for model in (captioner.model, theirs):
        head = captioner.model.tied_head[0].removesuffix(".weight")
        model.get_submodule(head).register_forward_hook(raise_end)
        for name, parameter in model.named_parameters():
            if "crossattention" in name and parameter.dim() == 2:
                parameter.data *= 4
    pixels = random_pixels(NUM_IMAGES, seed=5)
    with torch.no_grad():
        features = captioner.model.encode(pixels)
    return SimpleNamespace(
        model=captioner.model, features=features, tokenizer=captioner.tokenizer, theirs=theirs,
        pixels=pixels, end_id=end_id, pad_id=captioner.tokenizer.pad_id, raised=raised,
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


def test_tokens_are_drawn_as_often_as_they_are_probable():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    count = 20_000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        sampler = _Sampler(Sampling(temperature, top_p, seed=1), range(count), 1)
        drawn = sampler(logits.expand(count, -1), torch.arange(count), 0)
        probs = (logits / temperature).softmax(dim=-1)
        # The first two reach 0.87, the first one 0.64.
        probs = probs * torch.tensor([1.0, 1, 0, 0, 0]) if top_p < 1 else probs
        shares = torch.bincount(drawn, minlength=5) / count
        torch.testing.assert_close(shares, probs / probs.sum(), atol=0.015, rtol=0)


def test_sampling_goes_with_one_beam_only(pair):
    with pytest.raises(ValueError, match="sampling together with num_beams=2"):
        ours(pair, num_beams=2, sampling=Sampling())


def test_end_and_pad_ids_need_not_be_the_checkpoints(pair):
    """Rows are filled with the given pad id, even if the checkpoint has another one."""
    pair.raised.amount, pair.pad_id = 1.0, 77
    for num_beams in (1, 4):
        tokens = ours(pair, num_beams=num_beams, max_new_tokens=12)
        for row, length in zip(tokens.tolist(), new_lengths(pair, tokens, "")):
            assert row[length + 1 :] == [77] * (len(row) - length - 1)


@pytest.mark.parametrize("settings, message", [
    ({"max_new_tokens": 0}, "max_new_tokens=0, num_beams=1: both must be 1 or more"),
    ({"num_beams": 0}, "num_beams=0: both must be 1 or more"),
    ({"max_new_tokens": MAX_POSITIONS},
     f"prompt of 1 tokens and max_new_tokens={MAX_POSITIONS} need {MAX_POSITIONS + 1} positions, "
     f"but the decoder has {MAX_POSITIONS}"),
])
def test_impossible_lengths_and_beams_are_errors(pair, settings, message):
    with pytest.raises(ValueError, match=message):
        ours(pair, **settings)


def test_the_last_position_can_be_used(pair):
    pair.raised.amount = -100.0
    assert ours(pair, max_new_tokens=MAX_POSITIONS - 1).shape == (NUM_IMAGES, MAX_POSITIONS)
