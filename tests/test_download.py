"""download: lists of links in many formats; stops, resumed runs and second tries; clear errors.

A stand-in for img2dataset writes what the real one writes, without a network.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from lora_engine import __main__ as verbs
from lora_engine import cli
from lora_engine.data.download import img2dataset
from lora_engine.data.download import record as downloads
from lora_engine.data.download.link_lists import Link, LinkFields, open_links
from lora_engine.data.rows import AnnotationError, Problem

ROOT = Path(__file__).parents[1]
STOPPED = cli.STOPPED

# Its links decide what happens: http://good/1, http://dead/2, http://html/3, http://later/4 (works
# if there is a file "later" in the folder). A file named "break" stops it within a shard: it kills
# itself, hangs, runs out of disk or ends without an error.
STAND_IN = '''
import io, json, math, os, pathlib, sys, tarfile, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if arg[:2] == "--" and "=" in arg)
out, links = pathlib.Path(flags["output_folder"]), pathlib.Path(flags["url_list"])
here = out.parent
(here / "flags.json").write_text(json.dumps(flags))
size = int(flags["number_sample_per_shard"])
digits = math.ceil(math.log10(size))
done = {int(path.name.split("_")[0]) for path in out.glob("*.json")}
(out / "_tmp").mkdir(exist_ok=True)
breaks = (here / "break").read_text() if (here / "break").exists() else ""
for shard, file in enumerate(sorted(links.glob("*.jsonl"))):
    rows = [json.loads(line) for line in open(file)]
    assert 0 < len(rows) <= size
    if shard in done:
        continue
    counts = dict(count=len(rows), successes=0, failed_to_download=0, failed_to_resize=0)
    status = {}
    tar = tarfile.open(out / f"{shard:05}.tar", "w")
    (out / f"{shard:05}.parquet").write_bytes(b"PAR1 PAR1")
    for row, link in enumerate(rows):
        key = f"{shard * 10 ** digits + row:0{5 + digits}}"
        kind = link["url"].split("/")[2]
        name = {"good": "successes", "html": "failed_to_resize"}.get(kind, "failed_to_download")
        if kind == "later" and (here / "later").exists():
            name = "successes"
        counts[name] += 1
        error = {
            "successes": "success", "failed_to_resize": "Image decoding error",
            "failed_to_download": "<urlopen error timed out>" if kind == "later" else
            f"HTTP Error 404: no '{link['url']}'",
        }[name]
        status[error] = status.get(error, 0) + 1
        if name == "successes":
            for suffix, data in ("jpg", b"image"), ("txt", link.get("caption", "").encode()):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if breaks and shard == 1:
        tar.fileobj.flush()
        if breaks == "hang":
            (here / "hangs").write_text(str(os.getpid()))
            time.sleep(100)
        if breaks == "disk":
            print("OSError: [Errno 28] No space left on device")
        print("the last words")
        sys.exit(0 if breaks == "quietly" else 7)
    tar.close()
    (out / f"{shard:05}_stats.json").write_text(json.dumps(counts | {"status_dict": status}))
os.rmdir(out / "_tmp")
'''


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts stand-ins for programs on an otherwise empty PATH -> their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))

    def put(*names, script=STAND_IN):
        for name in names:
            (folder / name).write_text(f"#!{REAL_PYTHON} -S\n{script}")
            (folder / name).chmod(0o755)
        return folder

    (folder / "python").symlink_to(REAL_PYTHON)
    return put


REAL_PYTHON = sys.executable


@pytest.fixture
def downloaded(command, on_path, monkeypatch):
    """Runs download with the stand-in, on a list of links such as "good" and "dead"."""
    from lora_engine.commands import download as download_module

    on_path("uvx")  # before one that may be installed beside this Python
    monkeypatch.setattr(download_module, "_POLL_S", 0.05)
    monkeypatch.setattr(download_module, "_MIN_FREE_BYTES", 0)

    def run(*flags, kinds=None, source="list.tsv"):
        if kinds is not None:
            (command.work / source).write_text("".join(
                f'caption "{row}"\thttp://{kind}/{row}.jpg\n' for row, kind in enumerate(kinds)
            ))
        return command(verbs.run_verb, "download", source, "--out", "images", "--shard_size", "10",
                       *flags)

    run.work = command.work
    run.out = command.work / "images"
    return run


KINDS = [*["good"] * 12, *["dead"] * 4, *["later"] * 5, *["html"] * 2, *["good"] * 3]


def captions(folder):
    """The captions in the tars, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    assert member.name not in found
                    found[member.name] = tar.extractfile(member).read().decode()
    return found


