"""Text formats: which format a file has, its items, and what is said about records and files."""

import csv
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.formats import (
    coco,
    flickr,
    json_lines,
    json_list,
    karpathy,
    table,
    url_list,
)
from lora_engine.data.rows import (
    AnnotationError,
    Item,
    Problem,
    SourceOptions,
    caption_complaint,
    image_complaint,
)

FORMATS = {
    module.__name__.rpartition(".")[2]: module
    for module in (coco, flickr, json_lines, json_list, karpathy, table, url_list)
}
COCO = {
    "info": {"description": "COCO 2017"},
    "images": [{"license": 4, "file_name": "7.jpg", "id": 7}],
    "annotations": [{"image_id": 7, "id": 1, "caption": "a dog"}],
}
KARPATHY = {
    "images": [{
        "filepath": "val2014", "sentids": [1], "filename": "7.jpg", "imgid": 0, "split": "restval",
        "sentences": [{"tokens": ["a", "dog"], "raw": "A dog.", "imgid": 0, "sentid": 1}],
        "cocoid": 7,
    }],
    "dataset": "coco",
}
EVALUATED = {"image": "/a.jpg", "references": ["a", "b"], "base": {"caption": "c", "ended": True}}
CAPTIONED = {"image": "/a.jpg", "references": ["a", "b"], "before": "c", "after": "d"}


def write(folder, content: str | bytes, name: str = "data.txt") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(module: ModuleType, path: str, **options) -> list[Item | Problem]:
    return list(module.read(path, SourceOptions(**options)))


def error_of(module: ModuleType, path: str, **options) -> str:
    """The error's message, which begins with the path, without its folder."""
    with pytest.raises(AnnotationError) as caught:
        read(module, path, **options)
    assert str(caught.value).startswith(path)
    return str(caught.value).replace(os.path.dirname(path) + os.sep, "")


def is_refused(item: Item | Problem) -> bool:
    """Whether the item cannot be used, for the reader or for the checks that all formats share."""
    if isinstance(item, Problem):
        return True
    return image_complaint(item.image) is not None or any(map(caption_complaint, item.captions))


