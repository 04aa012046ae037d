"""Tar shards: the same members as tarfile's, and what becomes of damaged and hostile ones."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
from tars import write_tar

from lora_engine.data.formats import tar
from lora_engine.data.formats.tar_headers import BLOCK, WINDOW, Archive, NotAFile, members
from lora_engine.data.rows import AnnotationError, Item, Member, Problem, SourceOptions

NUM_MUTATIONS = 250
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
THREE = [
    (f"{index:03d}", {"jpg": bytes([index + 1]) * 700, "txt": b"caption %d" % index})
    for index in range(3)
]


def read(path: Path, **options: str) -> tuple[list[Item], list[Problem]]:
    found = list(tar.read(str(path), SourceOptions(**options)))
    return (
        [item for item in found if isinstance(item, Item)],
        [problem for problem in found if isinstance(problem, Problem)],
    )


def read_one(path: Path, fields: dict[str, bytes], **options: str) -> Item | Problem:
    """What a shard with one sample yields."""
    write_tar(path, [("a", fields)])
    (found,) = tar.read(str(path), SourceOptions(**options))
    return found


def write_members(path: Path, *infos: tarfile.TarInfo | tuple[str, bytes]) -> None:
    """Write (name, data), and members without data."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for info in infos:
            if isinstance(info, tarfile.TarInfo):
                archive.addfile(info)
            else:
                member = tarfile.TarInfo(info[0])
                member.size = len(info[1])
                archive.addfile(member, io.BytesIO(info[1]))