def table(out):
    """{name: count} of the table that is printed at the end."""
    lines = [line.rsplit(None, 2) for line in out.splitlines() if line.endswith("%")]
    return {" ".join(name): int(count) for *name, count, _ in lines}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- downloading ----------------------------------------------------------------------------


def test_a_list_becomes_tars_and_a_table(downloaded):
    status, out, err = downloaded(kinds=KINDS)
    assert status == 0 and err == ""
    assert table(out) == {"links": 26, "images": 15, "dead links": 9, "not an image": 2}
    assert "5   19.2%  timed out" in out
    assert "4   15.4%  HTTP Error 404: no '...'" in out
    assert "5 errors may be temporary" in out and "--retry_failed" in out
    assert out.endswith(" validate --data images\n")
    assert out.index("hf download pixparse/cc3m-wds --repo-type dataset") < out.index("links  ")
    assert names_in(downloaded.out) == [".download", *(
        f"0000{shard}{suffix}" for shard in range(3)
        for suffix in (".parquet", ".tar", "_stats.json")
    )]
    assert list(captions(downloaded.out).values()) == [
        f'caption "{row}"' for row, kind in enumerate(KINDS) if kind == "good"
    ]


def test_the_flags_reach_img2dataset(downloaded):
    downloaded("--image_size", "256", "--quality", "90", "--timeout_s", "3", "--retries", "2",
               "--num_workers", "5", "--num_threads", "6", kinds=["good"])
    flags = json.loads((downloaded.work / "flags.json").read_text())
    expected = {
        "image_size": "256", "encode_quality": "90", "timeout": "3", "retries": "2",
        "processes_count": "5", "thread_count": "6", "number_sample_per_shard": "10",
        "output_format": "webdataset", "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": "True", "enable_wandb": "False", "caption_col": "caption",
        "incremental_mode": "incremental",
    }
    assert flags | expected == flags
    assert "disallowed_header_directives" not in flags  # noai and noindex are respected


def test_a_finished_download_is_only_reported_again(downloaded):
    status, first, err = downloaded(kinds=KINDS)
    (downloaded.work / "flags.json").unlink()
    status, again, err = downloaded()
    assert status == 0 and table(again) == table(first)
    assert not (downloaded.work / "flags.json").exists()


def test_failed_links_are_tried_again_in_further_shards(downloaded):
    downloaded(kinds=KINDS)
    (downloaded.work / "later").touch()
    status, out, err = downloaded("--retry_failed")
    assert status == 0
    assert table(out) == {"links": 26, "images": 20, "dead links": 4, "not an image": 2}
    assert "may be temporary" not in out and "after 2 passes" in out
    assert sorted(captions(downloaded.out).values()) == sorted(
        f'caption "{row}"' for row, kind in enumerate(KINDS) if kind in ("good", "later")
    )
    assert (downloaded.out / "00004.tar").exists()
    status, out, err = downloaded("--retry_failed")  # and once more, without any result
    assert table(out)["images"] == 20 and table(out)["dead links"] == 4
    assert "after 3 passes" in out