# --- recognizing ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, head, expected", [
    ("x", '[{"text": "a", "image": "1.jpg"}]', "json_list"),
    ("x.txt", '\ufeff \r\n[\n  {"caption": "a", "file_name": "1.jpg"},\n', "json_list"),
    ("x.csv", "[]", "json_list"),
    ("x.json", "[7, 8]", "json_list"),
    ("x.json", "", "json_list"),
    ("x.json", "null", "json_list"),
    ("x.json", '{"data": [], "info": 1}', "json_list"),
    ("x.json", '{\n "data": [\n', "json_list"),
    ("x", '{"text": "a", "image": "1.jpg"}\n{"text": "b", "image": "2.jpg"}\n', "json_lines"),
    ("x.json", '{"text": "a } {", "image": "1.jpg"}\n\n{"text": "b', "json_lines"),
    ("metadata.jsonl", '{"file_name": "1.jpg", "text": "a \\" }"}', "json_lines"),
    ("x.jsonl", '{"text": "a", "ima', "json_lines"),
    ("x", '{"image": "1.jpg", "annotations": [{"caption": "a"}]}\n{"image"', "json_lines"),
    ("x", '{"images": ["1.jpg"], "caption": "a"}\n', "json_lines"),
    ("x.jsonl", '{"annotations": [{"caption": "a"}], "image": "1.jpg"}\n', "json_lines"),
    ("x.jsonl", '{"image": "1.jpg", "url": "https://a.b/1.jpg", "text": "a"}\n', "json_lines"),
    ("x", '{"x" [{"a": 1', "json_lines"),
    ("x.jsonl", "", "json_lines"),
    ("captions.jsonl", json.dumps(EVALUATED) + "\n", "json_lines"),
    ("captions.jsonl", json.dumps(CAPTIONED) + "\n" + json.dumps(CAPTIONED), "json_lines"),
    ("x.json", json.dumps(COCO), "coco"),
    ("x", json.dumps(COCO, indent=1, sort_keys=True), "coco"),
    ("x", json.dumps(COCO)[:110], "coco"),  # "annotations" come after the head
    ("x", json.dumps(COCO, sort_keys=True)[:60], "coco"),  # "images" come after the head
    ("x.json", '{"images": [], "annotations": []}', "coco"),
    ("x.json", '{"images": [{"filename": "1.jpg"}], "annotations": []}', "coco"),
    ("x.json", json.dumps(KARPATHY), "karpathy"),
    ("x", json.dumps(KARPATHY, indent=1, sort_keys=True), "karpathy"),
    ("x", json.dumps(KARPATHY)[:80], "karpathy"),
    ("captions.txt", "image,caption\n1.jpg,A child .\n", "table"),
    ("x", '\ufeffimage,caption\r\n1.jpg,"two\nlines"\r\n', "table"),
    ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| Two men , here .", "table"),
    ("train.tsv", "filepath\ttitle\n1.jpg\tsee https://a.b\n", "table"),
    ("x", "\tfilepath\ttitle\n0\t1.jpg\thttps://is.text/\n", "table"),
    ("x", "image;url;text\n1.jpg;https://a.b/1.jpg;a\n", "table"),
    ("x", "image,filename,text\nhttps://a.b/1.jpg,1.jpg,a\n", "table"),
    ("metadata.csv", "file_name,text\n", "table"),
    ("x.csv", "1.jpg,a dog\n2.jpg,a cat\n", "table"),  # whose reader asks for a header
    ("captions.txt", "1.jpg\ta dog\n", "table"),
    ("x.csv", "", "table"),
    ("Flickr8k.token.txt", "1_6.jpg#0\tA child in a pink dress , outside .\n", "flickr"),
    ("results_20130124.token", "1.jpg#0\tTwo , three | four ; five\n", "flickr"),
    ("x.csv", "1.jpg#0\ta\n1.jpg#1\tb", "flickr"),
    ("x.tsv", "a very typical bus station\thttp://lh6.ggpht.com/-IvRt/TvLBhA/n.JPG", "url_list"),
    ("x", "globes : the , green #3\thttps://a.b/g-1,2.jpg?x=1\nb\thttp://c", "url_list"),
    ("x", "[person] on {stage}\thttps://a.b/1.jpg\n", "url_list"),
    ("x.txt", "https://a.b/1.jpg\nhttps://a.b/2.jpg\n", "url_list"),
    ("x", "http://a.b/1.jpg#0\tx\n", "url_list"),
    ("x", "image,caption\nhttps://a.b/1.jpg,a dog\n", "url_list"),
    ("x", "URL,TEXT,WIDTH\nhttps://a.b/1.jpg,a dog,3\n", "url_list"),
    ("x", 'caption\timg_src\n"a"\t"https://a.b"\n', "url_list"),
    ("x.csv", "url\nhttps://a.b/1.jpg\n", "url_list"),
    ("x.jsonl", '{"url": "https://a.b/1.jpg", "caption": "a"}\n{"url"', "url_list"),
    ("x.json", '[ {"URL": "https://a.b/1.jpg", "TEXT": "a"}]', "url_list"),
    ("x", "", None),
    ("x.txt", "a dog jumps, over a fence\n", None),
    ("x", "image\n1.jpg\n", None),
    ("x.bin", "\x00\x01\ufffd{", None),
    ("x", "{{{[[[\"", None),
])
def test_a_file_has_one_format_by_its_beginning(name, head, expected):
    assert [name_ for name_, module in FORMATS.items() if module.recognizes(name, head)] == (
        [] if expected is None else [expected]
    )


STARTS = ("", "[", "{", '[{"', '{"images":[{"', "image,text\n", "image\ttext\n", "1.jpg#0\t")


