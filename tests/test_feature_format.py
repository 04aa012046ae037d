"""Features survive the round trip through a row, as exactly as the number format allows."""

import itertools

import numpy as np
import pytest
import torch

from lora_engine.features.format import FeatureFormat

SHAPES = [(1, 1), (5, 7), (3, 4), (17, 64), (31, 33)]  # tokens and width, some of them odd
DTYPES = ["fp32", "bf16", "int8"]
EVERY = list(itertools.product(SHAPES, DTYPES))
INPUTS = [torch.float32, torch.float64, torch.bfloat16]


def noise(num_images, num_tokens, width, *, dtype=torch.float32):
    """Features whose channels differ by four orders of magnitude."""
    sizes = torch.logspace(-2, 2, width) if width > 1 else torch.ones(1)
    return (torch.randn(num_images, num_tokens, width) * sizes).to(dtype)


def round_trip(features, dtype, *, out=torch.float32):
    format = FeatureFormat(*features.shape[1:], dtype)
    return format.unpack(format.pack(features), out)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("shape, dtype", EVERY)
def test_a_row_is_as_long_as_its_numbers_and_padded_to_16_bytes(shape, dtype):
    (num_tokens, width), count = shape, shape[0] * shape[1]
    size = {"fp32": 4 * count, "bf16": 2 * count, "int8": count + 4 * width}[dtype]
    format = FeatureFormat(num_tokens, width, dtype)
    assert format.row_bytes % 16 == 0 and 0 <= format.row_bytes - size < 16
    rows = format.pack(noise(3, num_tokens, width))
    assert rows.shape == (3, format.row_bytes) and rows.dtype == torch.uint8
    assert rows.is_contiguous() and not rows[:, size:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_comes_back_bit_for_bit(shape):
    features = noise(4, *shape)
    special = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, torch.inf, -torch.inf, torch.nan])
    count = min(7, features[0].numel())
    features[0].view(-1)[:count] = special[:count]
    assert same_bits(round_trip(features, "fp32"), features)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", INPUTS)
def test_bf16_is_torchs_rounding(shape, dtype):
    features = noise(4, *shape, dtype=dtype)
    back = round_trip(features, "bf16", out=torch.bfloat16)
    assert same_bits(back, features.bfloat16())
    assert same_bits(round_trip(features, "bf16"), features.bfloat16().float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", INPUTS)
def test_int8_is_within_half_a_step_of_its_images_channel(shape, dtype):
    """The step is the largest magnitude over 127; fp32 itself rounds its quotient and product."""
    features = noise(4, *shape, dtype=dtype)
    exact = features.double().numpy()
    back = round_trip(features, "int8").double().numpy()
    steps = np.abs(exact).max(axis=1, keepdims=True) / 127  # (B, 1, D)
    assert (np.abs(back - exact) <= steps * (0.5 + 127 * 4 * 2.0**-24)).all()
    integers = back / steps
    assert np.abs(integers - integers.round()).max() < 1e-3
    assert (np.abs(integers).max(axis=1).round() == 127).all()  # the whole range is used
    if shape[0] > 10:
        assert np.abs(back - exact).max() > 0.45 * steps.min()


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e30, 3e38])
def test_int8_at_any_magnitude(magnitude):
    features = torch.linspace(-1, 1, 21).reshape(1, 7, 3) * magnitude
    steps = features.abs().amax(dim=1) / 127
    assert ((round_trip(features, "int8") - features).abs() <= 0.501 * steps[:, None]).all()


def test_a_channel_of_zeros_is_zeros_and_touches_no_other():
    features = noise(2, 5, 7)
    features[0, :, 3] = 0
    back = round_trip(features, "int8")
    assert not back[0, :, 3].any() and back.isfinite().all()
    others = [channel for channel in range(7) if channel != 3]
    assert torch.equal(back[..., others], round_trip(features[..., others], "int8"))
    assert back[1, :, 3].any()
    assert not round_trip(torch.zeros(1, 5, 7), "int8").any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_so(dtype, value):
    """They must reach the loss, where the run detects them."""
    features = noise(1, 5, 7)
    features[0, 2, 3] = value
    back = round_trip(features, dtype)
    assert not back[0, 2, 3].isfinite()
    assert torch.equal(back[..., :3], round_trip(features[..., :3], dtype))


@pytest.mark.parametrize("shape, dtype", EVERY)
def test_the_row_of_an_image_does_not_depend_on_other_images(shape, dtype):
    features = noise(4, *shape)
    format = FeatureFormat(*shape, dtype)
    rows = format.pack(features)
    for one, row in zip(features, rows):
        assert torch.equal(format.pack(one[None])[0], row)
    empty = format.pack(features[:0])
    assert empty.shape == (0, format.row_bytes)
    assert format.unpack(empty, torch.float32).shape == (0, *shape)


@pytest.mark.parametrize("shape, dtype", EVERY)
def test_rows_and_features_may_be_parts_of_larger_tensors(shape, dtype):
    (num_tokens, width), format = shape, FeatureFormat(*shape, dtype)
    features = noise(3, num_tokens, width)
    rows = format.pack(features)
    expected = format.unpack(rows, torch.float32)

    strided = features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(format.pack(strided), rows)

    store = torch.full((7, format.row_bytes + 32), 255, dtype=torch.uint8)
    within = store[1:6:2, 16 : 16 + format.row_bytes]
    within.copy_(rows)
    assert not within.is_contiguous()
    assert torch.equal(format.unpack(within, torch.float32), expected)
    assert torch.equal(format.unpack(within[[2, 0]], torch.float32), expected[[2, 0]])
    assert torch.equal(format.unpack(within[1:2], torch.float32), expected[1:2])


@pytest.mark.parametrize("shape, dtype", EVERY)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_in_the_dtype_asked_for(shape, dtype, out):
    format = FeatureFormat(*shape, dtype)
    rows = format.pack(noise(2, *shape))
    back = format.unpack(rows, out)
    assert back.shape == (2, *shape)
    assert same_bits(back.contiguous(), format.unpack(rows, torch.float32).to(out).contiguous())