@pytest.mark.parametrize("format", ["tars", "files"])
def test_downloaded_rows_are_found_by_the_names_of_images(tmp_path, format):
    names = [f"{30_000 + row:09}.{suffix}" for row in (0, 7, 9_999) for suffix in ("jpg", "txt")]
    if format == "files":
        (tmp_path / "00003").mkdir()
        for name in names:
            (tmp_path / "00003" / name).touch()
    else:
        with tarfile.open(tmp_path / "00003.tar", "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
    output = img2dataset.Output(format, image_size=512, quality=95, shard_size=10_000)
    assert img2dataset.downloaded_rows(tmp_path, 3, output) == {0, 7, 9_999}


def test_nothing_is_tried_again_where_nothing_failed(downloaded):
    status, out, err = downloaded("--retry_failed", kinds=["good"] * 12)
    assert status == 0 and names_in(downloaded.out)[-1] == "00001_stats.json"


def test_a_second_try_that_was_stopped_is_continued_and_not_followed_by_a_third(downloaded):
    downloaded(kinds=["dead"] * 9 + ["good"])
    (downloaded.work / "break").write_text("loudly")  # in shard 1, the first of the second try
    assert downloaded("--retry_failed")[0] == STOPPED
    (downloaded.work / "break").unlink()
    status, out, err = downloaded("--retry_failed")
    assert status == 0 and "after 2 passes" in out


# --- stops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loudly", "quietly"])
def test_an_unfinished_download_is_an_error_and_is_continued(downloaded, how):
    (downloaded.work / "break").write_text(how)
    status, out, err = downloaded(kinds=KINDS)
    assert status == STOPPED
    assert f"exit status {7 if how == 'loudly' else 0}) with 2 of 3 shards unfinished" in err
    assert "  the last words" in err
    assert names_in(downloaded.out) == [
        ".download", "00000.parquet", "00000.tar", "00000_stats.json"
    ]
    (downloaded.work / "break").unlink()
    status, out, err = downloaded()
    assert status == 0 and table(out)["images"] == 15 and len(captions(downloaded.out)) == 15


def test_a_full_disk_stops_the_download_and_newly_finished_shards_are_not_trusted(
    downloaded, monkeypatch
):
    from lora_engine.commands import download as download_module

    monkeypatch.setattr(download_module, "_POLL_S", 30)  # looks once, when img2dataset has ended
    (downloaded.work / "break").write_text("disk")
    status, out, err = downloaded(kinds=KINDS)
    assert status == STOPPED and "is full" in err and "rerun the command" in err
    assert names_in(downloaded.out) == [".download"]
    (downloaded.work / "break").unlink()
    assert table(downloaded()[1])["images"] == 15


def test_a_disk_that_is_nearly_full_is_not_filled(downloaded, monkeypatch):
    from lora_engine.commands import download as download_module

    monkeypatch.setattr(download_module, "_MIN_FREE_BYTES", 1 << 60)
    status, out, err = downloaded(kinds=KINDS)
    assert status == cli.USAGE_ERROR and "are needed: free space there" in err
    assert names_in(downloaded.out) == [".download"]


@pytest.mark.parametrize("damage", ["stats", "tar", "no tar"])
def test_a_shard_that_is_not_whole_is_downloaded_again(downloaded, damage):
    downloaded(kinds=KINDS)
    stats, tar = downloaded.out / "00001_stats.json", downloaded.out / "00001.tar"
    if damage == "stats":
        stats.write_text(stats.read_text()[:20])
    elif damage == "tar":
        os.truncate(tar, 1000)
    else:
        tar.unlink()
    status, out, err = downloaded()
    assert status == 0 and table(out)["images"] == 15 and len(captions(downloaded.out)) == 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_img2dataset_too_and_the_rest_is_downloaded_later(downloaded, number):
    (downloaded.work / "break").write_text("hang")
    (downloaded.work / "list.tsv").write_text("".join(
        f'caption "{row}"\thttp://{kind}/{row}.jpg\n' for row, kind in enumerate(KINDS)
    ))
    process = subprocess.Popen(
        [REAL_PYTHON, "-m", "lora_engine", "download", "list.tsv", "--out", "images",
         "--shard_size", "10"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )
    child = int(_content_of(downloaded.work / "hangs"))
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    _wait_for_the_end_of(child)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert "00001.tar" in names_in(downloaded.out)
    else:
        assert process.returncode == 128 + number
        assert "rerun the same command to continue" in err and "Traceback" not in err
        assert "00001.tar" not in names_in(downloaded.out)
    (downloaded.work / "break").unlink()
    status, out, err = downloaded()
    assert status == 0 and table(out)["images"] == 15 and len(captions(downloaded.out)) == 15
    assert "_tmp" not in names_in(downloaded.out)


def _content_of(path):
    """The content of a file that another process is about to write."""
    end = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end
        os.sched_yield()
    return path.read_text()


def _wait_for_the_end_of(process):
    end = time.monotonic() + 30
    while _is_running(process):
        assert time.monotonic() < end
        os.sched_yield()


def _is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- what is refused ------------------------------------------------------------------------


def test_a_network_that_is_down_is_named_and_leaves_all_links_to_a_rerun(downloaded):
    status, out, err = downloaded(kinds=["later"] * 14 + ["dead"])
    assert status == STOPPED
    assert "not one of 15 links (of 15) could be downloaded" in err
    assert "timed out. Check the network" in err
    assert names_in(downloaded.out) == [".download"]
    (downloaded.work / "later").touch()
    status, out, err = downloaded()
    assert status == 0 and table(out)["images"] == 14


def test_another_list_or_other_settings_are_refused(downloaded):
    downloaded(kinds=KINDS)
    before = names_in(downloaded.out)
    for flags, words in [
        (("--image_size", "256"), "was begun with image_size 512, now it is 256; give "
                                  "--image_size 512 to continue"),
        (("--format", "files"), "give --format tars"),
        (("--url_field", "link"), "leave out --url_field"),
    ]:
        status, out, err = downloaded(*flags)
        assert status == cli.USAGE_ERROR and words in err
    status, out, err = downloaded("--timeout_s", "20", "--num_threads", "2")
    assert status == 0
    status, out, err = downloaded(kinds=[*KINDS, "good"])
    assert status == cli.USAGE_ERROR and "images of another list (list.tsv), or the list" in err
    assert names_in(downloaded.out) == before


def test_a_folder_with_other_files_is_refused(downloaded):
    downloaded.out.mkdir()
    (downloaded.out / "mine.jpg").touch()
    status, out, err = downloaded(kinds=KINDS)
    assert status == cli.USAGE_ERROR and "holds other files" in err
    assert names_in(downloaded.out) == ["mine.jpg"]


def test_a_folder_that_cannot_be_written_is_refused(downloaded):
    downloaded.out.write_text("a file")
    status, out, err = downloaded(kinds=KINDS)
    assert status == cli.USAGE_ERROR and "--out images cannot be written" in err


def test_a_second_process_in_the_same_folder_is_refused(downloaded):
    with downloads.locked_folder(downloaded.out):
        status, out, err = downloaded(kinds=KINDS)
    assert status == cli.USAGE_ERROR and "another process is downloading" in err


def test_a_folder_with_a_pattern_in_its_name_is_refused(refused, command):
    refused(verbs.run_verb, "download", "list.tsv", "--out", "images[1]",
            words=["img2dataset cannot write to a folder with *"])


def test_a_machine_without_uv_is_told_what_to_install(refused, command, on_path):
    (command.work / "list.txt").write_text("http://good/1\n")
    refused(verbs.run_verb, "download", "list.txt", "--out", "images",
            words=["pip install uv"], allowed=["list.txt"])


@pytest.mark.parametrize("present, words", [
    (("uvx", "uv", "pipx", "img2dataset"), "uvx --python PYTHON --from PACKAGE img2dataset"),
    (("uv", "pipx", "img2dataset"), "uv tool run --python PYTHON --from PACKAGE img2dataset"),
    (("pipx", "img2dataset"), "pipx run --python PYTHON --spec PACKAGE img2dataset"),
    (("img2dataset",), "img2dataset"),
])
def test_img2dataset_runs_in_an_environment_of_its_own_if_possible(on_path, present, words):
    folder = on_path(*present)
    python = sys.executable if sys.version_info < (3, 13) else "3.12"
    first, *others = words.replace("PYTHON", python).replace("PACKAGE", img2dataset.PACKAGE).split()
    assert img2dataset.find_command() == [str(folder / first), *others]


def test_newer_pythons_are_not_used_for_img2dataset(on_path, monkeypatch):
    on_path("uvx")
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert img2dataset.find_command()[1:3] == ["--python", "3.12"]


# --- lists ----------------------------------------------------------------------------------

LINKS = [Link("http://good/1", 'a "dog"'), Link("https://good/2", "a cat, asleep")]


def rows_of(path, **fields):
    return list(open_links(path, LinkFields(**fields)).rows)


@pytest.mark.parametrize("name, text", [
    ("cc3m", 'a "dog"\thttp://good/1\na cat, asleep\thttps://good/2\n'),
    ("cc12m", 'http://good/1\ta "dog"\nhttps://good/2\ta cat, asleep\n'),
    ("tsv", 'caption\turl\na "dog"\thttp://good/1\na cat, asleep\thttps://good/2\n'),
    ("quoted tsv", 'url\ttext\nhttp://good/1\t"a ""dog"""\nhttps://good/2\ta cat, asleep\n'),
    ("csv", 'id,URL,TEXT\n1,http://good/1,"a ""dog"""\n2,https://good/2,"a cat, asleep"\n'),
    ("semicolons", 'url;alt\nhttp://good/1;"a ""dog"""\nhttps://good/2;a cat, asleep\n'),
    ("byte order mark", '\ufeffurl\tcaption\r\nhttp://good/1\ta "dog"\r\n\r\n'
                        'https://good/2\ta cat, asleep\r\n'),
    ("json lines", '{"url": "http://good/1", "caption": "a \\"dog\\"", "id": 1}\n'
                   '{"caption": "a cat, asleep", "url": "https://good/2"}\n'),
])
def test_links_and_captions_are_read(tmp_path, name, text):
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert rows_of(tmp_path / "list") == LINKS


def test_plain_lists_have_no_captions(downloaded):
    (downloaded.work / "list.txt").write_text("\nhttp://good/1\nhttp://good/2  \n")
    assert rows_of(downloaded.work / "list.txt") == [
        Link("http://good/1", None), Link("http://good/2", None)
    ]
    status, out, err = downloaded(source="list.txt")
    assert status == 0 and "can be captioned, but not trained on" in out
    assert "cc3m-wds" not in out
    assert "caption_col" not in json.loads((downloaded.work / "flags.json").read_text())


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"url": [link.url for link in LINKS], "text": [link.caption for link in LINKS]}
    parquet.write_table(pyarrow.table(columns | {"id": [1, 2]}), tmp_path / "list")
    assert rows_of(tmp_path / "list") == LINKS
    (tmp_path / "list").write_bytes((tmp_path / "list").read_bytes()[:-20])
    with pytest.raises(AnnotationError, match="expected a Parquet file"):
        rows_of(tmp_path / "list")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "list").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(AnnotationError, match="pip install .*parquet"):
        rows_of(tmp_path / "list")