@given(
    st.sampled_from(STARTS),
    st.text(st.sampled_from('{}[]":,\\\t\n\r |;#ab0\x00\ud83d😀'), max_size=60),
    st.sampled_from(("x", "x.json", "x.jsonl", "x.csv")),
)
def test_any_content_has_at_most_one_format_and_causes_no_crash(
    tmp_path_factory, start, rest, name
):
    head = start + rest
    assert sum(module.recognizes(name, head) for module in FORMATS.values()) <= 1
    content = head.encode(errors="surrogatepass")
    path = write(tmp_path_factory.getbasetemp(), content, name)
    for module in FORMATS.values():
        try:
            read(module, path)
        except AnnotationError as error:
            assert str(error).startswith(path)


# --- what a file yields ---------------------------------------------------------------------


def test_json_lists_and_lines_yield_the_same_items_by_line(tmp_path):
    rows = [
        {"text": " a dog ", "image": "1.jpg", "other": [{"text": 3}]},
        {"captions": ["ein 🐕, \"so\" [{,", "犬"], "file_name": "sub/2.jpg", "split": "val"},
        {"sentences": [{"raw": "c"}], "filename": "3.jpg"},
        CAPTIONED,
        EVALUATED,
        {"image": "4.jpg", "adapter": "run/adapter", "caption": "d"},
    ]
    expected = [
        Item(1, "1.jpg", [" a dog "]),
        Item(2, "sub/2.jpg", ["ein 🐕, \"so\" [{,", "犬"], "val"),
        Item(3, "3.jpg", ["c"]),
        Item(4, "/a.jpg", ["a", "b"]),
        Item(5, "/a.jpg", ["a", "b"]),
        Item(6, "4.jpg", ["d"]),
    ]
    for ascii_only, mark, end in ((True, "", "\n"), (False, "\ufeff", "\r\n")):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        path = write(tmp_path, mark + "[" + f",{end}".join(lines) + "]" + end)
        assert read(json_list, path) == expected
        path = write(tmp_path, mark + end.join(lines))
        assert read(json_lines, path) == expected
    path = write(tmp_path, "\r\n\t [\n" + json.dumps(rows[:2], indent=0)[1:])
    assert [item.where for item in read(json_list, path)] == [4, 13]
    path = write(tmp_path, "\n\n" + json.dumps(rows[0]) + "\n \n" + json.dumps(rows[0]) + "\n")
    assert [item.where for item in read(json_lines, path)] == [3, 5]


def test_named_fields_are_read(tmp_path):
    options = {"image_field": "src", "caption_field": "alt"}
    row = {"src": "1.jpg", "alt": "a", "text": "b", "image": "c"}
    assert read(json_list, write(tmp_path, json.dumps([row])), **options) == [
        Item(1, "1.jpg", ["a"])
    ]
    assert read(json_lines, write(tmp_path, json.dumps(row)), **options)[0].image == "1.jpg"
    path = write(tmp_path, "text;alt;image;src\nb;a;c;1.jpg\n")
    assert read(table, path, **options) == [Item(2, "1.jpg", ("a",))]
    row = {"filename": "x", "filepath": "f", "src": "1.jpg", "alt": [{"raw": "a"}], "split": "test"}
    path = write(tmp_path, json.dumps({"images": [row]}))
    assert read(karpathy, path, **options) == [Item('item 0 of "images"', "f/1.jpg", ["a"], "test")]
    path = write(tmp_path, json.dumps({
        "images": [{"id": 1, "src": "1.jpg"}], "annotations": [{"image_id": 1, "alt": "a"}]
    }))
    assert read(coco, path, **options)[0][1:3] == ("1.jpg", ["a"])


