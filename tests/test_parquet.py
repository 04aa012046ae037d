"""Parquet files and save_to_disk folders: rows as written, images byte for byte, bad rows named."""

import builtins
import io
import json
import pickle

import pytest
from forking import in_child
from PIL import Image

from lora_engine.data.formats import arrow, parquet
from lora_engine.data.formats.parquet_images import ParquetImages, RowGroups
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Member,
    Problem,
    SourceOptions,
    caption_complaint,
)

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

AUTO = SourceOptions()
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (7, 5 + index), (20 * index, 90, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(*indices: int | None):
    """A column as Hugging Face writes it; None is a null."""
    rows = [None if index is None else {"bytes": png(index), "path": None} for index in indices]
    return pa.array(rows, STRUCT)


def write(path, columns, **options) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def rows_of(path, options=AUTO, module=parquet):
    return list(module.read(str(path), options))


def refusal(path, options=AUTO, module=parquet) -> str:
    with pytest.raises(AnnotationError) as caught:
        rows_of(path, options, module)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def check_images(path: str, items, images: list[bytes], options=AUTO) -> None:
    reader = ParquetImages(path, parquet.image_column(path, options), RowGroups())
    assert [reader.read(item.image.offset, item.image.size) for item in items] == images


@pytest.mark.parametrize("write_statistics", [True, False])
@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_rows_and_images_come_as_they_are_written(tmp_path, row_group_size, write_statistics):
    path = write(
        tmp_path / "a.parquet",
        {
            "image": pictures(0, 1, 2, 3, 4),
            "file_name": list("abcde"),
            "text": [" a ", "b", "c", "d", "e"],
            "split": ["train", "val", "train", "test", None],
        },
        row_group_size=row_group_size,
        write_statistics=write_statistics,
    )
    items = rows_of(path)
    assert items[0] == Item(1, Member("row 1", 0, 0), [" a "], "train")
    assert [item.where for item in items] == [1, 2, 3, 4, 5]
    assert [item.split for item in items] == ["train", "val", "train", "test", ""]
    check_images(path, items, [png(index) for index in range(5)])


@pytest.mark.parametrize("name", ["jpg", "image", "picture"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_columns_are_images(tmp_path, name, kind):
    images = pa.array([png(0), png(1)], kind)
    path = write(tmp_path / "a.parquet", {name: images, "caption": ["a", "b"]})
    options = SourceOptions(image_field="picture") if name == "picture" else AUTO
    items = rows_of(path, options)
    assert [item.captions for item in items] == [["a"], ["b"]]
    check_images(path, items, [png(0), png(1)], options)


def test_img2dataset_rows_have_keys_and_failed_ones_are_problems(tmp_path):
    columns = {
        "url": ["http://a", "http://b", "http://c"],
        "jpg": pa.array([png(0), None, png(2)], pa.binary()),
        "caption": ["a", "b", "c"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
    }
    path = write(tmp_path / "00000.parquet", columns)
    first, problem, last = rows_of(path)
    assert problem == Problem(
        2, "img2dataset's status is failed_to_download: HTTP Error 404"
    )
    assert [first.image.name, last.image] == ["000000000", Member("000000002", 0, 2)]
    check_images(path, [first, last], [png(0), png(2)])


def test_a_column_of_strings_holds_paths(tmp_path):
    path = write(tmp_path / "a.parquet", {"filepath": ["a.jpg", None], "title": ["a", "b"]})
    item, problem = rows_of(path)
    assert item == Item(1, "a.jpg", ["a"])
    assert problem.where == 2 and "null" in problem.reason


def test_a_struct_without_bytes_gives_its_path(tmp_path):
    rows = [{"bytes": None, "path": "x/a.jpg"}, {"bytes": png(1), "path": "b.jpg"}]
    path = write(tmp_path / "a.parquet", {"image": pa.array(rows, STRUCT), "text": ["a", "b"]})
    assert [item.image for item in rows_of(path)] == ["x/a.jpg", Member("row 2", 0, 1)]


def test_several_captions_a_row_and_empty_lists(tmp_path):
    captions = [["a", " b"], [], None, [None]]
    path = write(tmp_path / "a.parquet", {"image": pictures(0, 1, 2, 3), "captions": captions})
    two, empty, null, inner = rows_of(path)
    assert two.captions == ["a", " b"]
    assert empty.where == 2 and "empty list" in empty.reason
    assert null.captions == inner.captions == [None]


def test_null_images_are_problems_and_null_captions_are_complained_about(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {"image": pictures(0, None, 2, None), "text": ["a", "b", None, None]},
        row_group_size=3,
    )
    first, null, third, last = rows_of(path)
    assert first.image == Member("row 1", 0, 0)
    assert null == Problem(2, '"image" is null, expected an image: remove the row')
    assert "is missing" in caption_complaint(third.captions[0])
    assert isinstance(last, Problem) and last.where == 4
    with pytest.raises(ValueError, match="null"):
        ParquetImages(path, "image", RowGroups()).read(0, 1)


def test_captions_that_are_not_utf8_are_complained_about(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    path = write(tmp_path / "a.parquet", {"image": pictures(0, 1), "text": texts})
    fine, bad = rows_of(path)
    assert fine.captions == ["fine"]
    assert "not valid Unicode" in caption_complaint(bad.captions[0])


def test_the_images_are_not_read_for_the_rows(tmp_path, monkeypatch):
    """Only where statistics cannot tell which are null."""
    path = write(tmp_path / "a.parquet", {"image": pictures(0, 1), "text": ["a", "b"]})
    monkeypatch.setattr(parquet, "bytes_column", None)
    assert len(rows_of(path)) == 2


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"image": [1, 2], "text": ["a", "b"]}, ["image: int64", "text: string"]),
        ({"text": ["a"]}, ["no column of images", "--image_field"]),
        ({"url": ["http://a"], "text": ["a"]}, ["url: string", "lora-engine download"]),
        ({"images": pa.array([[{"bytes": b"", "path": ""}]], pa.list_(STRUCT)), "text": ["a"]},
         ["images", "list of images"]),
        ({"image": pictures(0), "caption": ["a"], "title": ["b"]},
         ["caption and title", "--caption_field"]),
        ({"jpg": [b""], "png": [b""], "text": ["a"]}, ["jpg and png", "--image_field"]),
        ({"image": pictures(0), "words": ["a"]}, ["--caption_field"]),
        ({"image": pictures(0), "text": [b"a"]}, ["binary", "expected captions"]),
    ],
)
def test_a_table_without_usable_columns_is_refused(tmp_path, columns, words):
    message = refusal(write(tmp_path / "a.parquet", columns))
    assert all(word in message for word in words), message


def test_a_field_of_another_type_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(0), "text": ["a"], "id": [1]})
    assert "int64" in refusal(path, SourceOptions(image_field="id"))
    assert "int64" in refusal(path, SourceOptions(caption_field="id"))
    assert "--caption_field is nothing" in refusal(path, SourceOptions(caption_field="nothing"))