def test_rows_that_cannot_be_used_are_counted_and_named(downloaded):
    (downloaded.work / "list.tsv").write_bytes(
        b"a\thttp://good/1\nb\tfile:///etc/passwd\n \thttp://good/3\n\xff\thttp://good/4\n"
        b"no tab\nf\thttp://good/1\n"
    )
    status, out, err = downloaded()
    assert status == 0 and table(out)["links"] == 2
    assert "duplicates              1   50.0%" in out
    assert "4 rows of list.tsv cannot be used:" in out
    for words in ('list.tsv:2: found "file:///etc/passwd", expected a link',
                  "list.tsv:3: the caption is empty", "list.tsv:4: the caption is not valid",
                  'list.tsv:5: found "no tab"'):
        assert words in out
    assert list(captions(downloaded.out).values()) == ["a", "f"]


def test_bad_rows_of_tables_and_json_lines_are_problems(tmp_path):
    path = tmp_path / "list"
    path.write_text("url,caption\nhttp://good/1\nhttp://good/2,b\n")
    assert isinstance(rows_of(path)[0], Problem) and rows_of(path)[1].url == "http://good/2"
    path.write_text('{"url": "http://good/1", "caption": 5}\n{"url": \n7\n')
    assert all(isinstance(row, Problem) for row in rows_of(path)) and len(rows_of(path)) == 3