def test_coco_images_have_all_their_captions_and_their_id(tmp_path):
    content = {
        "annotations": [
            {"image_id": 5, "caption": " a cat "}, {"image_id": "x", "caption": "a dog"},
            {"image_id": 5, "caption": "cats"},
        ],
        "images": [
            {"id": "x", "file_name": "a.jpg"}, {"id": 5, "file_name": "sub/b.jpg"},
            {"id": 6, "file_name": "c.jpg"},
        ],
    }
    assert read(coco, write(tmp_path, json.dumps(content, indent=1).encode("utf-8-sig"))) == [
        Item('item 0 of "images"', "a.jpg", ["a dog"], id="x"),
        Item('item 1 of "images"', "sub/b.jpg", [" a cat ", "cats"], id=5),
        Item('item 2 of "images"', "c.jpg", [], id=6),
    ]


def test_karpathy_images_have_folder_split_and_id(tmp_path):
    flickr30k = {"sentences": [{"raw": "a"}, {"raw": "b"}], "filename": "1.jpg", "imgid": 3,
                 "split": "train"}
    plain = {"filename": "2.jpg", "sentences": ["c"]}
    content = json.dumps({"images": [*KARPATHY["images"], flickr30k, plain]})
    assert read(karpathy, write(tmp_path, content)) == [
        Item('item 0 of "images"', "val2014/7.jpg", ["A dog."], "restval", 7),
        Item('item 1 of "images"', "1.jpg", ["a", "b"], "train", 3),
        Item('item 2 of "images"', "2.jpg", ["c"]),
    ]


def test_flickr_rows_keep_every_character_of_the_caption(tmp_path):
    path = write(tmp_path, '1.jpg#0\tA "child" , here | 😀 .\r\n\r\n1.jpg.1#12\t#1\ta\n')
    assert read(flickr, path) == [
        Item(1, "1.jpg", ('A "child" , here | 😀 .',)),
        Item(3, "1.jpg.1", ("#1\ta",)),
    ]


@pytest.mark.parametrize("content, expected", [
    # Flickr8k on Kaggle
    ('image,caption\n1.jpg,A "big" dog .\n1.jpg,"A dog , ""here"" ."\n',
     [(2, "1.jpg", 'A "big" dog .'), (3, "1.jpg", 'A dog , "here" .')]),
    # Flickr30k
    ("image_name| comment_number| comment\n1.jpg| 0| Two | \"young\" men , here .\n",
     [(2, "1.jpg", ' Two | "young" men , here .')]),
    # open_clip; the second row as pandas writes it, the third as it is
    ('filepath\ttitle\n1.jpg\ta, b\n2.jpg\t"a ""red"" dog"\n3.jpg\t"so" it is\n4.jpg\tx\ty\n',
     [(2, "1.jpg", "a, b"), (3, "2.jpg", 'a "red" dog'), (4, "3.jpg", '"so" it is'),
      (5, "4.jpg", "x\ty")]),
    # imagefolder's metadata.csv, with a byte order mark and \r\n
    ('\ufefffile_name,text\r\n1.jpg,"two\r\nlines"\r\n\r\n,\r\n2.jpg,"a; |b"\r\n',
     [(2, "1.jpg", "two\r\nlines"), (6, "2.jpg", "a; |b")]),
    # a caption with commas that nobody quoted, and empty cells at the end
    ('image,caption\n1.jpg,a dog, a cat\n2.jpg,a,,\n3.jpg, "b, c"\n',
     [(2, "1.jpg", "a dog, a cat"), (3, "2.jpg", "a"), (4, "3.jpg", "b, c")]),
    # the index of a data frame; several captions in a cell, as in nlphuji/flickr30k
    (',Filename , raw\n0, 1.jpg ,"[""a, b"", ""c""]"\n', [(2, "1.jpg", "a, b", "c")]),
    ("image;caption\n1.jpg;[\"a\"\n", [(2, "1.jpg", '["a"')]),
    ("\n\nimage;caption\n\n1.jpg;犬, 😀\n", [(5, "1.jpg", "犬, 😀")]),
    ("image,text\r1.jpg,a\r2.jpg,b", [(2, "1.jpg", "a"), (3, "2.jpg", "b")]),  # an old Mac's
    ("path,image,text\nx,1.jpg,a\n", [(2, "1.jpg", "a")]),  # "image" is never ambiguous
])
def test_a_table_is_read_with_its_delimiter_and_quotes(tmp_path, content, expected):
    items = read(table, write(tmp_path, content))
    assert [(item.where, item.image, *item.captions) for item in items] == expected


