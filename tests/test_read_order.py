"""Blocks: which rows belong together, epochs that read each block once, and reading ahead."""

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.data import read_order
from lora_engine.data.batches import epoch_batches, training_steps
from lora_engine.data.image_table import ImageTable, Shard
from lora_engine.data.packed_strings import PackedStrings
from lora_engine.data.read_order import BLOCK_BYTES, block_ends, choose_read_order, read_ahead


def shards(*sizes: list[int], kind=Shard) -> ImageTable:
    """Images of these sizes, one after the other in shards."""
    names = PackedStrings.pack([f"{i}.jpg" for i in range(sum(map(len, sizes)))])
    return ImageTable([kind(f"/{i}.tar", b"") for i in range(len(sizes))], {
        "container": np.repeat(np.arange(len(sizes)), [len(shard) for shard in sizes]),
        "name": names.data,
        "name_end": names.ends,
        "offset": np.concatenate([np.cumsum([0, *shard[:-1]]) for shard in sizes]),
        "size": np.concatenate(sizes),
    })


def test_blocks_end_at_shards_and_after_some_megabytes():
    large, half = BLOCK_BYTES, BLOCK_BYTES // 2
    images = shards([half, half, half], [10, 10], [large, large])
    assert block_ends(images, np.arange(7)).tolist() == [2, 3, 5, 6, 7]
    two_captions_each = np.repeat(np.arange(7), 2)
    assert block_ends(images, two_captions_each).tolist() == [4, 6, 10, 12, 14]
    some = images.choose(np.array([0, 2, 3, 6]))
    assert block_ends(some, np.arange(4)).tolist() == [1, 2, 3, 4]
    assert block_ends(images, np.arange(0)).tolist() == []


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 99)
)
def test_an_epoch_in_blocks_has_every_row_once(block_sizes, batch_size, seed):
    ends = np.cumsum(block_sizes)
    lengths = np.random.default_rng(0).integers(3, 20, ends[-1])
    first, again, other = (
        [batch.tolist() for batch in epoch_batches(
            lengths, batch_size=batch_size, seed=seed, epoch=epoch, block_ends=ends
        )]
        for epoch in (0, 0, 1)
    )
    assert sorted(chain(*first)) == list(range(ends[-1])) == sorted(chain(*other))
    assert first == again
    # Within one window, rows of different lengths can only be in one order of a few batches.
    assert first != other or ends[-1] <= 65 * batch_size
    assert len(first) == -(-ends[-1] // batch_size)
    assert sum(len(batch) < batch_size for batch in first) <= 1


def test_the_rows_of_a_block_are_near_each_other_and_mixed_with_others():
    ends = np.arange(100, 100_001, 100)  # 1,000 blocks of 100 rows
    batches = list(epoch_batches(
        np.random.default_rng(0).integers(3, 20, 100_000), batch_size=32, seed=0, epoch=0,
        block_ends=ends,
    ))
    span = read_order.BLOCKS_PER_GROUP * 100 // 32 + 2 * 64  # a group and two windows
    places: dict[int, list[int]] = {}
    for number, batch in enumerate(batches):
        assert len(set((batch // 100).tolist())) > 16
        for block in set((batch // 100).tolist()):
            places.setdefault(block, []).append(number)
    assert max(numbers[-1] - numbers[0] for numbers in places.values()) <= span
    firsts = [places[block][0] for block in range(1000)]
    assert np.corrcoef(firsts, range(1000))[0, 1] < 0.2  # not in the order of the shards


def test_an_epoch_in_blocks_continues_where_it_was():
    ends = np.arange(10, 1001, 10)
    order = dict(batch_size=8, seed=1, num_epochs=2, block_ends=ends)
    whole = list(training_steps(np.arange(1000) % 7, **order))
    rest = list(training_steps(np.arange(1000) % 7, first_epoch=1, num_done=40, **order))
    assert rest == whole[125 + 40 :]


def test_each_block_is_read_ahead_once_and_whole(monkeypatch):
    asked = []
    monkeypatch.setattr(
        read_order, "_Reader",
        lambda: type("Reader", (), {"read": asked.append, "stop": lambda: asked.append("end")}),
    )
    sizes = np.full(3000, 40_000)
    images = shards(sizes[:1000].tolist(), sizes[1000:].tolist())
    rows = np.arange(3000)
    ends = block_ends(images, rows)
    batches = [batch.tolist() for batch in epoch_batches(
        rows % 9, batch_size=16, seed=0, epoch=0, block_ends=ends
    )]
    kept = set(range(ends[0]))  # the first block's images need not be read

    def ahead():
        return read_ahead(
            iter(batches), images, block_ends=ends, image_of_row=rows,
            rows_to_read=lambda batch: [row for row in batch if row not in kept],
        )

    assert list(ahead()) == batches
    assert asked.pop() == "end" and len(asked) == len(ends) - 1 == len(set(asked))
    assert sum(size for _, _, size in asked) == 40_000 * (3000 - ends[0])
    assert {path for path, _, _ in asked} == {"/0.tar", "/1.tar"}
    asked.clear()
    some = ahead()
    next(some)
    some.close()
    assert asked[-1] == "end"


def test_reading_ahead_reads_the_files_and_ignores_missing_ones(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 3_000_000)
    reader = read_order._Reader()
    reader.read((str(tmp_path / "none.tar"), 0, 10))
    reader.read((str(path), 100, 5_000_000))  # beyond its end
    reader.extents.put(None)
    reader.thread.join(10)
    assert not reader.thread.is_alive()


def test_the_order_depends_on_the_disk_for_shards_alone(monkeypatch):
    images = shards([5, 5])
    for seconds, expected in ((1e-4, "random"), (1e-2, "blocks")):
        monkeypatch.setattr(read_order, "_random_read_s", lambda images: seconds)
        assert choose_read_order(images)[0] == expected
    files = ImageTable.of_files(["/a/1.jpg", "/b/2.jpg"])
    assert choose_read_order(files)[0] == "random"  # although the disk is slow


def test_reading_random_images_is_measured(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(1000))
    from lora_engine.data.image_identity import identity

    images = shards([500, 500])
    images.containers = [Shard(str(path), identity(path.stat()))]
    assert 0 < read_order._random_read_s(images) < 1
    assert read_order._random_read_s(shards([5])) == 0  # nothing can be read
