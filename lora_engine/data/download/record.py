"""The state of a download: its settings, its list, and which links belong to which shard.

It is in DIR/.download: record.json, and one file of links per shard. The folder is hidden, and no
.json file is beside the shards: img2dataset takes each of those for the statistics of a shard.
"""

import hashlib
import json
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lora_engine.data.download import img2dataset
from lora_engine.data.download.link_lists import Link, LinkFields, open_links
from lora_engine.files import replaced_file

STATE_FOLDER = ".download"
MAX_PROBLEMS_KEPT = 8


@dataclass(frozen=True)
class Record:
    """What record.json keeps: the settings, the list, and the passes over its links."""

    source: str
    sha256: str  # of the list
    fields: LinkFields
    output: img2dataset.Output
    has_captions: bool = True
    num_links: int = 0
    num_repeated: int = 0  # links with the same URL as an earlier one
    num_problems: int = 0  # rows of the list that cannot be used
    problems: tuple[str, ...] = ()  # the first ones
    # The shards of the first pass end before passes[0], those of the second before passes[1], ...
    passes: tuple[int, ...] = ()

    @property
    def last_pass(self) -> range:
        """The shards of the last pass, whose links are those that failed in the one before."""
        return range(self.passes[-2] if len(self.passes) > 1 else 0, self.passes[-1])


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Create a folder for a download, and let no other process download into it.

    Raises ValueError if it has other files, and OSError if it cannot be written.
    """
    state = out / STATE_FOLDER
    if out.is_dir() and not state.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files; give a new or an empty folder")
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = open(state / "lock", "w")
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is downloading into {out}; wait for it, or stop it"
            ) from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass
        yield


def open_record(
    out: Path, source: str, *, fields: LinkFields, output: img2dataset.Output
) -> Record:
    """The record of a download that was begun before, or of a new one, whose links are written.

    Raises ValueError if it was begun with another list or other settings, and for a list without
    links.
    """
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    asked = Record(source, digest, fields, output)
    path = out / STATE_FOLDER / "record.json"
    if not path.exists():
        return _with_all_links(out, asked)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**values | {
            "fields": LinkFields(**values["fields"]),
            "output": img2dataset.Output(**values["output"]),
            "problems": tuple(values["problems"]),
            "passes": tuple(values["passes"]),
        })
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); give a new folder with --out") from None
    _check_same(out, record, asked)
    for links in (out / STATE_FOLDER / "links").iterdir():
        if int(links.stem) >= record.passes[-1]:
            links.unlink()  # of a pass that a stop has kept from beginning
    return record


def _check_same(out: Path, record: Record, asked: Record) -> None:
    if record.sha256 != asked.sha256:
        raise ValueError(
            f"--out {out} holds the images of another list ({record.source}), or the list has "
            f"changed since; give a new folder"
        )
    before, now = (asdict(each.output) | asdict(each.fields) for each in (record, asked))
    for name, value in before.items():
        if now[name] != value:
            advice = f"give --{name} {value}" if value is not None else f"leave out --{name}"
            raise ValueError(
                f"--out {out} was begun with {name} {value}, now it is {now[name]}; {advice} to "
                f"continue, or give a new folder"
            )


def _save(out: Path, record: Record) -> None:
    with replaced_file(out / STATE_FOLDER / "record.json") as new:
        new.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


# --- links of shards ------------------------------------------------------------------------


def links_file(out: Path, shard: int) -> Path:
    """The JSON Lines of a shard's links."""
    return out / STATE_FOLDER / "links" / f"{shard:08}.jsonl"


def _with_all_links(out: Path, record: Record) -> Record:
    """Write the links of the first pass. Raises ValueError if the list has none."""
    shutil.rmtree(out / STATE_FOLDER / "links", ignore_errors=True)
    (out / STATE_FOLDER / "links").mkdir()
    urls = array("q")  # their hashes
    problems: list[str] = []
    num_problems, has_captions = 0, False

    def usable_links() -> Iterator[Link]:
        nonlocal num_problems, has_captions
        rows = open_links(record.source, record.fields).rows
        for row in tqdm(rows, desc="list", unit="row", disable=not sys.stderr.isatty()):
            if isinstance(row, Link):
                has_captions = row.caption is not None
                urls.append(hash(row.url))
                yield row
                continue
            num_problems += 1
            if num_problems <= MAX_PROBLEMS_KEPT:
                problems.append(f"{record.source}:{row.where}: {row.reason}")

    end = _write_links(out, usable_links(), first=0, shard_size=record.output.shard_size)
    if not urls:
        shown = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{record.source}: no row has a link to download{shown}")
    record = replace(
        record, has_captions=has_captions, num_links=len(urls), num_problems=num_problems,
        num_repeated=len(urls) - len(np.unique(np.asarray(urls))), problems=tuple(problems),
        passes=(end,),
    )
    _save(out, record)
    return record


def with_failed_links(out: Path, record: Record) -> Record:
    """Add a pass with the links that have failed in the last one, if there are any.

    They are found by what is missing in the shards, because reading img2dataset's status of each
    link would need pyarrow.
    """
    def failed_links() -> Iterator[Link]:
        for shard in record.last_pass:
            downloaded = img2dataset.downloaded_rows(out, shard, record.output)
            with open(links_file(out, shard)) as file:
                for row, line in enumerate(file):
                    if row not in downloaded:
                        values = json.loads(line)
                        yield Link(values["url"], values.get("caption"))

    first = record.passes[-1]
    end = _write_links(out, failed_links(), first=first, shard_size=record.output.shard_size)
    if end > first:
        record = replace(record, passes=(*record.passes, end))
        _save(out, record)
    return record


def _write_links(out: Path, links: Iterable[Link], *, first: int, shard_size: int) -> int:
    """Write a file of links for each shard from `first` on; returns the number of the next one.

    JSON Lines, because img2dataset's reader of CSV turns captions into numbers and dates.
    """
    lines = (
        json.dumps({"url": link.url} if link.caption is None else link._asdict()) + "\n"
        for link in links
    )
    shard = first
    while text := "".join(islice(lines, shard_size)):
        links_file(out, shard).write_text(text, encoding="utf-8")
        shard += 1
    return shard


# --- results --------------------------------------------------------------------------------


def pending_shards(out: Path, record: Record) -> set[int]:
    """The shards of the last pass that are not whole."""
    return set(record.last_pass) - all_stats(out, record).keys()


def all_stats(out: Path, record: Record) -> dict[int, dict[str, Any]]:
    """The statistics of all whole shards, of all passes."""
    shards = range(record.passes[-1])
    found = ((shard, img2dataset.read_stats(out, shard, record.output)) for shard in shards)
    return {shard: stats for shard, stats in found if stats is not None}


def num_links_of(out: Path, shards: Iterable[int]) -> int:
    return sum(links_file(out, shard).read_bytes().count(b"\n") for shard in shards)