def test_a_table_has_splits(tmp_path):
    path = write(tmp_path, "split|image|caption\nval | 1.jpg|a\n|2.jpg|b\n")
    assert read(table, path) == [Item(2, "1.jpg", ("a",), "val"), Item(3, "2.jpg", ("b",))]


def test_what_csv_writes_is_read_back(tmp_path):
    captions = ["a", 'a "b", c', "a\nb", ' "c" ', "d;\te|f", '"', "😀", "'", "g,"]
    for delimiter in ",;":
        with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["image", "caption"], *(["1.jpg", text] for text in captions)])
        items = read(table, str(tmp_path / "x.csv"))
        assert [item.captions[0] for item in items] == captions


def test_urls_are_answered_with_the_download_command(tmp_path):
    path = write(tmp_path, "a dog\thttps://a.b/1.jpg\n", "cc3m.tsv")
    assert "lora-engine download" in error_of(url_list, path)


# --- what cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize("module, content, message", [
    (json_list, "", "data.txt: the file is empty, expected a JSON list"),
    (json_list, " \n", "data.txt: the file is empty"),
    (json_list, "[]", "data.txt: an empty list"),
    (json_list, "null", "data.txt: found null, expected a JSON list"),
    (json_list, "text,image\na,b", "data.txt:1: not JSON (column 1): Expecting value"),
    (json_list, '[{"text": "a",\n "image" "b"}]', "data.txt:2: not JSON (column 10): Expecting"),
    (json_list, '[\n{"text": "a"}\n{"text"', "data.txt:3: not JSON (column 1): Expecting ','"),
    (json_list, '[{"text": "a", "image": "b"}', "data.txt:1: not JSON (column 29)"),
    (json_list, '[{"text": "a"},\n]', "data.txt:2: not JSON (column 1)"),
    (json_list, '[{"text": "a"}]\n]', "data.txt:2: not JSON (column 1): Extra data"),
    (json_list, "[" * 100_000, "data.txt:1: JSON that cannot be read"),
    (json_list, f'[\n{{"text": {"1" * 5000}}}]', "data.txt:2: JSON that cannot be read"),
    (json_list, b'[\n{"text": "caf\xe9"', "data.txt:2: not UTF-8 (byte 0xe9): save the file as"),
    (json_list, '{"data": [], "info": 1}', 'an object with the keys "data", "info", expected a'),
    (json_lines, "\n \r\n", "data.txt: the file is empty"),
    (json_lines, '{"text": "a"}'.encode("utf-16"), "data.txt: is UTF-16: save the file as UTF-8"),
    (coco, "", "data.txt:1: not JSON"),
    (coco, json.dumps(COCO)[:-9], "data.txt:1: not JSON"),
    (coco, json.dumps(COCO) + "\n]", "data.txt:2: not JSON (column 1): Extra data"),
    (coco, '{"images":' * 100_000, "data.txt:1: JSON that cannot be read"),
    (coco, "[]", "data.txt: found [], expected an object"),
    (coco, '{"images": [], "annotations": []}', 'data.txt: "images" is an empty list'),
    (coco, '{"images": {}, "annotations": []}', 'data.txt: "images" is not a list but {}'),
    (coco, '{"images": []}', 'data.txt: "annotations" is not a list but missing'),
    (coco, '{"images": [1], "annotations": [{"bbox": 1}]}', 'has a "caption" (the keys are "b'),
    (karpathy, "", "data.txt:1: not JSON"),
    (karpathy, '{"images": []}', "data.txt: found [] as images"),
    (karpathy, '{"images": "x"}', 'data.txt: found "x" as images'),
    (karpathy, "7", "data.txt: found 7 as images"),
    (flickr, "", "data.txt: the file is empty"),
    (table, "", "data.txt: the file is empty"),
    (table, "image,caption\n", "data.txt: a header (image, caption) but no rows"),
    (table, "1.jpg,a dog\n2.jpg,b", 'the first line is "1.jpg,a dog", expected a header'),
    (table, "src,alt\n1.jpg,b", 'the first line is "src,alt", expected a header'),
    (table, "image,text,text\n1.jpg,a,b", "data.txt: two columns are called text: rename one"),
    (table, "image,title,caption\n", "title and caption could both be the captions; choose one"),
    (table, "path,filename,caption\n", "path and filename could both be the images; choose one"),
    (table, "image,text,caption\n", "text and caption could both be the captions; choose one with"),
    (table, "image,comments\n", "none of the columns (image, comments) is known to hold the capt"),
    (table, 'image,text\n1.jpg,"a\n' + "2.jpg,b\n" * 200, "data.txt:2: lines 2 to 202: cannot"),
    (table, 'image,text\n1.jpg,"' + "a\n" * 600_000, "data.txt:2: lines 2 to 524"),
    (table, b"\xff\xfe" + "image,text\n".encode("utf-16-le"), "data.txt: is UTF-16"),
])
def test_a_file_that_cannot_be_used_is_refused(tmp_path, module, content, message):
    found = error_of(module, write(tmp_path, content))
    assert message in found and len(found) < 400