def test_fields_are_chosen_by_name_where_several_are_possible(tmp_path):
    columns = {"image": pictures(0), "text": ["a"], "title": ["b"], "path": ["c.jpg"]}
    path = write(tmp_path / "a.parquet", columns)
    assert "the columns text and title could both be the captions" in refusal(path)
    options = SourceOptions(caption_field="text")
    assert rows_of(path, options)[0].captions == ["a"]
    options = SourceOptions(image_field="path", caption_field="title")
    assert rows_of(path, options) == [Item(1, "c.jpg", ["b"])]


def test_damaged_files_are_refused(tmp_path):
    good = write(tmp_path / "a.parquet", {"image": pictures(*range(9)), "text": list("abcdefghi")})
    content = (tmp_path / "a.parquet").read_bytes()
    bad = tmp_path / "bad.parquet"
    for damaged in (b"", b"text, image\na, b.jpg\n", content[:-9], content[: len(content) // 2]):
        bad.write_bytes(damaged)
        assert "expected a Parquet file" in refusal(bad)
    assert len(rows_of(good)) == 9


def test_damage_in_the_images_is_found_when_they_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(0), "text": ["a"]})
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:30] = b"\xff" * 26  # the header of the first page
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        ParquetImages(path, "image", RowGroups()).read(0, 0)


def test_rows_that_are_not_there_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(0), "text": ["a"]})
    with pytest.raises(ValueError, match="no row 1"):
        ParquetImages(path, "image", RowGroups()).read(0, 1)
    with pytest.raises(ValueError, match="no row group 1"):
        ParquetImages(path, "image", RowGroups()).read(1, 0)
    with pytest.raises(OSError):
        ParquetImages(str(tmp_path / "none"), "image", RowGroups()).read(0, 0)


def test_the_cache_is_bounded_and_keeps_the_latest_row_groups(tmp_path):
    columns = {"image": pictures(*range(6)), "text": list("abcdef")}
    path = write(tmp_path / "a.parquet", columns, row_group_size=1)
    with parquet.open_parquet(path) as file:
        sizes = [
            parquet.column_chunks(file, number, "image")[0].total_uncompressed_size
            for number in range(6)
        ]
    assert len(sizes) == 6 and all(size >= len(png(0)) for size in sizes)
    row_groups = RowGroups(max(sizes) + 3 * len(png(0)) // 2)
    reader = ParquetImages(path, "image", row_groups)
    for row_group, cached in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (2, [0, 2])):
        assert reader.read(row_group, 0) == png(row_group)
        assert [number for _, number in row_groups._values] == cached
    one = ParquetImages(path, "image", RowGroups(0))
    assert [one.read(number, 0) for number in (0, 5)] == [png(0), png(5)]
    assert len(one.row_groups) == 1


