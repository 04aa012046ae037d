"""Data sources: which parts files, folders and patterns hold, and their formats."""

import json
import os
import re
from pathlib import Path

import pytest

from lora_engine.data.rows import BadRow, SourceOptions
from lora_engine.data.sources import path_patterns
from lora_engine.data.sources.file_formats import FORMAT_NAMES, FORMATS, format_of
from lora_engine.data.sources.image_roots import find_image_root
from lora_engine.data.sources.parts import Part, describe, find_parts, with_image_root
from lora_engine.data.sources.path_patterns import expand_braces, gap_notices
from lora_engine.data.sources.split_names import normal_split, split_of

AUTO = SourceOptions()
TAR_HEAD = b"a.jpg".ljust(257, b"\0") + b"ustar\x0000"
ROW = {"text": "a dog", "image": "a.jpg"}
CONTENTS = {
    "json_list": json.dumps([ROW]),
    "json_lines": json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n",
    "coco": json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}],
                        "annotations": [{"image_id": 1, "caption": "a dog"}]}),
    "karpathy": json.dumps({"images": [{"filename": "a.jpg", "split": "train",
                                        "sentences": [{"raw": "a dog"}]}]}),
    "table": "image,caption\na.jpg,a dog\n",
    "flickr": "a.jpg#0\ta dog\n",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files, and makes their folder the working folder, in which paths are short."""
    monkeypatch.chdir(tmp_path)

    def files(*names: str, **contents: str | bytes) -> Path:
        for name, content in [*((name, "") for name in names), *contents.items()]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return files


@pytest.fixture
def unlistable(monkeypatch):
    """Makes a folder refuse to be listed, also for root."""

    def refuse(folder: str) -> None:
        scandir = os.scandir

        def checked(path="."):
            if os.path.abspath(path) == os.path.abspath(folder):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", checked)

    return refuse


def resolved(*paths: str, **given) -> list[Part]:
    """The parts with their folders of images."""
    options = SourceOptions(**given)
    return [with_image_root(part, options) for part in find_parts(paths, options).parts]


def found(*paths: str, **options) -> list[tuple[str, str]]:
    """(format, path relative to the working folder) of the parts."""
    parts = resolved(*paths, **options)
    assert all(os.path.isabs(part.path) and os.path.isabs(part.image_root) for part in parts)
    return [(part.format, os.path.relpath(part.path)) for part in parts]


def paths_of(*paths: str) -> list[str]:
    return [path for _, path in found(*paths)]


def refusal(*paths: str, **options) -> str:
    with pytest.raises(ValueError) as error:
        resolved(*paths, **options)
    return str(error.value)


# --- formats of files -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTENTS)
def test_a_text_file_is_recognized_by_its_content(write, name):
    write(**{"captions.dat": CONTENTS[name]})
    assert found("captions.dat") == [(name, "captions.dat")]


@pytest.mark.parametrize("file, head, name", [
    ("a.tar", b"", "tar"),
    ("A.TAR", b"", "tar"),
    ("shard", TAR_HEAD, "tar"),
    ("a.tar.gz", b"\x1f\x8b", "tar"),
    ("a.tgz", b"\x1f\x8b", "tar"),
    ("a.tar.zst", b"\x28\xb5\x2f\xfd", "tar"),
    ("a.parquet", b"", "parquet"),
    ("shard", b"PAR1", "parquet"),
])
def test_a_binary_file_is_recognized_by_its_suffix_or_first_bytes(write, file, head, name):
    write(**{file: head})
    assert format_of(file) == name


@pytest.mark.parametrize("file, head, message", [
    ("a.json.gz", b"\x1f\x8b", "is compressed; unpack it first: gunzip -k a.json.gz"),
    ("a.zip", b"PK\x03\x04", "is a zip archive; unpack it and give the folder"),
    ("a.arrow", b"ARROW1", "give the folder of save_to_disk"),
    ("a.jpg", b"\xff\xd8", "is an image; give an annotation file, or the folder"),
])
def test_a_file_of_another_kind_is_refused_with_what_to_do(write, file, head, message):
    write(**{file: head})
    assert refusal(file).startswith(f"{file}: ") and message in refusal(file)


def test_a_format_that_cannot_be_told_says_what_was_looked_for(write):
    write(**{"notes": "Dear diary,\nnothing happened"})
    message = refusal("notes")
    assert message.startswith("notes: unknown format")
    for words in ["JSON list", "COCO captions", "WebDataset tar", '"Dear diary,', "--data_format"]:
        assert words in message


def test_a_file_that_cannot_be_read_is_an_error(write, monkeypatch):
    write(**{"a.json": "[]"})
    os.mkfifo("pipe")
    os.symlink("nowhere", "link.json")
    assert refusal("pipe") == "pipe: is not a regular file"
    assert refusal("link.json") == "link.json: no such file"


def test_a_given_format_is_not_guessed(write):
    write(**{"a.json": CONTENTS["json_lines"]})
    assert found("a.json", format="json_lines") == [("json_lines", "a.json")]
    assert found("a.json", format="tar") == [("tar", "a.json")]
    assert refusal("a.json", format="sidecars") == (
        "a.json: is a file, but --data_format sidecars reads folders"
    )


def test_an_unknown_format_is_refused_with_all_names(write):
    message = refusal("a.json", format="json_line")
    assert "there is no format json_line; did you mean json_lines" in message
    assert all(name in message for name in FORMAT_NAMES)
    assert FORMAT_NAMES[0] == "auto" and len(FORMAT_NAMES) == len(FORMATS) + 1


# --- patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, names", [
    ("{08..11}", "08 09 10 11"),
    ("{8..11}", "8 9 10 11"),
    ("{000..4..2}", "000 002 004"),
    ("{2..0}", "2 1 0"),
    ("{train,val}.json", "train.json val.json"),
    ("{a,b}{1,2}", "a1 a2 b1 b2"),
    ("x{a,b{1..2},}y", "xay xb1y xb2y xy"),
    ("{a}{b,c}", "{a}b {a}c"),
    ("{a{1,2}}", "{a1} {a2}"),
    ("{a,b", "{a,b"),
    ("a}{1,2}", "a}1 a}2"),
    ("plain", "plain"),
])
def test_braces_expand_as_in_bash(pattern, names):
    assert list(expand_braces(pattern)) == names.split()


def test_missing_shards_of_a_brace_pattern_are_reported_and_the_others_read(write):
    write("shards/0000.tar", "shards/0002.tar")
    sources = find_parts("shards/{0000..0003}.tar", AUTO)
    assert [os.path.basename(part.path) for part in sources.parts] == ["0000.tar", "0002.tar"]
    reason = "no such file, named by the pattern shards/{0000..0003}.tar"
    assert sources.bad == [BadRow("shards/0001.tar", reason), BadRow("shards/0003.tar", reason)]
    assert sources.notices == []  # already reported


def test_wildcards_match_in_natural_order_and_may_stand_in_braces(write):
    write("b/1.tar", "a10.tar", "a2.tar", "a1.tar", ".hidden.tar", "c/d/e.tar")
    assert paths_of("*.tar") == ["a1.tar", "a2.tar", "a10.tar"]
    assert paths_of("**/*.tar") == ["a1.tar", "a2.tar", "a10.tar", "b/1.tar", "c/d/e.tar"]
    assert paths_of("{c/d,b}/*.tar") == ["c/d/e.tar", "b/1.tar"]
    assert paths_of("**") == paths_of("**/*.tar")
    assert find_parts("**", AUTO).notices == []  # no file is found twice
    assert paths_of("[bc]") == ["b/1.tar", "c/d/e.tar"]


def test_a_path_that_exists_is_not_a_pattern(write):
    write("{a,b}.tar", "a.tar", "[x].tar", "x.tar")
    assert paths_of("{a,b}.tar", "[x].tar") == ["{a,b}.tar", "[x].tar"]


def test_the_home_folder_may_be_written_as_a_tilde(write, monkeypatch):
    monkeypatch.setenv("HOME", str(write("a.tar")))
    assert paths_of("~/*.tar") == paths_of("~/a.tar") == ["a.tar"]


@pytest.mark.parametrize("path, words", [
    ("trian.json", "no such file or folder; did you mean train.json in {here}?"),
    ("fotos/x.json", "no such file or folder; did you mean photos in {here}?"),
    ("photos/*.csv", "nothing matches this pattern: looked for *.csv in {here}/photos, which has "
                     "1.png, 2.png, 10.png"),
    ("**/x", "looked for **/x in {here}, which has"),
    ("ph*/**/x", "looked for **/x in {here}/photos"),
    ("{10..12}.tar", "nothing matches this pattern: looked for 10.tar in {here}, which has empty"),
    ("empty/a.tar", "looked for a.tar in {here}/empty, which is empty"),
    ("{0..99999999}", "stands for more than 1,000 names"),
    ("nul\0", "no such file or folder"),
    ("*nul\0", "nothing matches this pattern"),
])
def test_a_path_to_nothing_says_what_is_there(write, path, words, monkeypatch):
    monkeypatch.setattr(path_patterns, "MAX_NAMES", 1_000)
    here = write("train.json", "photos/10.png", "photos/2.png", "photos/1.png", "empty/.hidden")
    message = refusal(path)
    assert message.startswith(f"{path}: ") and words.format(here=here) in message


def test_no_path_at_all_is_refused():
    for paths in ([], [""], ""):
        with pytest.raises(ValueError, match="the path of the data is empty"):
            find_parts(paths, AUTO)


def test_a_file_that_is_named_twice_is_read_once(write):
    write("a.tar", "b.tar")
    os.symlink("a.tar", "link.tar")
    sources = find_parts(["b.tar", "*.tar", "./a.tar"], AUTO)
    assert [os.path.basename(part.path) for part in sources.parts] == ["b.tar", "a.tar"]
    assert sources.notices == ["named more than once, read once: b.tar, link.tar, ./a.tar"]


@pytest.mark.parametrize("names, gaps", [
    ("00000.tar 00001.tar 00003.tar", "00002 is missing"),
    ("a-07.tar a-08.tar a-10.tar a-13.tar a-14.tar a-15.tar", "09, 11, 12 are missing"),
    ("a-00000-of-00003.parquet", "00001, 00002 are missing"),
    ("a-00001-of-00003.parquet a-00002-of-00003.parquet", "00000 is missing"),
    ("a-00000-of-00009.parquet", "00001, 00002, 00003, 00004, 00005 and 3 more are missing"),
    ("1.tar 2.tar", None),
    ("20240101.tar 20240301.tar", None),
    ("a-1.tar b-3.tar c-5.tar", None),
    ("a.tar b.tar", None),
])
def test_gaps_in_shard_numbers_are_noticed(names, gaps):
    notices = gap_notices([f"/data/{name}" for name in names.split()])
    if gaps is None:
        assert notices == []
    else:
        (notice,) = notices
        assert notice.startswith(f"/data: shard numbers have gaps: {gaps}; img2dataset leaves such")


# --- folders --------------------------------------------------------------------------------


def test_a_folder_of_tars_is_its_shards_without_the_reports_of_img2dataset(write):
    here = write(*(f"cc3m/{number:05d}{suffix}" for number in (10, 2, 0, 1)
                   for suffix in (".tar", ".parquet", "_stats.json")), "cc3m/_tmp/1.feather")
    sources = find_parts("cc3m", AUTO)
    assert [os.path.basename(part.path) for part in sources.parts] == [
        "00000.tar", "00001.tar", "00002.tar", "00010.tar"
    ]
    assert resolved("cc3m")[0] == Part("tar", f"{here}/cc3m/00000.tar", f"{here}/cc3m")
    assert describe(sources.parts) == "4 WebDataset tars"
    assert paths_of("cc3m/*0*") == paths_of("cc3m")


def test_a_folder_of_tars_with_gaps_is_noticed(write):
    write("s/00000.tar", "s/00001.tar", "s/00003.tar")
    (notice,) = find_parts("s", AUTO).notices
    assert "00002 is missing" in notice


def test_shards_of_a_folder_are_in_natural_order(write):
    write("s/2.tar", "s/10.tar", "s/1.tar")
    assert paths_of("s") == ["s/1.tar", "s/2.tar", "s/10.tar"]


def test_compressed_tars_in_a_folder_are_given_to_the_reader_that_refuses_them(write):
    write("s/a.tar.gz", "s/b.jpg", "s/b.txt")
    assert found("s") == [("tar", "s/a.tar.gz")]


def test_a_folder_of_parquet_files_is_those_files(write):
    write("d/README.md", "d/data/train-00001-of-00002.parquet",
          "d/data/train-00000-of-00002.parquet", "d/00000_stats.json")
    assert found("d") == [("parquet", "d/data/train-00000-of-00002.parquet"),
                          ("parquet", "d/data/train-00001-of-00002.parquet")]


def test_a_saved_dataset_is_its_arrow_files(write):
    state = json.dumps({"_data_files": [{"filename": "0.arrow"}, {"filename": "1.arrow"}]})
    here = write("d/train/0.arrow", "e/0.arrow", **{
        "d/dataset_dict.json": '{"splits": ["train"]}', "d/train/state.json": state,
        "e/state.json": state,
    })
    assert resolved("d", "e") == [
        Part("arrow", f"{here}/d/train/0.arrow", f"{here}/d/train", "train"),
        Part("arrow", f"{here}/d/train/1.arrow", f"{here}/d/train", "train"),
        Part("arrow", f"{here}/e/0.arrow", f"{here}/e"),
        Part("arrow", f"{here}/e/1.arrow", f"{here}/e"),
    ]
    assert describe(resolved("d", "e")) == "2 Hugging Face datasets (save_to_disk)"


def test_a_folder_with_metadata_is_one_part_or_one_for_each_split(write):
    metadata = '{"file_name": "a.jpg", "text": "a dog"}\n'
    here = write("d/train/a.jpg", "d/val/a.tar", "d/other/x.jpg", **{
        "d/train/metadata.jsonl": metadata, "d/test/metadata.csv": "file_name,text\na.jpg,a dog\n",
        "e/metadata.jsonl": metadata, "e/train/metadata.jsonl": metadata,
    })
    sources = find_parts("d", AUTO)
    assert resolved("d") == [
        Part("image_folder", f"{here}/d/test", f"{here}/d/test", "test"),
        Part("image_folder", f"{here}/d/train", f"{here}/d/train", "train"),
    ]
    assert sources.notices == ["d/val: not read: it has no metadata.jsonl or metadata.csv"]
    assert found("e") == [("image_folder", "e")]
    assert resolved("e", image_root="d")[0].image_root == f"{here}/d"


def test_a_folder_of_images_with_caption_files_is_one_part(write):
    here = write("d/x/a.jpg", "d/x/a.caption", "d/captions.json", "d/b.jpg")
    assert resolved("d", image_root="d/x") == [
        Part("sidecars", f"{here}/d", f"{here}/d")
    ]


def test_the_loose_files_of_img2dataset_are_one_part(write):
    write("d/00000/000000000.jpg", "d/00000/000000000.txt", "d/00000/000000000.json",
          "d/00000.parquet", "d/00000_stats.json")
    assert found("d") == [("sidecars", "d")]


def test_the_one_annotation_file_beside_images_is_read(write):
    write("d/images/a.jpg", "d/README.txt", "d/.cache/b.json", **{
        "d/captions.txt": CONTENTS["table"],
        "d/urls.tsv": "a dog\thttp://localhost/a.jpg\n",
    })
    assert found("d") == [("table", "d/captions.txt")]
    assert found("d", format="sidecars") == [("sidecars", "d")]
    write(**{"d/val.json": CONTENTS["json_list"]})
    assert refusal("d") == (
        "d: has 2 annotation files (captions.txt, val.json): name the ones to use"
    )


def test_a_given_format_chooses_among_what_a_folder_has(write):
    write("d/a.tar", "d/b/a.parquet", "d/b.jpg", "d/b.txt",
          **{"d/c.json": CONTENTS["coco"], "d/metadata.csv": CONTENTS["table"]})
    assert found("d") == [("image_folder", "d")]
    assert found("d", format="tar") == [("tar", "d/a.tar")]
    assert found("d", format="parquet") == [("parquet", "d/b/a.parquet")]
    assert found("d", format="sidecars") == [("sidecars", "d")]
    assert refusal("d", format="arrow") == (
        "d: no Hugging Face dataset (save_to_disk) (--data_format arrow) in this folder; it has 1 "
        ".csv, 1 .jpg, 1 .json, 1 .parquet, 1 .tar, 1 .txt (a.tar, b.jpg, b.txt, c.json, "
        "metadata.csv)"
    )
    assert refusal("d", format="coco").startswith("d: has 3 annotation files (b.txt, c.json, meta")


def test_a_folder_without_captions_says_what_it_looked_for_and_what_is_there(write):
    write("d/a.jpg", "d/b.jpg", "d/c.pdf", "d/README", "empty/.hidden", "docs/config.json")
    message = refusal("d")
    for words in ["d: no images with captions in this folder", "metadata.jsonl", "*.tar",
                  "*.parquet", ".caption", "state.json", "2 .jpg", "1 .pdf", "1 without a suffix",
                  "(README, a.jpg, b.jpg, c.pdf)", "call them x.txt for x.jpg"]:
        assert words in message
    assert "it has no files" in refusal("empty")
    assert refusal("docs").endswith(" or the annotation file itself")


def test_a_folder_that_cannot_be_listed_is_an_error_and_one_below_it_is_reported(
    write, unlistable
):
    write("d/a.tar", "d/lost+found/b.tar")
    unlistable("d/lost+found")
    sources = find_parts("d", AUTO)
    assert len(sources.parts) == 1
    reason = "cannot list this folder: Permission denied"
    assert sources.bad == [BadRow("d/lost+found", reason)]
    unlistable("d")
    assert refusal("d") == refusal("d", format="tar") == f"d: {reason}"


# --- folders of images ----------------------------------------------------------------------


@pytest.mark.parametrize("file, image, root", [
    ("d/a.json", "d/a.jpg", "d"),
    ("d/a.json", "d/images/a.jpg", "d/images"),
    ("d/annotations/a.json", "d/val2017/a.jpg", "d/val2017"),
    ("d/text/a.json", "d/a.jpg", "d"),
    ("d/a.json", "elsewhere/b.jpg", "d"),
    ("d/a.json", "d/x/y/a.jpg", "d"),
])
def test_the_folder_of_the_images_is_found_near_the_file(write, file, image, root):
    here = write(image, "d/.hidden/a.jpg", "d/other/b.jpg", **{file: CONTENTS["json_list"]})
    (part,) = resolved(file)
    assert part.image_root == f"{here}/{root}"


def test_the_folder_of_the_images_has_most_of_them(write):
    here = write("d/a.json", *(f"d/few/{n}.jpg" for n in range(4)),
                 *(f"d/most/{n}.jpg" for n in range(7)), "d/0.jpg")
    names = [f"{n}.jpg" for n in range(10)]
    assert find_image_root("d/a.json", names) == f"{here}/d/most"
    assert find_image_root("d/a.json", [*names, *map(str, range(9))]) == f"{here}/d"
    assert find_image_root("d/a.json", []) == find_image_root("d/a.json", ["0.jpg"]) == f"{here}/d"
    assert find_image_root("d/a.json", ["0.jpg", "1.jpg"]) == f"{here}/d/few"


def test_a_missing_image_does_not_lead_to_a_copy_of_the_data(write):
    here = write(*(f"one/{n}.jpg" for n in range(6)), *(f"copy/{n}.jpg" for n in range(10)))
    names = [f"{n}.jpg" for n in range(10)]
    assert find_image_root("one/a.json", names) == f"{here}/one"
    (here / "one/5.jpg").unlink()
    assert find_image_root("one/a.json", names) == f"{here}/copy"


def test_paths_with_folders_are_found_below_the_folder_of_images(write):
    write("d/images/val2014/a.jpg", **{"d/k.json": CONTENTS["karpathy"].replace(
        '"filename"', '"filepath": "val2014", "filename"')})
    parts = resolved("d/k.json")
    assert describe(parts) == "Karpathy splits, images in images"


def test_a_given_folder_of_images_is_used_and_must_exist(write):
    here = write("d/a.jpg", "x/b.jpg", **{"d/a.json": CONTENTS["json_list"]})
    assert resolved("d/a.json", image_root="x")[0].image_root == f"{here}/x"
    assert refusal("d/a.json", image_root="y") == "y: no such folder, given as --image_root"


def test_absolute_paths_and_bad_rows_do_not_choose_a_folder(write):
    images = ("/nowhere/a.jpg", 7, " ", "http://x/a.jpg", "a.jpg")
    rows = [{"text": "x", "image": image} for image in images]
    here = write("d/images/a.jpg", **{"d/a.json": json.dumps([3, *rows])})
    (part,) = resolved("d/a.json", format="json_list")
    assert part.image_root == f"{here}/d/images"


def test_a_broken_annotation_file_is_refused_with_its_line(write):
    write(**{"a.json": "[\n{"})
    assert refusal("a.json").startswith(f"{os.path.abspath('a.json')}:2: not JSON")


def test_a_list_of_web_addresses_is_answered_with_the_download_command(write):
    write(**{"cc3m.tsv": "a dog\thttp://localhost/a.jpg\n"})
    assert re.search("lora-engine download .*cc3m.tsv", refusal("cc3m.tsv"))


# --- what is told, and splits ---------------------------------------------------------------


def test_parts_are_described_in_a_line(write):
    def part(name, path="/d/text/a.json", root="/d/text"):
        return Part(name, path, root)

    assert describe([part("json_list")]) == "JSON list"
    assert describe([part("coco", root="/d/val2017")]) == "COCO captions, images in ../val2017"
    tars = [part("tar", "/d/0.tar"), part("tar", "/x/1.tar", root="/x")]
    assert describe([tars[0], part("json_list"), tars[1]]) == (
        "2 WebDataset tars; JSON list"
    )
    tables = [part("table", f"/d/text/{name}.csv", root=f"/d/{name}") for name in "ab"]
    assert describe(tables) == (
        "2 CSV or TSV tables, images in ../a, ../b"
    )


@pytest.mark.parametrize("path, split", [
    ("cc3m-train-0001.tar", "train"),
    ("cc3m_validation.0001.tar", "val"),
    ("val/00000.tar", "val"),
    ("Training/dev/00000.tar", "val"),
    ("train/test-0.tar", "test"),
    ("trainer/strain-0.tar", ""),
    ("train_val/0.tar", ""),
    ("00000.tar", ""),
])
def test_the_split_of_a_shard_is_a_whole_word_of_its_path_below_the_root(path, split):
    assert split_of(f"/home/test/train/{path}", "/home/test/train") == split


@pytest.mark.parametrize("name, split", [
    ("restval", "train"), ("Train", "train"), ("VALIDATION", "val"), ("valid", "val"),
    (" dev ", "val"), ("testing", "test"), ("test-dev", "test-dev"), ("Extra", "Extra"), ("", ""),
])
def test_names_of_splits_are_normalized(name, split):
    assert normal_split(name) == split