@pytest.mark.parametrize("row, message", [
    (7, "found 7, expected an object like"),
    (["a", "b"], 'found ["a", "b"], expected an object'),
    ({"captio": "a", "image": "b"}, 'no "text" among its keys ("captio", "image")'),
    ({"text": "a"}, 'no "image" among its keys ("text")'),
    ({}, 'no "text" among its keys (none)'),
    ({"text": [], "image": "b"}, '"text" is an empty list'),
    ({"image": "b", "reason": "x" * 10**6}, 'no "text" among its keys ("image", "reason")'),
    ({"k" * 10**6: 1}, 'no "text" among its keys ("kkkkk'),
    ("x" * 10**6, 'found "xxxx'),
])
def test_a_bad_object_is_named_by_line(tmp_path, row, message):
    good = {"text": "a", "image": "1.jpg"}
    lines = list(map(json.dumps, [good, row, good]))
    for module, content in (
        (json_list, "[" + ",\n".join(lines) + "]"), (json_lines, "\n".join(lines))
    ):
        first, problem, last = read(module, write(tmp_path, content))
        assert (first.where, problem.where, last.where) == (1, 2, 3)
        assert isinstance(problem, Problem) and problem.reason.startswith(message)
        assert len(problem.reason) < 300


@pytest.mark.parametrize("module, content, where, message", [
    (json_lines, '{"text": "a", "image": "1.jpg"}\n{"text": "b", "im', 2, "the last line is cut"),
    (json_lines, '{"text": "a" "image": "1.jpg"}\n', 1, "not JSON (column 14): Expecting ','"),
    (json_lines, '{"text": "a", "image": "1.jpg"},\n', 1, "not JSON (column 32): Extra data"),
    (json_lines, "\n" + "[" * 100_000 + "\n", 2, "JSON that cannot be read"),
    (json_lines, "1" * 5000 + "\n", 1, "JSON that cannot be read"),
    (json_lines, "\x00\n", 1, "not JSON"),
    (flickr, "1.jpg#0\ta\n1.jpg#1", 2, 'found "1.jpg#1", expected name.jpg#0, a tab'),
    (flickr, "1.jpg#x\ta\n", 1, 'found "1.jpg#x\\ta\\n", expected'),
    (flickr, "1.jpg\ta\n", 1, "found"),
    (table, "image,text\n1.jpg,a\n2.jpg", 3, "expected 2 cells (image, text), found 1"),
    (table, "text,image\na dog, a,1.jpg\n", 2, "expected 2 cells (text, image), found 3: quote"),
    (table, 'image,text\n1.jpg,"a dog\n', 2, "cannot be split into cells (unexpected end of data)"),
    (table, 'image,text\n1.jpg,"so" it is\n2.jpg,b\n', 2, "cannot be split into cells (',' exp"),
    (table, 'image,text\n1.jpg,"a\n2.jpg,"b"\n3.jpg,c\n', 2, "lines 2 to 3: cannot be split"),
    (table, 'image,text\n1.jpg,"a\n2.jpg,",b\n3.jpg,c\n', 2, "lines 2 to 3: expected 2 cells"),
    (table, f"image,text\n1.jpg,{'a' * 1_100_000}\n2.jpg,b\n", 2, "cannot be split into cells (fi"),
    (karpathy, '{"images": [{"filename": "1.jpg"}]}', 'item 0 of "images"', 'no "sentences" among'),
    (karpathy, '{"images": [{"sentences": ["a"]}]}', 'item 0 of "images"', 'no "filename" among'),
    (karpathy, '{"images": [3]}', 'item 0 of "images"', "found 3"),
    (karpathy, '{"images": [{"filename": "1", "sentences": []}]}', 'item 0 of "images"', "\"sente"),
])
def test_a_record_that_cannot_be_read_is_a_problem(tmp_path, module, content, where, message):
    found = read(module, write(tmp_path, content))
    problems = [item for item in found if isinstance(item, Problem)]
    assert [problem.where for problem in problems] == [where]
    assert problems[0].reason.startswith(message) and len(problems[0].reason) < 400


