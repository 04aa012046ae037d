"""Heat maps: transformers' attention probabilities, words of tokens, and places in the image."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import hugging_face, random_pixels
from peft import PeftModel
from PIL import Image
from torch import nn

from lora_engine.captioning.attention_map import (
    cross_attention_probs,
    heat_map,
    on_patches,
    word_attention,
    words_of_tokens,
)
from lora_engine.data.pixels import PixelSettings
from lora_engine.lora.adapter import save_adapter
from lora_engine.lora.injection import inject, lora_layers, lora_parameters, merge
from lora_engine.models.attention import KeyValueCache

INPUT_IDS = torch.randint(20, 200, (4, 6), generator=torch.Generator().manual_seed(4))


# --- probabilities --------------------------------------------------------------------------


def test_probabilities_equal_transformers_with_the_adapter_merged_and_unmerged(
    captioner, captioner_folder, tmp_path
):
    model = captioner.model
    inject(model, ["attention"], rank=2, dropout=0.0)
    for matrix in lora_parameters(model).values():
        nn.init.normal_(matrix, std=0.1)
    save_adapter(model, tmp_path, base_model=str(captioner_folder))
    theirs = hugging_face(captioner_folder)
    theirs.set_attn_implementation("eager")
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path)).eval().base_model.model
    with torch.no_grad():
        features = model.encode(random_pixels(2))  # two rows per image
        expected = torch.stack((getattr(theirs, "text_decoder", None) or theirs.decoder)(
            INPUT_IDS,
            encoder_hidden_states=features.repeat_interleave(2, dim=0),
            output_attentions=True,
        ).cross_attentions)
    unmerged = cross_attention_probs(model, INPUT_IDS, features)
    for _, layer in lora_layers(model):  # a layer with a hook is called
        layer.register_forward_hook(lambda *_: None)
    hooked = cross_attention_probs(model, INPUT_IDS, features)
    merge(model)
    merged = cross_attention_probs(model, INPUT_IDS, features)
    assert expected.std(dim=-1).max() > 0.01  # not all alike
    for ours in (unmerged, hooked, merged):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_probabilities_are_recorded_on_demand_only(captioner):
    with torch.no_grad():
        features = captioner.model.encode(random_pixels(1))
        cache = KeyValueCache(num_tokens=6)
        captioner.model.decode(INPUT_IDS[:1], features, cache)
    assert all(layer.cross_attention_probs is None for layer in cache.layers.values())


def test_a_decoder_without_recorded_probabilities_is_refused():
    model = SimpleNamespace(decode=lambda *_: None, decoder=nn.Identity())
    with pytest.raises(ValueError, match="^Identity does not record its cross-attention$"):
        cross_attention_probs(model, INPUT_IDS, torch.zeros(1, 3, 2))


# --- words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_a_word_has_the_mean_attention_of_the_positions_that_predict_its_tokens(
    captioner, prompt
):
    """In both vocabularies "teams" is more than one token."""
    captioner = replace(captioner, prompt=prompt)
    with torch.no_grad():
        features = captioner.model.encode(random_pixels(1))
    (row,) = captioner.tokenizer.encode(["a dog teams"], prompt=prompt)
    ids = torch.tensor(row.astype(np.int64))[None]
    num_prompt, num_last = len(captioner.tokenizer.prompt_ids(prompt)), ids.shape[1] - 1
    probs = cross_attention_probs(captioner.model, ids[:, :-1], features)[:, 0]
    words, of_words = word_attention(captioner, features, "a dog teams")
    assert words == ["a", "dog", "teams"] and num_last - num_prompt > 3
    positions = [range(num_prompt - 1, num_prompt), range(num_prompt, num_prompt + 1),
                 range(num_prompt + 1, num_last - 1)]
    for ours, its in zip(of_words, positions, strict=True):
        torch.testing.assert_close(ours, probs[:, :, list(its)].mean(dim=2))


@pytest.mark.parametrize("caption", ["", "dog"])
def test_captions_of_no_word_and_of_one(captioner, caption):
    with torch.no_grad():
        features = captioner.model.encode(random_pixels(1))
    words, of_words = word_attention(captioner, features, caption)
    assert words == caption.split() and len(of_words) == len(words)


def test_words_are_those_of_the_text_whatever_its_tokens():
    """A token may be two words, part of one, or none; another may join two words."""
    texts = ["", "new york", "new york 's", "new york's", "new york's bay"]
    tokenizer = SimpleNamespace(end_id=9, decode=lambda ids: texts[len(ids)])
    assert words_of_tokens(tokenizer, [1, 2, 3, 4]) == (
        ["new", "york's", "bay"], [[0], [0, 2], [1, 3]]
    )


# --- places in the image --------------------------------------------------------------------


def settings(resize, crop=None) -> PixelSettings:
    return PixelSettings(resize, 3, (0.5,) * 3, (0.5,) * 3, crop)


@pytest.mark.parametrize("image_size, num_tokens, shape", [
    ((384, 384), 577, (24, 24)), ((224, 224), 197, (14, 14)), ((224, 224), 198, (14, 14)),
    ((64, 64), 17, (4, 4)), ((64, 96), 25, (4, 6)), ((2, 2), 4, (2, 2)),
])
def test_patches_come_after_the_class_tokens(image_size, num_tokens, shape):
    encoder = SimpleNamespace(image_size=image_size)
    patches = on_patches(torch.arange(num_tokens), encoder)
    assert patches.shape == shape
    assert patches.flatten().tolist() == list(range(num_tokens))[-shape[0] * shape[1] :]


@pytest.mark.parametrize("pixel_settings, center, brightest", [
    # Squeezed to a square: as wide a share of the image as of the square.
    (settings((64, 64)), (1, 2), (250, 75)),
    # The middle 200 x 200 of 400 x 200: a patch is 50 pixels wide.
    (settings(64, crop=(64, 64)), (1, 2), (225, 75)),
])
def test_a_heat_map_is_brightest_where_the_patch_lies(pixel_settings, center, brightest):
    patches = torch.zeros(4, 4)
    patches[center] = 0.01
    image = Image.new("RGB", (400, 200), (90, 90, 90))
    pixels = np.asarray(heat_map(image, patches, pixel_settings)).astype(int)
    assert pixels.shape == (200, 400, 3)
    colored = pixels[:, :, 0] - pixels[:, :, 2]  # orange is more red than blue
    y, x = np.argwhere(colored > 0.9 * colored.max()).mean(axis=0)
    assert abs(x - brightest[0]) < 5 and abs(y - brightest[1]) < 5
    assert (pixels[175:] == 90).all()  # gray elsewhere