@pytest.mark.parametrize("content, words", [
    (b"", "the file is empty"),
    (b" \n\n", "the file is empty"),
    (b"<!DOCTYPE html>\n<html>sign in</html>", "is a web page"),
    (b"\x1f\x8b\x08\0", "gunzip"),
    (b"\x89PNG\0\0", "neither UTF-8 text nor Parquet"),
    (b'[{"url": "http://good/1"}]', "one object per line"),
    (b"image,text\na.jpg,b\n", "no column of links: found \"image\", \"text\""),
    (b"url,text,caption\nhttp://good/1,a,b\n", "--caption_field"),
    (b"a\tfile:///a.jpg\n", "no column of links"),
])
def test_a_file_that_is_no_list_of_links_is_refused(refused, command, content, words):
    (command.work / "list").write_bytes(content)
    refused(verbs.run_verb, "download", "list", "--out", "images", words=["list: ", words],
            allowed=["list"])


def test_a_list_without_a_usable_row_is_refused(downloaded):
    (downloaded.work / "list.tsv").write_text("caption\turl\na\tno link\n")
    status, out, err = downloaded()
    assert status == cli.USAGE_ERROR
    assert "no row has a link to download" in err and 'found "no link"' in err


def test_a_missing_list_and_a_folder_are_refused(refused, tmp_path):
    refused(verbs.run_verb, "download", "list", "--out", "images", words=["list"])
    refused(verbs.run_verb, "download", tmp_path, "--out", "images", words=["is a folder"])


def test_columns_can_be_named(tmp_path):
    (tmp_path / "list").write_text("a,b,c\nx,http://good/1,y\n")
    rows = rows_of(tmp_path / "list", url_field="b", caption_field="c")
    assert rows == [Link("http://good/1", "y")]
    with pytest.raises(AnnotationError, match="--url_field is d, but the columns are a, b, c"):
        rows_of(tmp_path / "list", url_field="d")


def test_captions_keep_their_quotes_and_line_breaks_on_the_way(downloaded):
    caption = 'line one\nline "two", 2015-01-02'
    row = json.dumps({"url": "http://good/1", "caption": caption})
    (downloaded.work / "list.jsonl").write_text(row + "\n")
    downloaded(source="list.jsonl")
    assert list(captions(downloaded.out).values()) == [caption]