def test_unusable_images_and_annotations_of_coco_are_named_by_position(tmp_path):
    path = write(tmp_path, json.dumps({
        "images": [
            {"id": 7, "file_name": "a.jpg"}, {"id": 8}, {"id": 7, "file_name": "b.jpg"}, 3,
            {"id": [], "file_name": "d.jpg"}, {"id": 1.5, "file_name": "e.jpg"},
        ],
        "annotations": [
            {"image_id": 7, "caption": "a dog"}, {"image_id": 5, "caption": "a"}, {"image_id": 7},
            {"image_id": {}, "caption": "a"}, None, {"image_id": "7", "caption": "a"},
        ],
    }))
    assert read(coco, path) == [
        Problem('item 1 of "images"', "lacks 'id' or 'file_name'"),
        Problem('item 2 of "images"', "has the id 7 of another image"),
        Problem('item 3 of "images"', "lacks 'id' or 'file_name'"),
        Problem('item 4 of "images"', "has the id [], expected a number or a string"),
        Problem('item 5 of "images"', "has the id 1.5, expected a number or a string"),
        Problem('item 1 of "annotations"', 'has the image_id 5, which is not among the "images"'),
        Problem('item 2 of "annotations"', "lacks 'image_id' or 'caption'"),
        Problem('item 3 of "annotations"', 'has the image_id {}, which is not among the "images"'),
        Problem('item 4 of "annotations"', "lacks 'image_id' or 'caption'"),
        Problem('item 5 of "annotations"', 'has the image_id "7", which is not among the "images"'),
        Item('item 0 of "images"', "a.jpg", ["a dog"], id=7),
    ]


LONG = "x" * 1_000_000


