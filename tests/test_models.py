"""Our models against Hugging Face's: features, logits, loss, caches, checkpointing."""

from pathlib import Path

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import hugging_face, hugging_face_logits, random_pixels

from lora_engine.data.captions import IGNORED, collate_captions
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.models.attention import KeyValueCache
from lora_engine.models.families import FAMILIES
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.models.protocol import CaptioningModel, Decoder, Encoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ragged_batch(captioner: Captioner) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, targets) of captions of many lengths, padded on the right."""
    tokens = captioner.tokenizer.encode(checkpoints.CAPTIONS)
    assert len(set(tokens.lengths)) > 3
    rows = [tokens[index] for index in range(len(tokens))]
    return collate_captions(rows, prompt_length=1, pad_id=captioner.tokenizer.pad_id)


def masked_loss(model, input_ids, features, targets):
    logits = model.head(model.decode(input_ids, features))
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (targets != IGNORED).sum()


def test_every_family_implements_the_protocol(captioner):
    """mypy also checks signatures, at the table of families."""
    model = captioner.model
    assert isinstance(model, CaptioningModel)
    assert isinstance(model.encoder, Encoder) and isinstance(model.decoder, Decoder)


def test_every_family_names_a_recipe():
    recipes = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.py")}
    assert {family.recipe for family in FAMILIES.values()} <= recipes


# --- equal to Hugging Face ------------------------------------------------------------------


def assert_equal_to_hugging_face(folder, *, size=checkpoints.IMAGE_SIZE):
    captioner = load_captioner(folder)
    theirs = hugging_face(folder)
    input_ids, targets = ragged_batch(captioner)
    pixels = random_pixels(len(input_ids), size=size)
    with torch.no_grad():
        features = captioner.model.encode(pixels)
        encoder = getattr(theirs, "vision_model", None) or theirs.encoder
        expected = encoder(pixels).last_hidden_state
        if getattr(theirs, "enc_to_dec_proj", None) is not None:
            expected = theirs.enc_to_dec_proj(expected)
        torch.testing.assert_close(features, expected, **CLOSE)

        logits = captioner.model.head(captioner.model.decode(input_ids, features))
        expected = hugging_face_logits(theirs, pixels, input_ids)
        valid = targets != IGNORED
        assert expected.std() > 0.1 and not valid.all()  # neither degenerate nor unpadded
        torch.testing.assert_close(logits[valid], expected[valid], **CLOSE)


def test_features_and_logits_equal_hugging_faces(captioner_folder):
    assert_equal_to_hugging_face(captioner_folder)


def test_features_and_logits_of_uneven_sizes_equal_hugging_faces(tmp_path):
    """As in BLIP-large: a vision encoder of another width, depth and number of heads."""
    checkpoints.write_blip(
        tmp_path,
        vision={"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3,
                "num_hidden_layers": 3, "hidden_act": "quick_gelu", "patch_size": 8},
        text={"num_attention_heads": 8, "hidden_act": "relu"},
    )
    assert_equal_to_hugging_face(tmp_path)


@pytest.mark.parametrize("encoder, decoder", [
    ({"hidden_size": 96, "num_attention_heads": 3}, {}),
    ({"model_type": "deit"}, {}),
    ({"qkv_bias": False}, {}),
    ({}, {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    ({}, {"scale_attn_weights": False}),
    ({}, {"n_inner": 96, "activation_function": "relu"}),
    ({}, {"reorder_and_upcast_attn": True, "n_head": 2}),
], ids=["enc_to_dec_proj", "deit", "no_qkv_bias", "scaled_by_layer", "unscaled", "n_inner",
        "upcast"])
def test_features_and_logits_of_other_vit_gpt2_equal_hugging_faces(tmp_path, encoder, decoder):
    checkpoints.write_vit_gpt2(tmp_path, encoder=encoder, decoder=decoder)
    assert_equal_to_hugging_face(tmp_path)


def test_loss_equals_hugging_faces_for_right_labels(captioner_folder):
    captioner = load_captioner(captioner_folder)
    theirs = hugging_face(captioner_folder)
    input_ids, targets = ragged_batch(captioner)
    pixels = random_pixels(len(input_ids))
    with torch.no_grad():
        features = captioner.model.encode(pixels)
        ours = masked_loss(captioner.model, input_ids, features, targets)
        expected = hugging_face_loss(theirs, pixels, input_ids, targets)
    torch.testing.assert_close(ours, expected, **CLOSE)


def hugging_face_loss(model, pixels, input_ids, targets):
    if model.config.model_type != "blip":  # takes each position's next token
        return model(pixel_values=pixels, decoder_input_ids=input_ids, labels=targets).loss
    # BLIP shifts its labels itself and expects the tokens, with one more at the end.
    end = torch.where(targets[:, -1:] == IGNORED, 0, targets[:, -1:])
    whole = torch.cat([input_ids, end], dim=1)
    labels = torch.cat([torch.full_like(end, IGNORED), targets], dim=1)
    return model(pixel_values=pixels, input_ids=whole, labels=labels).loss


# --- one image, several rows ----------------------------------------------------------------


def test_several_rows_per_image_equal_repeated_features(captioner):
    input_ids, _ = ragged_batch(captioner)
    with torch.no_grad():
        features = captioner.model.encode(random_pixels(2))
        shared = captioner.model.decode(input_ids, features)
        repeated = captioner.model.decode(input_ids, features.repeat_interleave(3, dim=0))
    assert not torch.allclose(features[0], features[1], atol=0.1)
    torch.testing.assert_close(shared, repeated, **CLOSE)


def test_padding_does_not_affect_earlier_positions(captioner):
    input_ids, targets = ragged_batch(captioner)
    with torch.no_grad():
        features = captioner.model.encode(random_pixels(len(input_ids)))
        padded = captioner.model.decode(input_ids, features)
        for row, valid in enumerate(targets != IGNORED):
            alone = captioner.model.decode(input_ids[row, valid][None], features[row : row + 1])
            torch.testing.assert_close(padded[row, valid], alone[0], **CLOSE)


# --- the cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_length", [1, 4])
def test_token_by_token_equals_the_whole_sequence(captioner, prompt_length):
    model = captioner.model
    input_ids = torch.randint(20, 200, (4, 9))
    with torch.no_grad():
        features = model.encode(random_pixels(2))  # two rows an image
        whole = model.decode(input_ids, features)
        cache = KeyValueCache(num_tokens=12)
        parts = [model.decode(input_ids[:, :prompt_length], features, cache)]
        for position in range(prompt_length, input_ids.shape[1]):
            assert cache.length == position
            parts.append(model.decode(input_ids[:, position : position + 1], features, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


def test_reordered_cache_continues_the_chosen_rows(captioner):
    model = captioner.model
    input_ids = torch.randint(20, 200, (4, 5))
    rows = torch.tensor([1, 1, 3, 2])  # within each image's own two rows
    with torch.no_grad():
        features = model.encode(random_pixels(2))
        cache = KeyValueCache(num_tokens=12)
        model.decode(input_ids[:, :4], features, cache)
        cache.reorder(rows)
        last = model.decode(input_ids[:, 4:], features, cache)
        whole = model.decode(torch.cat([input_ids[rows, :4], input_ids[:, 4:]], dim=1), features)
    torch.testing.assert_close(last, whole[:, 4:], **CLOSE)


# --- training -------------------------------------------------------------------------------


def loss_and_gradients(captioner: Captioner, checkpointing: bool, seed: int = 1):
    model = captioner.model.train()
    model.decoder.gradient_checkpointing = checkpointing
    input_ids, targets = ragged_batch(captioner)
    matrices = lora_parameters(model)
    for matrix in matrices.values():
        matrix.grad = None
    with torch.no_grad():
        features = model.encode(random_pixels(len(input_ids)))
    torch.manual_seed(seed)
    loss = masked_loss(model, input_ids, features, targets)
    loss.backward()
    return loss.detach(), {name: matrix.grad for name, matrix in matrices.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_leaves_loss_and_gradients(captioner, dropout):
    inject(captioner.model, ["attention", "feed_forward"], rank=2, dropout=dropout)
    for matrix in lora_parameters(captioner.model).values():
        torch.nn.init.normal_(matrix, std=0.1)
    loss, gradients = loss_and_gradients(captioner, checkpointing=False)
    checkpointed_loss, checkpointed = loss_and_gradients(captioner, checkpointing=True)
    torch.testing.assert_close(checkpointed_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
    if dropout:  # that the seeds above were needed
        assert loss_and_gradients(captioner, checkpointing=False, seed=2)[0] != loss


def test_checkpointing_recomputes_each_layer(captioner, monkeypatch):
    inject(captioner.model, ["attention"], rank=2)
    layer_class = type(next(
        module for module in captioner.model.decoder.modules()
        if type(module).__name__ in ("DecoderLayer", "Block")
    ))
    calls = []
    forward = layer_class.forward
    monkeypatch.setattr(
        layer_class, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1]
    )
    loss_and_gradients(captioner, checkpointing=False)
    assert len(calls) == 2
    loss_and_gradients(captioner, checkpointing=True)
    assert len(calls) == 2 + 4


@pytest.mark.parametrize("write, settings", [
    (checkpoints.write_blip,
     {"text": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}}),
    (checkpoints.write_vit_gpt2,
     {"decoder": {"embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.1}}),
], ids=["blip", "vit_gpt2"])
def test_the_decoders_own_dropout_equals_hugging_faces_at_the_same_seed(
    tmp_path, write, settings
):
    """The same masks in the same order: each dropout is in the same position."""
    write(tmp_path, **settings)
    captioner, theirs = load_captioner(tmp_path), hugging_face(tmp_path).train()
    model, (input_ids, targets) = captioner.model, ragged_batch(captioner)
    pixels = random_pixels(len(input_ids))
    with torch.no_grad():
        quiet = model.head(model.decode(input_ids, model.encode(pixels)))
        torch.manual_seed(1)
        expected = hugging_face_logits(theirs, pixels, input_ids)
        features = model.train().encode(pixels)  # the frozen encoder has none
        torch.manual_seed(1)
        noisy = model.head(model.decode(input_ids, features))
        valid = targets != IGNORED
        torch.testing.assert_close(noisy[valid], expected[valid], **CLOSE)
        assert (noisy - quiet).abs().max() > 0.1
        model.eval()  # never in validation
        assert torch.equal(model.head(model.decode(input_ids, features)), quiet)
