"""The order of the data is a function of (seed, epoch) alone, and so is what replaces bad rows."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import read_annotations, write_pictures

from lora_engine.data import image_identity
from lora_engine.data.batches import (
    MAX_SUBSTITUTES,
    CaptionedImages,
    Collate,
    Example,
    SampleIndex,
    Skipped,
    bucket_length,
    epoch_batches,
    load_batches,
    training_steps,
    validation_order,
)
from lora_engine.data.captions import IGNORED, TokenizedCaptions
from lora_engine.data.image_table import ImageTable
from lora_engine.data.images import open_image
from lora_engine.data.packed_strings import PackedStrings
from lora_engine.data.pixels import PixelSettings, to_pixels
from lora_engine.training.micro_batches import split

PIXELS = PixelSettings(resize=(8, 8), resample=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
COLLATE = Collate(image_size=PIXELS.size, prompt_length=2, pad_id=0)

sets_of_lengths = st.builds(
    lambda num_rows, seed: np.random.default_rng(seed).integers(2, 40, num_rows),
    st.integers(1, 700),
    st.integers(0, 100),
)
batch_sizes = st.integers(1, 7)  # windows of 64 batches: up to 448 rows, often more than one window
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 1000)


# --- the order ------------------------------------------------------------------------------


@given(sets_of_lengths, batch_sizes, seeds, epochs)
def test_an_epoch_holds_every_row_once_in_as_many_batches_as_without_sorting(
    lengths, batch_size, seed, epoch
):
    batches = list(epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert max(len(batch) for batch in batches) <= batch_size


@given(sets_of_lengths, batch_sizes, seeds, epochs)
def test_the_order_is_a_function_of_seed_and_epoch(lengths, batch_size, seed, epoch):
    first = list(epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch))
    np.random.seed(0)  # no global generator has a say
    torch.manual_seed(0)
    again = list(epoch_batches(lengths.copy(), batch_size=batch_size, seed=seed, epoch=epoch))
    assert [list(batch) for batch in first] == [list(batch) for batch in again]


def orders(seed, epoch, num_rows=300):
    lengths = np.random.default_rng(0).integers(4, 30, num_rows)
    batches = list(epoch_batches(lengths, batch_size=4, seed=seed, epoch=epoch))
    return [frozenset(batch.tolist()) for batch in batches]


def test_epochs_and_seeds_differ_in_order_and_in_who_shares_a_batch():
    first, epoch, seed, swapped = orders(1, 2), orders(1, 3), orders(2, 2), orders(2, 1)
    for one, other in ((first, epoch), (first, seed), (first, swapped), (epoch, seed)):
        assert one != other
        assert len(set(one) & set(other)) < 15  # of 75 batches


def test_batches_are_not_in_order_of_their_lengths():
    lengths = np.random.default_rng(0).integers(4, 30, 512)
    batches = list(epoch_batches(lengths, batch_size=8, seed=0, epoch=0))
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def num_pads(lengths, batches):
    return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in batches)


@pytest.mark.parametrize("batch_size, at_most", [(8, 0.15), (32, 0.2)])
def test_sorting_within_windows_saves_most_of_the_padding(batch_size, at_most):
    generator = np.random.default_rng(0)
    lengths = generator.poisson(11, 5000) + 3
    order = generator.permutation(len(lengths))
    plain = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    ours = list(epoch_batches(lengths, batch_size=batch_size, seed=0, epoch=0))
    assert num_pads(lengths, ours) < at_most * num_pads(lengths, plain)


@given(sets_of_lengths, batch_sizes, seeds)
def test_training_places_number_the_positions_of_each_epoch(lengths, batch_size, seed):
    steps = list(training_steps(lengths, batch_size=batch_size, seed=seed, num_epochs=2))
    places = [batch for step in steps for batch in step.micro_batches]
    flat = [place for batch in places for place in batch]
    numbers = list(range(len(lengths)))
    assert [place.epoch for place in flat] == [0] * len(lengths) + [1] * len(lengths)
    assert [place.position for place in flat] == 2 * numbers
    for epoch in (0, 1):
        expected = list(epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch))
        rows = [[p.row for p in batch] for batch in places if batch[0].epoch == epoch]
        assert rows == [batch.tolist() for batch in expected]


@given(
    sets_of_lengths,
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2, 3, 8]),
    seeds,
)
def test_a_step_has_the_same_rows_for_any_number_of_micro_batches(
    lengths, batch_size, grad_accum_steps, micro_batches, seed
):
    order = dict(batch_size=batch_size, seed=seed, num_epochs=2, grad_accum_steps=grad_accum_steps)
    steps = list(training_steps(lengths, micro_batches=micro_batches, **order))
    number = micro_batches or grad_accum_steps
    assert {len(step.micro_batches) for step in steps} == {number}
    num_steps = -(-len(lengths) // (batch_size * grad_accum_steps))
    assert len(steps) == 2 * num_steps
    for epoch in (steps[:num_steps], steps[num_steps:]):
        places = [place for step in epoch for batch in step.micro_batches for place in batch]
        assert sorted(place.row for place in places) == list(range(len(lengths)))
        assert sorted(place.position for place in places) == list(range(len(lengths)))
    if micro_batches is not None:
        whole = training_steps(lengths, micro_batches=1, **order)
        assert [sorted(step.rows) for step in steps] == [sorted(step.rows) for step in whole]
        for step in steps:
            sizes = [len(batch) for batch in step.micro_batches]
            assert max(sizes) - min(sizes) <= 1
    rest = list(training_steps(
        lengths, micro_batches=micro_batches, first_epoch=1, num_done=1, **order
    ))
    assert rest == steps[num_steps + 1 :]


def test_a_step_of_an_earlier_version_is_made_of_whole_batches():
    lengths = np.random.default_rng(0).integers(4, 30, 101)
    batches = list(epoch_batches(lengths, batch_size=4, seed=1, epoch=0))
    assert len(batches[-1]) == 4  # the batch of one row is not the last
    steps = training_steps(
        lengths, batch_size=4, seed=1, num_epochs=1, grad_accum_steps=3, micro_batches=None
    )
    found = [
        [place.row for place in batch]
        for step in steps for batch in step.micro_batches if batch
    ]
    assert found == [batch.tolist() for batch in batches]


def test_micro_batches_are_equally_heavy():
    """Rows x longest caption, over those of a step: contiguous parts of sorted rows reach 0.6."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(2.4, 0.4, 20_000), 3, 60).astype(int)
    shares = []
    for step in training_steps(lengths, batch_size=64, seed=0, num_epochs=1, micro_batches=8):
        costs = [len(batch) * max(lengths[i.row] for i in batch) for batch in step.micro_batches]
        shares.append(np.mean(costs) / max(costs))
    assert np.mean(shares[:-1]) > 0.97