@pytest.mark.parametrize("image, caption", [
    (7, "a"), ("1.jpg", 7), ("1.jpg", None), (None, "a"), ("1.jpg", {"a": "b"}), ("1.jpg", " \t"),
    (" ", "a"), ("1.jpg", "half \ud83d of a pair"), ("https://a.b/1.jpg", "a"), ("1.jpg", LONG),
    ("1.jpg", ["a", ["b"]]),
])
def test_wrong_values_are_left_to_the_checks_that_formats_share(tmp_path, image, caption):
    good = {"image": "1.jpg", "text": "a"}
    rows = [good, {"image": image, "text": caption}, good]
    lines = list(map(json.dumps, rows))
    documents = {
        json_list: f"[{','.join(lines)}]",
        json_lines: "\n".join(lines),
        coco: json.dumps({
            "images": [{"id": i, "file_name": row["image"]} for i, row in enumerate(rows)],
            "annotations": [{"image_id": i, "caption": row["text"]} for i, row in enumerate(rows)],
        }),
        karpathy: json.dumps({
            "images": [{"filename": row["image"], "sentences": [row["text"]]} for row in rows],
        }),
    }
    for module, content in documents.items():
        found = read(module, write(tmp_path, content))
        assert [is_refused(item) for item in found] == [False, True, False]
        assert all(isinstance(item, Item) for item in found)


def test_a_line_that_is_not_utf_8_spoils_only_itself(tmp_path):
    for module, header, row in (
        (json_lines, b"", b'{"image": "1.jpg", "text": "caf%s"}'),
        (flickr, b"", b"1.jpg#0\tcaf%s"),
        (table, b"image,text\n", b"1.jpg,caf%s"),
    ):
        lines = [row % letter for letter in ("é".encode(), b"\xe9", "é".encode())]
        found = read(module, write(tmp_path, header + b"\n".join(lines)))
        assert [is_refused(item) for item in found] == [False, True, False]


def test_captions_of_any_length_and_with_nul_bytes_pass_through(tmp_path):
    for caption in (LONG, "a\x00b"):
        found = [
            *read(table, write(tmp_path, f"image,text\n1.jpg,{caption}\n")),
            *read(table, write(tmp_path, f'image\ttext\n1.jpg\t"{caption}"\n')),
            *read(flickr, write(tmp_path, f"1.jpg#0\t{caption}\n")),
            *read(json_lines, write(tmp_path, json.dumps({"image": "1.jpg", "text": caption}))),
        ]
        assert [item.captions[0] for item in found] == [caption] * 4


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    below = write(tmp_path, "[]") + "/below.json"
    for module in FORMATS.values():
        if module is not url_list:
            assert "no such file" in error_of(module, str(tmp_path / "missing.json"))
            assert "is a folder" in error_of(module, str(tmp_path))
            assert "is not a regular file" in error_of(module, str(tmp_path / "pipe"))
            assert "cannot be read" in error_of(module, below)
            assert "cannot be read" in error_of(module, str(tmp_path / "nul\x00"))


def test_line_formats_are_read_one_line_at_a_time(tmp_path):
    """Three files of 8 MB take less than 4 MB."""
    caption = "a picture of some thing in some place " * 4
    num_rows = 50_000
    contents = {
        "json_lines": json.dumps({"image": "1.jpg", "text": caption}) + "\n",
        "flickr": f"1.jpg#0\t{caption}\n",
        "table": f"1.jpg,{caption}\n",
    }
    paths = [
        write(tmp_path, ("image,text\n" if name == "table" else "") + row * num_rows, name)
        for name, row in contents.items()
    ]
    program = (
        "import sys\n"
        "from lora_engine.data.formats import flickr, json_lines, table\n"
        "from lora_engine.data.rows import Item, SourceOptions\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "used = lambda: int(status().split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = used()\n"
        "num_items = sum(\n"
        "    isinstance(item, Item)\n"
        "    for module, path in zip((json_lines, flickr, table), sys.argv[1:])\n"
        "    for item in module.read(path, SourceOptions())\n"
        ")\n"
        "print(num_items, used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True
    )
    num_items, megabytes = map(int, done.stdout.split())
    assert num_items == 3 * num_rows and megabytes < 4