def of_type(name: str, type: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, "/etc/passwd"
    return info


def data_of(path: Path, member: Member) -> bytes:
    return path.read_bytes()[member.offset:member.offset + member.size]


def header_offset(path: Path, name: str) -> int:
    with tarfile.open(path) as archive:
        return archive.getmember(name).offset


def damage(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def set_field(header: bytes, offset: int, value: bytes) -> bytes:
    """A header with another value, and its checksum."""
    changed = bytearray(header)
    changed[offset:offset + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def captions(items: list[Item]) -> dict[str, list[str]]:
    return {item.where: list(item.captions) for item in items}


ALL_THREE = {f"{index:03d}.jpg": [f"caption {index}"] for index in range(3)}


# --- whole archives -----------------------------------------------------------------------------


def random_name(rng: random.Random) -> str:
    length = rng.choice([1, 5, 40, 99, 100, 101, 140, 300])
    letters = rng.choice(["ab", "ab/", "ab/é", "日本/x", "ab c'\\\n"])
    name = "".join(rng.choice(letters) for _ in range(length)).strip("/") or "a"
    return name + rng.choice([".jpg", ".txt", ".json", ""])


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, format):
    rng = random.Random(format)
    for number in range(40):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=format) as archive:
            for _ in range(rng.randrange(12)):
                info = tarfile.TarInfo(random_name(rng))
                info.type = rng.choice([tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
                info.linkname = random_name(rng) if info.type == tarfile.SYMTYPE else ""
                info.size = rng.choice([0, 1, 511, 512, 513, 9000]) if info.isreg() else 0
                try:
                    archive.addfile(info, io.BytesIO(rng.randbytes(info.size)))
                except ValueError:  # too long for ustar
                    continue
        with tarfile.open(path) as archive:
            expected = [
                Member(info.name, info.offset_data, info.size) if info.isreg() else info.name
                for info in archive
            ]
        with Archive(str(path)) as archive:
            found = [
                member.name.rstrip("/") if isinstance(member, NotAFile) else member
                for member in members(archive)
            ]
        assert found == expected


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("folder", ["", "./", "a.b/", "x" * 80 + "/" + "y" * 60 + "/"])
def test_a_sample_is_an_image_with_its_caption(tmp_path, format, folder):
    write_tar(tmp_path / "a.tar", [(folder + key, fields) for key, fields in THREE], format=format)
    items, problems = read(tmp_path / "a.tar")
    assert not problems
    assert captions(items) == {folder + name: texts for name, texts in ALL_THREE.items()}
    for item, (_, fields) in zip(items, THREE):
        assert item.image.name == item.where
        assert data_of(tmp_path / "a.tar", item.image) == fields["jpg"]


def test_the_members_of_the_oldest_tars_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", THREE)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    for key, field in itertools.product(("000", "001", "002"), ("jpg", "txt")):
        start = header_offset(tmp_path / "a.tar", f"{key}.{field}")
        header = set_field(data[start:start + BLOCK], 257, bytes(255))
        data[start:start + BLOCK] = set_field(header, 156, b"\0")
    (tmp_path / "a.tar").write_bytes(data)
    assert captions(read(tmp_path / "a.tar")[0]) == ALL_THREE


def test_checksums_of_signed_bytes_are_accepted(tmp_path):
    write_tar(tmp_path / "a.tar", [("é", {"jpg": b"1", "txt": b"a"})])
    header = bytearray((tmp_path / "a.tar").read_bytes()[:BLOCK])
    header[148:156] = b" " * 8
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    damage(tmp_path / "a.tar", 148, b"%06o\0 " % signed)
    assert captions(read(tmp_path / "a.tar")[0]) == {"é.jpg": ["a"]}


def test_sizes_may_be_binary_numbers(tmp_path):
    write_tar(tmp_path / "a.tar", THREE)
    header = (tmp_path / "a.tar").read_bytes()[:BLOCK]
    damage(tmp_path / "a.tar", 0, set_field(header, 124, b"\x80" + (700).to_bytes(11, "big")))
    assert captions(read(tmp_path / "a.tar")[0]) == ALL_THREE


def test_pax_headers_set_path_and_size(tmp_path):
    info = tarfile.TarInfo("short.jpg")
    info.size, info.pax_headers = 3, {"path": "é/a.jpg", "mtime": "1.5", "comment": "a=b\nc"}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "of all"}) as archive:
        archive.addfile(info, io.BytesIO(b"123"))
    (item,), problems = read(path)
    assert (item.where, data_of(path, item.image), problems) == ("é/a.jpg", b"123", [])


def test_an_archive_without_end_marker_is_whole(tmp_path):
    write_tar(tmp_path / "a.tar", THREE)
    end = header_offset(tmp_path / "a.tar", "002.txt") + BLOCK + len("caption 2")
    os.truncate(tmp_path / "a.tar", end)
    assert read(tmp_path / "a.tar")[1] == []
    assert captions(read(tmp_path / "a.tar")[0]) == ALL_THREE


def test_an_archive_without_members_has_no_samples(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    assert read(tmp_path / "a.tar") == ([], [])


def test_archives_may_be_joined(tmp_path):
    write_tar(tmp_path / "a.tar", THREE[:1])
    write_tar(tmp_path / "b.tar", THREE[1:])
    joined = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(joined)
    assert read(tmp_path / "c.tar")[1] == []
    assert captions(read(tmp_path / "c.tar")[0]) == ALL_THREE


def test_folders_hidden_files_and_files_without_field_are_ignored(tmp_path):
    write_members(
        tmp_path / "a.tar", of_type("x.jpg", tarfile.DIRTYPE), ("._a.jpg", b"1"),
        (".cache/b.jpg", b"1"), ("README", b"1"), ("a.jpg", b"1"), ("LICENSE", b"1"),
        ("a.txt", b"one"),
    )
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == {"a.jpg": ["one"]} and not problems


# --- fields -------------------------------------------------------------------------------------

METADATA = json.dumps({"caption": "of json", "long": "a long one", "split": "val"}).encode()


@pytest.mark.parametrize("field", ["txt", "text", "caption", "TXT"])
def test_captions_are_as_they_are_written(tmp_path, field):
    item = read_one(tmp_path / "a.tar", {"jpg": b"1", field: " é\n".encode()})
    assert item.captions == (" é\n",)


@pytest.mark.parametrize("field", ["jpeg", "png", "webp", "heic", "heif", "JPG"])
def test_images_have_the_suffixes_of_images(tmp_path, field):
    assert read_one(tmp_path / "a.tar", {"json": METADATA, field: b"1"}).image.name == f"a.{field}"


@pytest.mark.parametrize("fields, options, expected", [
    ({"json": METADATA}, {}, ["of json"]),
    ({"json": METADATA}, {"caption_field": "long"}, ["a long one"]),
    ({"json": METADATA, "txt": b"of txt"}, {}, ["of txt"]),
    ({"json": METADATA, "txt": b"of txt"}, {"caption_field": "caption"}, ["of json"]),
    ({"json": METADATA, "txt": b"of txt", "cap": b"of cap"}, {"caption_field": ".cap"}, ["of cap"]),
    ({"txt": "\ufeffone".encode()}, {}, ["one"]),
    ({"json": b'{"captions": ["one", "two"]}'}, {}, ["one", "two"]),
    ({"json": b'{"key": "000"}'}, {}, []),
    ({}, {}, []),
    ({"txt": b"caf\xe9"}, {}, ["caf\udce9"]),
])
def test_captions_come_from_text_or_json(tmp_path, fields, options, expected):
    item = read_one(tmp_path / "a.tar", {"jpg": b"1", **fields}, **options)
    assert list(item.captions) == expected
    assert item.split == ("val" if fields.get("json") == METADATA else "")


@pytest.mark.parametrize("fields, options, reason", [
    ({"png": b"1"}, {}, "jpg and png could both be the image; choose one with --image_field"),
    ({}, {"image_field": "webp"}, r"\(jpg\) is webp, as --image_field says"),
    ({"json": METADATA}, {"caption_field": "no"}, "is no; they are jpg, json and .*caption_field"),
    ({"txt": b"a"}, {"caption_field": "no"}, "is no; they are jpg, txt.*: correct --caption_field"),
    ({"json": b"[1]"}, {}, r"found \[1\], expected an object"),
    ({"json": b'{"captions": []}'}, {}, "empty list"),
    ({"json": b'{"caption'}, {}, "not JSON"),
    ({"json": b"[" * 100_000}, {}, "not JSON"),
    ({"json": b'{"caption": "\xe9"}'}, {}, "not JSON"),
    ({"json": b'{"split', "txt": b"a"}, {}, None),
    ({"json": b'{"split":', "txt": b"a"}, {}, "not JSON"),
    ({"json": b" " * (tar.MAX_JSON_BYTES + 1)}, {}, "4,194,305 bytes, at most 4,194,304"),
    ({"txt": b" " * (tar.MAX_TEXT_BYTES + 1)}, {}, "1,048,577 bytes, at most 1,048,576"),
])
def test_a_sample_that_cannot_be_read_is_a_problem(tmp_path, fields, options, reason):
    found = read_one(tmp_path / "a.tar", {"jpg": b"1", **fields}, **options)
    if reason is None:  # json is not needed
        assert isinstance(found, Item)
    else:
        assert isinstance(found, Problem) and found.where.startswith("a.")
        pytest.raises(ValueError, raise_value_error, found.reason).match(reason)


def raise_value_error(message: str) -> None:
    raise ValueError(message)


def test_an_image_field_chooses_between_images(tmp_path):
    fields = {"jpg": b"1", "png": b"2", "seg.png": b"3", "txt": b"a"}
    for field in ("jpg", "png", ".seg.png"):
        item = read_one(tmp_path / "a.tar", fields, image_field=field)
        assert item.image.name == f"a.{field.removeprefix('.')}"


def test_an_image_field_may_have_the_name_of_a_text_field(tmp_path):
    item = read_one(tmp_path / "a.tar", {"text": b"1", "caption": b"a"}, image_field="text")
    assert item.image.name == "a.text" and item.captions == ("a",)


@pytest.mark.parametrize("status, is_problem", [
    (b'{"status": "failed_to_download"}', False), (b'{"status": "success"}', True), (b"{}", True),
    (b"no json", True),
])
def test_a_sample_without_image_is_a_problem_unless_its_download_failed(
    tmp_path, status, is_problem
):
    write_tar(tmp_path / "a.tar", [("a", {"txt": b"a", "json": status}), *THREE])
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE
    assert [problem.where for problem in problems] == ["a.txt"] * is_problem
    assert all("none of its fields (txt, json)" in problem.reason for problem in problems)


def test_an_archive_without_any_sample_is_a_problem(tmp_path):
    write_members(tmp_path / "a.tar", ("README", b"1"), ("dir.d/x", b"2"))
    items, (problem,) = read(tmp_path / "a.tar")
    assert not items and "none of its 2 members is named like" in problem.reason


# --- hostile members ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "/.a.jpg", ".."])
def test_a_path_that_leads_out_is_a_problem(tmp_path, name):
    write_members(tmp_path / "a.tar", (name, b"1"), ("b.jpg", b"1"), ("b.txt", b"two"))
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == {"b.jpg": ["two"]}
    assert problem.where == name and "leads out of the archive" in problem.reason


@pytest.mark.parametrize("type, kind", [
    (tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"),
    (tarfile.CHRTYPE, "character device"), (tarfile.BLKTYPE, "block device"),
    (tarfile.FIFOTYPE, "named pipe"), (b"Z", "unknown type 'Z'"),
    (tarfile.GNUTYPE_SPARSE, "sparse file"),
])
def test_links_devices_and_sparse_files_are_problems(tmp_path, type, kind):
    write_members(tmp_path / "a.tar", of_type("a.jpg", type), ("b.jpg", b"1"), ("b.txt", b"two"))
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == {"b.jpg": ["two"]}
    assert problem.where == "a.jpg" and kind in problem.reason


def test_sparse_files_are_skipped_with_their_maps(tmp_path):
    header = bytearray(of_type("a.jpg", b"S").tobuf(tarfile.GNU_FORMAT))
    header = set_field(set_field(header, 124, b"%011o" % 600), 482, b"\1")
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    write_tar(tmp_path / "a.tar", THREE)
    rest = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(header + maps + b"x" * 600 + bytes(424) + rest)
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE and "sparse file" in problem.reason


def test_pax_sparse_files_and_damaged_pax_headers_are_problems(tmp_path):
    for headers, kind in (
        ({"GNU.sparse.major": "1"}, "sparse file"), ({"size": "-5"}, "damaged extended header")
    ):
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = headers
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info)
        problem = read(tmp_path / "a.tar")[1][0]
        assert problem.where == "a.jpg" and kind in problem.reason


def test_nothing_is_unpickled_and_the_rest_of_the_sample_is_used(tmp_path):
    write_tar(tmp_path / "a.tar", [
        (key, {**fields, "pyd": b"\x80", "emb.pth": b"\x80"}) for key, fields in THREE
    ])
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE
    assert problem.where == "000.pyd" and "nothing is unpickled" in problem.reason


def test_a_second_sample_with_the_same_key_is_a_problem(tmp_path):
    write_tar(tmp_path / "a.tar", [*THREE, ("001", {"jpg": b"1", "txt": b"another"}), *THREE[2:]])
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE
    assert [problem.where for problem in problems] == ["001.jpg", "002.jpg"]
    assert 'has the key "001"' in problems[0].reason
    assert read_one_twice(tmp_path / "b.tar") == (["one"], "a.jpg")


def read_one_twice(path: Path) -> tuple[list[str], str]:
    """The same sample twice in sequence."""
    write_tar(path, [("a", {"jpg": b"1", "txt": b"one"}), ("a", {"jpg": b"2", "txt": b"two"})])
    (item,), (problem,) = read(path)
    return list(item.captions), problem.where


def test_names_that_are_not_utf_8_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", [("caf\udce9", {"jpg": b"1", "txt": b"one"})])
    assert captions(read(tmp_path / "a.tar")[0]) == {"caf\udce9.jpg": ["one"]}


# --- damaged and other files --------------------------------------------------------------------


@pytest.mark.parametrize("data, reason", [
    (b"", "the file is empty"),
    (gzip.compress(b"a" * 2000, mtime=0), "with gzip.*gunzip < .*a.tar > NEW.tar"),
    (bz2.compress(b"a"), "with bzip2.*bunzip2"),
    (lzma.compress(b"a"), "with xz.*unxz"),
    (b"\x28\xb5\x2f\xfd" + b"1" * 2000, "with Zstandard.*unzstd"),
    (b"version https://git-lfs.github.com/spec/v1\noid 1", "git lfs pull"),
    (b"<!DOCTYPE html>" * 1000, 'not a tar archive .it begins with "<!DOCTYPE html><"'),
    (b"\x89PNG", "not a tar archive"),
])
def test_other_files_are_refused(tmp_path, data, reason):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(AnnotationError, match=reason) as error:
        read(tmp_path / "a.tar")
    assert str(error.value).startswith(str(tmp_path / "a.tar"))


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "none.tar", "no such file"), (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is not a regular file"), (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(AnnotationError, match=reason):
            read(path)


@pytest.mark.parametrize("name, kept", [
    ("000.jpg", {}), ("001.jpg", {"000.jpg": ["caption 0"]}),
    ("001.txt", {"000.jpg": ["caption 0"], "001.jpg": []}),
])
@pytest.mark.parametrize("cut", [300, BLOCK, BLOCK + 5])
def test_a_truncated_tar_keeps_its_whole_members(tmp_path, name, kept, cut):
    write_tar(tmp_path / "a.tar", THREE)
    os.truncate(tmp_path / "a.tar", header_offset(tmp_path / "a.tar", name) + cut)
    if name == "000.jpg" and cut < BLOCK:
        with pytest.raises(AnnotationError, match="not a tar"):
            read(tmp_path / "a.tar")
        return
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == kept
    (problem,) = problems
    assert "cut off" in problem.reason


@pytest.mark.parametrize("name, kept", [
    ("000.jpg", {"001.jpg": ["caption 1"], "002.jpg": ["caption 2"]}),
    ("001.txt", {"000.jpg": ["caption 0"], "001.jpg": [], "002.jpg": ["caption 2"]}),
    ("001.jpg", {"000.jpg": ["caption 0"], "002.jpg": ["caption 2"]}),
    ("002.jpg", {"000.jpg": ["caption 0"], "001.jpg": ["caption 1"]}),
    ("002.txt", {"000.jpg": ["caption 0"], "001.jpg": ["caption 1"], "002.jpg": []}),
])
@pytest.mark.parametrize("junk", [b"\xff", bytes(BLOCK)])
def test_behind_a_damaged_header_the_next_samples_are_found(tmp_path, name, kept, junk):
    write_tar(tmp_path / "a.tar", THREE)
    start = header_offset(tmp_path / "a.tar", name)
    damage(tmp_path / "a.tar", start, junk)
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == kept
    assert problems[0].where == f"byte {start}" or name == "000.jpg"
    assert f"bytes {start:,} to " in problems[0].reason
    assert "no valid header" in problems[0].reason


def test_a_caption_is_not_given_to_the_image_before_the_damage(tmp_path):
    """Both samples have the same key: the second image is lost, its caption is not."""
    write_tar(tmp_path / "a.tar", [("a", {"jpg": b"1" * 600}), ("a", {"jpg": b"2", "txt": b"two"})])
    damage(tmp_path / "a.tar", BLOCK + 1024, b"\xff")
    assert captions(read(tmp_path / "a.tar")[0]) == {"a.jpg": []}


@pytest.mark.parametrize("size", [b"77777777777\0", b"-0000000005\0", b"\xff" * 12, b"\x80" * 12])
def test_a_size_beyond_the_file_is_a_gap(tmp_path, size):
    write_tar(tmp_path / "a.tar", THREE)
    start = header_offset(tmp_path / "a.tar", "001.jpg")
    header = (tmp_path / "a.tar").read_bytes()[start:start + BLOCK]
    damage(tmp_path / "a.tar", start, set_field(header, 124, size))
    items, problems = read(tmp_path / "a.tar")
    assert captions(items) == {"000.jpg": ["caption 0"], "002.jpg": ["caption 2"]}
    assert 'file "001.jpg" has' in problems[0].reason


def test_lost_bytes_do_not_hide_the_samples_behind(tmp_path):
    write_tar(tmp_path / "a.tar", THREE)
    data = (tmp_path / "a.tar").read_bytes()
    start = header_offset(tmp_path / "a.tar", "001.jpg")
    (tmp_path / "a.tar").write_bytes(data[:start] + b"inserted" + data[start:])
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE and "are lost" in problem.reason
    assert data_of(tmp_path / "a.tar", items[2].image) == THREE[2][1]["jpg"]


def test_a_download_that_left_zeros_is_a_problem(tmp_path):
    write_tar(tmp_path / "a.tar", THREE)
    os.truncate(tmp_path / "a.tar", 4 << 20)
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE and "cut off" in problem.reason


def test_an_extended_header_without_its_member_is_a_problem(tmp_path):
    write_tar(tmp_path / "a.tar", [("x" * 200, {"jpg": b"1"})], format=tarfile.GNU_FORMAT)
    for size in (2 * BLOCK, 3 * BLOCK):
        data = (tmp_path / "a.tar").read_bytes()[:2 * BLOCK]
        (tmp_path / "b.tar").write_bytes(data.ljust(size, b"\0"))
        _, problems = read(tmp_path / "b.tar")
        assert "lost" in problems[0].reason


@pytest.mark.parametrize("distance", [1, 200, 257, 258, 300, 511, 512])
def test_a_header_across_two_reads_is_found(tmp_path, distance):
    write_tar(tmp_path / "a.tar", THREE)
    data = (tmp_path / "a.tar").read_bytes()
    start = header_offset(tmp_path / "a.tar", "001.jpg")
    junk = b"\xff" * (WINDOW - distance)
    (tmp_path / "a.tar").write_bytes(data[:start] + junk + data[start:])
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE
    assert f"bytes {start:,} to {start + len(junk):,} are lost" in problem.reason


def test_a_single_block_of_zeros_between_members_is_a_gap(tmp_path):
    write_tar(tmp_path / "a.tar", [("a", {"cls": b""}), *THREE])
    damage(tmp_path / "a.tar", 0, bytes(BLOCK))
    items, (problem,) = read(tmp_path / "a.tar")
    assert captions(items) == ALL_THREE and "bytes 0 to 512 are lost" in problem.reason


def test_the_file_is_closed(tmp_path, monkeypatch):
    opened = []

    def open_archive(path: str) -> Archive:
        opened.append(Archive(path))
        return opened[-1]

    monkeypatch.setattr(tar, "Archive", open_archive)
    write_tar(tmp_path / "a.tar", THREE)
    read(tmp_path / "a.tar")
    found = tar.read(str(tmp_path / "a.tar"), SourceOptions())
    next(found)
    found.close()
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(AnnotationError):
        read(tmp_path / "a.tar")
    assert [archive._file.closed for archive in opened] == [True] * 3


# --- fuzzing ------------------------------------------------------------------------------------


class Extent(NamedTuple):
    """What a valid header in a damaged file claims, with its padding."""

    start: int
    end: int
    is_extension: bool


def small_samples(rng: random.Random) -> dict[str, dict[str, bytes]]:
    """Samples of which each has a caption that tells its key."""
    samples = {}
    for index in range(5):
        key = f"<{index}>" + "k" * rng.choice([0, 0, 120])
        samples[key] = {"jpg": rng.randbytes(rng.randrange(2000)), "txt": b"of <%d>" % index}
        if rng.random() < 0.5:
            samples[key]["json"] = b'{"status": "success"}'
    return samples


def sample_bytes(path: Path, samples: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """The bytes of each sample in its archive, headers included."""
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        starts = [info.offset for info in archive if info.name.endswith(".jpg")]
        last = archive.getmembers()[-1]
    starts.append(last.offset_data + last.size)
    return {key: data[start:end] for key, start, end in zip(samples, starts, starts[1:])}


def mutated(rng: random.Random, data: bytes) -> bytes:
    blocks = [data[start:start + BLOCK] for start in range(0, len(data), BLOCK)]
    first, second = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    kind = rng.randrange(8)
    if kind < 2:
        block = bytearray(blocks[first])
        for _ in range(rng.choice([1, 1, 2, 20])):
            block[rng.randrange(len(block))] = rng.randrange(256)
        blocks[first] = bytes(block)
    elif kind == 2:
        return data[:rng.randrange(len(data))] or b"x"
    elif kind == 3:
        blocks[first], blocks[second] = blocks[second], blocks[first]
    elif kind == 4:
        blocks.insert(first, blocks[second])
    elif kind == 5:
        blocks[first] = bytes(BLOCK)
    elif kind == 6:
        blocks.insert(first, rng.randbytes(rng.randrange(1000)))
    else:
        del blocks[first]
    return b"".join(blocks) or b"x"


def extents(data: bytes) -> list[Extent]:
    """All valid headers, wherever they are."""
    found = []
    for match in re.finditer(b"ustar", data):
        start = match.start() - 257
        try:
            info = tarfile.TarInfo.frombuf(data[max(start, 0):start + BLOCK], "utf-8", "replace")
        except tarfile.HeaderError:
            continue
        end = start + BLOCK + info.size + -info.size % BLOCK
        found.append(Extent(start, end, info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)))
    return found


def must_be_kept(data: bytes, sample: bytes, key: str, headers: list[Extent]) -> bool:
    """Whether a sample is untouched, and no displaced header claims its bytes, name or key."""
    start = data.find(sample)
    name = key[:3].encode()
    return start >= 0 and data.count(name) == sample.count(name) and not any(
        header.start < start < header.end or header.is_extension and header.end == start
        for header in headers
    )


def check_mutation(path: Path, seed: int) -> int:
    """Read a mutated shard; returns the number of samples that had to be kept."""
    rng = random.Random(seed)
    samples = small_samples(rng)
    write_tar(path, samples.items(), format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    whole = sample_bytes(path, samples)
    data = path.read_bytes()
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = mutated(rng, data)
    path.write_bytes(data)
    headers = extents(data)
    expected = {key for key in samples if must_be_kept(data, whole[key], key, headers)}
    try:
        items, _ = read(path)
    except AnnotationError:
        items = []
    found = {item.where.removesuffix(".jpg"): item for item in items}
    assert len(found) == len(items)
    for item in items:
        assert 0 <= item.image.offset <= item.image.offset + item.image.size <= len(data)
    for key in expected:
        assert key in found, f"{key} is lost"
        image = found[key].image
        assert data[image.offset:image.offset + image.size] == samples[key]["jpg"]
        assert found[key].captions == (f"of {key[:3]}",)
    return len(expected)


def test_untouched_samples_of_mutated_tars_are_kept(tmp_path):
    num_kept = 0
    for seed in range(NUM_MUTATIONS):
        try:
            num_kept += check_mutation(tmp_path / "a.tar", seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert num_kept > 2 * NUM_MUTATIONS