@given(sets_of_lengths, batch_sizes)
def test_validation_takes_every_row_once_longest_first(lengths, batch_size):
    batches = validation_order(lengths, batch_size=batch_size)
    flat = [place for batch in batches for place in batch]
    assert sorted(place.row for place in flat) == list(range(len(lengths)))
    taken = [lengths[place.row] for place in flat]
    assert taken == sorted(taken, reverse=True)
    assert [place.position for place in flat] == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])


# --- images that cannot be read -------------------------------------------------------------


def tokens(num_rows: int) -> TokenizedCaptions:
    """Rows of 3, 4, 5, 6, 3, ... tokens, told apart by their last ones."""
    lengths = np.array([3 + row % 4 for row in range(num_rows)])
    ids = np.concatenate([[1, 2, *[10 + row] * (n - 2)] for row, n in enumerate(lengths)])
    return TokenizedCaptions(ids, lengths, np.cumsum(lengths))


def dataset(folder, *, seed=0, substitute=True) -> CaptionedImages:
    images = [row.image for row in read_annotations(folder / "train.json")]
    return captioned(images, seed=seed, substitute=substitute)


def captioned(paths, *, seed=0, substitute=True) -> CaptionedImages:
    """Image files, each with a caption."""
    images, captions = ImageTable.of_files(paths), tokens(len(paths))
    return CaptionedImages(
        images, np.arange(len(paths)), captions, PIXELS, seed=seed, substitute=substitute
    )


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("whole"), num_images=20).parent


