"""Dropout masks: the requested share, independent elements, from the global generator."""

import pytest
import torch

from lora_engine.lora.dropout import dropout_mask, kept_part


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 777), (3, 7, 11, 1009)])
def test_the_requested_share_is_dropped(probability, shape):
    x = torch.empty(shape)
    kept, share = dropout_mask(x, probability)
    assert kept.dtype == torch.bool and kept.shape == x.shape
    assert share == pytest.approx(1 - probability, abs=1 / 65536)
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(share, abs=5 * deviation)


def test_neighbours_are_independent():
    """Four adjacent elements come from one random number."""
    kept, share = dropout_mask(torch.empty(400_000), 0.3)
    rows = kept.double().view(-1, 4) - share
    correlations = rows.T @ rows / len(rows) / (0.3 * 0.7)
    assert (correlations - torch.eye(4, dtype=torch.float64)).abs().max() < 0.02


@pytest.mark.parametrize("num_elements", [0, 1, 2, 3, 4, 5, 1001])
def test_any_number_of_elements_works(num_elements):
    kept, _ = dropout_mask(torch.empty(num_elements), 0.5)
    assert kept.shape == (num_elements,)


def test_the_global_generator_decides():
    def draw():
        return dropout_mask(torch.empty(100), 0.5)[0]

    torch.manual_seed(1)
    one, next_one = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), one) and not torch.equal(one, next_one)


def test_extreme_probabilities_neither_divide_by_zero_nor_drop_anything_needlessly():
    kept, share = dropout_mask(torch.empty(1000), 1 - 1e-9)
    assert share > 0
    kept, share = dropout_mask(torch.empty(1000), 1e-9)
    assert kept.all() and share == 1


def test_compiled_the_mask_is_the_same():
    x = torch.randn(50, 30)

    def halves(x):
        kept, share = dropout_mask(x, 0.4)
        again, _ = dropout_mask(x, 0.4)
        return kept_part(x, kept) / share, kept_part(x, again)

    torch.manual_seed(2)
    expected = halves(x)
    torch.manual_seed(2)
    # Code that "inductor" generates is run with dropout in test_training.py.
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), expected):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(expected[0] != 0, expected[1] != 0)


def test_the_kept_part_has_zeros_elsewhere():
    x = torch.tensor([1.0, float("inf"), 3.0])
    assert kept_part(x, torch.tensor([True, False, True])).tolist() == [1.0, 0.0, 3.0]
    assert kept_part(x, None) is x