def test_a_fork_and_a_copy_open_the_file_themselves(tmp_path):
    columns = {"image": pictures(0, 1), "text": ["a", "b"]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=1)
    reader = ParquetImages(path, "image", RowGroups())
    assert reader.read(0, 0) == png(0)
    parents_file = reader._file

    def child() -> int:
        same = reader.read(1, 0) == png(1) and reader.read(0, 0) == png(0)
        return 0 if same and reader._file is not parents_file else 1

    ended = in_child(child, tmp_path / "log")
    assert ended.status == 0, ended.output
    assert pickle.loads(pickle.dumps(reader)).read(1, 0) == png(1)


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": pictures(0), "text": ["a"]})
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'lora_engine[parquet]'" in refusal(path)


# --- save_to_disk folders -----------------------------------------------------------------------


def write_arrow(folder, columns, *, compression=None, batch_rows=2, ends=True):
    """A Dataset's folder as save_to_disk writes it."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    file = folder / "data-00000-of-00001.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(file), table.schema, options=options) as stream:
        stream.write_table(table, max_chunksize=batch_rows)
    if not ends:
        file.write_bytes(file.read_bytes()[:-8])
    state = {"_data_files": [{"filename": file.name}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return file


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()])
def test_images_of_arrow_files_are_ranges_of_their_bytes(tmp_path, kind):
    values = pictures(0, None, 2, 3, 4) if kind == STRUCT else pa.array(
        [png(0), None, png(2), png(3), png(4)], kind
    )
    file = write_arrow(tmp_path / "set", {"image": values, "text": list("abcde")})
    assert arrow.parts(str(tmp_path / "set")) == [(str(file), "")]
    rows = rows_of(file, module=arrow)
    content = file.read_bytes()
    assert isinstance(rows[1], Problem) and rows[1].where == 2
    for index in (0, 2, 3, 4):
        assert rows[index].where == index + 1 and rows[index].captions == ["abcde"[index]]
        name, offset, size = rows[index].image
        assert name == f"row {index + 1}"
        assert content[offset : offset + size] == png(index)


def test_a_dataset_dict_gives_the_split_of_each_file(tmp_path):
    files = [
        write_arrow(tmp_path / split, {"image": pictures(0), "text": [split]})
        for split in ("train", "validation")
    ]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    found = arrow.parts(str(tmp_path))
    assert found == [(str(files[0]), "train"), (str(files[1]), "validation")]
    assert [rows_of(file, module=arrow)[0].split for file, _ in found] == ["train", "validation"]


def test_arrow_images_without_bytes_are_paths(tmp_path):
    rows = pa.array([{"bytes": None, "path": "/x/a.jpg"}], STRUCT)
    file = write_arrow(tmp_path / "set", {"image": rows, "text": ["a"]})
    assert rows_of(file, module=arrow) == [Item(1, "/x/a.jpg", ["a"])]


def test_compressed_arrow_files_are_refused(tmp_path):
    columns = {"image": pa.array([b"a" * 5000] * 3), "text": list("abc")}
    file = write_arrow(tmp_path / "set", columns, compression="zstd")
    assert "compressed" in refusal(file, module=arrow)


def test_damaged_arrow_files_are_refused_or_said_to_lack_rows(tmp_path):
    columns = {"image": pictures(0, 1, 2), "text": list("abc")}
    file = write_arrow(tmp_path / "set", columns)
    content = file.read_bytes()
    for damaged in (b"", b"not Arrow at all", content[: len(content) // 2], content[:-12]):
        file.write_bytes(damaged)
        assert "expected an Arrow stream file" in refusal(file, module=arrow)
    *rows, problem = rows_of(
        write_arrow(tmp_path / "other", columns, ends=False), module=arrow
    )
    assert len(rows) == 3 and "cut off" in problem.reason and problem.is_cut_off


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    def message(state: str) -> str:
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(AnnotationError) as caught:
            arrow.parts(str(tmp_path))
        return str(caught.value)

    with pytest.raises(AnnotationError, match="save_to_disk"):
        arrow.parts(str(tmp_path))
    indexed = {"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}
    assert "flatten_indices()" in message(json.dumps(indexed))
    for state in ("{", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}'):
        assert "save_to_disk" in message(state), state
    assert "expected the name of a file" in message('{"_data_files": [{"filename": "../a.arrow"}]}')


def test_a_folder_that_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(index), "path": None} for index in range(3)], "text": [*"abc"]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "dict"))
    ((file, split),) = arrow.parts(str(tmp_path / "dict"))
    with open(file, "rb") as stream:
        content = stream.read()
    for index, item in enumerate(rows_of(file, module=arrow)):
        assert (item.split, item.captions) == (split, ["abc"[index]]) == ("train", ["abc"[index]])
        _, offset, size = item.image
        assert content[offset : offset + size] == png(index)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    items = rows_of(tmp_path / "a.parquet")
    check_images(str(tmp_path / "a.parquet"), items, [png(index) for index in range(3)])