@pytest.fixture(scope="module")
def damaged_folder(whole_folder, tmp_path_factory):
    """Of 20 images, number 3 is missing, 7 truncated and 11 no image at all."""
    folder = tmp_path_factory.mktemp("damaged") / "copy"
    shutil.copytree(whole_folder, folder)
    images = [row.image for row in read_annotations(folder / "train.json")]
    (folder / images[3]).unlink()
    picture = (folder / images[7]).read_bytes()
    (folder / images[7]).write_bytes(picture[: len(picture) // 2])
    (folder / images[11]).write_text("<html>404</html>")
    return folder


def test_a_row_is_its_image_and_its_caption(whole_folder):
    data = dataset(whole_folder)
    for row in (0, 19):
        example = data[SampleIndex(epoch=0, position=5, row=row)]
        assert example.row == row and example.skipped == ()
        expected = to_pixels(open_image(data.image_paths[row]), PIXELS)
        assert example.pixels.dtype == np.uint8 and np.array_equal(example.pixels, expected)
        assert example.token_ids.tolist() == tokens(20)[row].tolist()


def test_an_unreadable_image_is_replaced_by_a_whole_other_row_and_listed(damaged_folder):
    data, whole = dataset(damaged_folder), set(range(20)) - {3, 7, 11}
    reasons = {3: "no such file", 7: "damaged or truncated", 11: "not an image in a known format"}
    for row, reason in reasons.items():
        example = data[SampleIndex(epoch=0, position=0, row=row)]
        assert example.row in whole
        expected = to_pixels(open_image(data.image_paths[example.image]), PIXELS)
        assert np.array_equal(example.pixels, expected)
        assert example.token_ids.tolist() == tokens(20)[example.row].tolist()
        first = example.skipped[0]
        assert (first.row, first.image) == (row, data.image_paths[row]) and reason in first.reason


def substitutes(data, **place):
    """The rows that come for row 3 at 40 places; `place` fixes epoch or position."""
    places = [SampleIndex(**({"epoch": 0, "position": i} | place), row=3) for i in range(40)]
    return [data[p].row for p in places]


def test_a_substitute_is_a_function_of_seed_epoch_and_position(damaged_folder):
    data = dataset(damaged_folder, seed=5)
    by_position = substitutes(data)
    np.random.seed(1)
    torch.manual_seed(1)
    assert substitutes(dataset(damaged_folder, seed=5)) == by_position
    backwards = [data[SampleIndex(0, i, 3)].row for i in reversed(range(40))]
    assert backwards[::-1] == by_position
    assert len(set(by_position)) > 10
    others = [substitutes(data, epoch=1), substitutes(dataset(damaged_folder, seed=6))]
    assert by_position not in others and others[0] != others[1]


def test_validation_leaves_an_unreadable_image_out(damaged_folder):
    data = dataset(damaged_folder, substitute=False)
    example = data[SampleIndex(epoch=0, position=0, row=7)]
    assert not example.is_usable and [problem.row for problem in example.skipped] == [7]
    batches = list(load_batches(
        data, validation_order(data.captions.lengths, batch_size=6), collate=COLLATE,
        num_workers=0,
    ))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == sorted(set(range(20)) - {3, 7, 11})
    assert sorted(p.row for batch in batches for p in batch.skipped) == [3, 7, 11]


def test_nothing_readable_gives_an_empty_batch_after_a_bounded_search(tmp_path):
    data = captioned([str(tmp_path / f"{i}.png") for i in range(5)])
    example = data[SampleIndex(epoch=0, position=0, row=2)]
    assert not example.is_usable and len(example.skipped) == MAX_SUBSTITUTES + 1
    batch = COLLATE([example, example])
    assert batch.rows == [] and len(batch.target_ids) == 0
    assert len(batch.skipped) == 2 * (MAX_SUBSTITUTES + 1)


# --- loading --------------------------------------------------------------------------------


def loaded(folder, num_workers):
    data = dataset(folder, seed=3)
    steps = training_steps(data.captions.lengths, batch_size=3, seed=3, num_epochs=2)
    places = [batch for step in steps for batch in step.micro_batches]
    return list(load_batches(data, places, collate=COLLATE, num_workers=num_workers))


def test_batches_do_not_depend_on_the_number_of_workers(damaged_folder, monkeypatch):
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", -(10**9))  # files that are new, too
    alone, with_workers = loaded(damaged_folder, 0), loaded(damaged_folder, 2)
    assert len(alone) == len(with_workers) == 14
    for one, other in zip(alone, with_workers):
        assert one.rows == other.rows and one.skipped == other.skipped
        assert one.images == other.images and one.loaded == other.loaded
        for a, b in zip([*one[:3], one.pixels], [*other[:3], other.pixels]):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert any(batch.skipped for batch in alone)


def example(row: int, ids: list[int], skipped=()) -> Example:
    return Example(
        row, row, np.array(ids), pixels=np.full((3, 4, 4), row, np.uint8), skipped=tuple(skipped)
    )


def test_a_batch_keeps_targets_flat_without_prompt_and_padding():
    # start 1 and prompt 2 are given; 9 is the end, and the padding is the same id
    problem = Skipped(4, "x.png", "no such file")
    batch = Collate(image_size=(4, 4), prompt_length=2, pad_id=9)([
        example(5, [1, 2, 30, 31, 9]), example(6, [1, 2, 40, 9], [problem]),
        Example(7, 7, np.array([1, 2, 50, 51, 52, 53, 9]), is_usable=False),
    ])
    assert batch.input_ids.tolist() == [[1, 2, 30, 31], [1, 2, 40, 9]]
    assert batch.target_ids.tolist() == [30, 31, 9, 40, 9]
    assert batch.target_positions.tolist() == [1, 2, 3, 5, 6]  # in the flattened (2, 4)
    assert batch.rows == [5, 6] and batch.skipped == [problem]
    assert batch.pixels.dtype == torch.uint8 and batch.pixels[:, 0, 0, 0].tolist() == [5, 6]


def test_an_image_whose_features_are_there_is_not_read(damaged_folder):
    """Not even a file that is missing; the others of its batch are."""
    data = dataset(damaged_folder, substitute=False)
    places = validation_order(data.captions.lengths, batch_size=20)
    (batch,) = load_batches(
        data, places, collate=COLLATE, num_workers=0, has_features=lambda image: image < 10
    )
    assert sorted(batch.rows) == sorted(set(range(20)) - {11})
    assert sorted(item.image for item in batch.loaded) == sorted(set(range(10, 20)) - {11})
    assert len(batch.pixels) == 9
    for item, pixels in zip(batch.loaded, batch.pixels):
        expected = to_pixels(open_image(data.image_paths[item.image]), PIXELS)
        assert np.array_equal(pixels.numpy(), expected)


def test_the_loss_takes_a_batchs_tensors_on_the_device():
    batch = COLLATE([example(5, [1, 2, 30, 31, 9])]).with_features(torch.zeros(1, 2, 3))
    moved = batch.tensors(torch.device("meta"))
    assert [tensor.shape for tensor in moved] == [(1, 4), (3,), (3,), (1, 2, 3)]
    assert all(tensor.device.type == "meta" for tensor in moved)


@pytest.mark.parametrize("length, bucket", [
    (1, 4), (4, 4), (5, 8), (32, 32), (33, 48), (64, 64), (65, 96), (200, 224),
])
def test_buckets_are_few(length, bucket):
    assert bucket_length(length) == bucket


def test_a_bucketed_batch_has_the_same_targets_in_one_of_few_shapes():
    generator = np.random.default_rng(0)
    plain = Collate(image_size=(4, 4), prompt_length=1, pad_id=0)
    bucketed = Collate(image_size=(4, 4), prompt_length=1, pad_id=0, longest_bucket=18)
    shapes = set()
    for _ in range(200):
        longest = generator.integers(2, 18)
        ids = [generator.integers(1, 99, generator.integers(2, longest + 2)) for _ in range(16)]
        examples = [example(i, row) for i, row in enumerate(ids)]
        one, other = plain(examples), bucketed(examples)
        width, wide = one.input_ids.shape[1], other.input_ids.shape[1]
        assert torch.equal(other.input_ids[:, :width], one.input_ids)
        assert not other.input_ids[:, width:].any() and wide <= 18
        assert one.num_targets == other.num_targets == len(one.target_ids)
        assert torch.equal(other.target_ids[: one.num_targets], one.target_ids)
        assert (other.target_ids[one.num_targets :] == IGNORED).all()
        rows, columns = one.target_positions // width, one.target_positions % width
        assert torch.equal(other.target_positions[: one.num_targets], rows * wide + columns)
        shapes.add((wide, len(other.target_ids)))
    assert len(shapes) < 30


def test_halved_batches_have_few_shapes_too():
    """Memory that runs out halves them: each shape is another CUDA graph."""
    generator = np.random.default_rng(0)
    collate = Collate(image_size=(4, 4), prompt_length=1, pad_id=0, longest_bucket=18)
    shapes = set()
    for number in range(100):
        ids = [generator.integers(1, 99, generator.integers(9, 14)) for _ in range(16)]
        batch = collate([example(i, row) for i, row in enumerate(ids)])
        parts = split(batch.with_features(torch.zeros(16, 1, 1)), 4)
        shapes |= {(part.input_ids.shape, part.target_ids.shape) for part in parts}
        assert [part.num_targets for part in parts] == [
            int((part.target_ids != IGNORED).sum()) for part in parts
        ]
        together = torch.cat([part.target_ids for part in parts])
        assert torch.equal(
            together[together != IGNORED], batch.target_ids[: batch.num_targets]
        )
    assert len(shapes) <= 4


@pytest.mark.parametrize("strings", [[], ["a"], ["", "é", "a/b c", "\ud800", "x" * 1000, ""]])
def test_packed_strings_are_the_strings(strings):
    packed = PackedStrings.pack(strings)
    assert len(packed) == len(strings) and [*packed] == strings and packed[1:] == strings[1:]
    assert [packed[i] for i in range(-len(strings), 0)] == strings
    for index in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            packed[index]
