"""python -m lora_engine download: the images of a list of links, such as CC3M's, with img2dataset.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from lora_engine import cli
from lora_engine.cli import quoted, this_program
from lora_engine.config import Range, check_ranges
from lora_engine.data.download import img2dataset
from lora_engine.data.download.link_lists import CC3M, LinkFields, open_links
from lora_engine.data.download.record import (
    STATE_FOLDER,
    Record,
    all_stats,
    links_file,
    locked_folder,
    num_links_of,
    open_record,
    pending_shards,
    with_failed_links,
)
from lora_engine.devices import num_processors
from lora_engine.files import check_space
from lora_engine.stopping import LoadingStopped
from lora_engine.terminal import printable

MAX_ERRORS_SHOWN = 8
MAX_LOG_LINES = 12
_MIN_FREE_BYTES = 500 * 10**6  # img2dataset skips images that a full disk does not take
_DISK_IS_FULL = re.compile(rb"\[Errno (?:28|122)\]")  # ENOSPC, EDQUOT
_MIN_TRIED = 1_000  # links without a single image, before the network is suspected
_POLL_S = 1.0
_READY_MADE = """\
If this is CC3M: the Hugging Face Hub has 2,905,954 of its pairs as tars, which need no download of
single images:
  hf download pixparse/cc3m-wds --repo-type dataset --local-dir DIR
Continuing with the links of the list."""
# Errors after which another try may help: timeouts, overloaded servers and name servers.
_TEMPORARY = re.compile(
    r"timed out|HTTP Error (?:408|425|429|5\d\d)|reset|Temporary failure|IncompleteRead|"
    r"closed connection", re.IGNORECASE
)


@dataclass(frozen=True)
class DownloadConfig:
    """Flags of `download`."""

    links: Annotated[str, tyro.conf.Positional]
    """List of links: Google's CC3M TSV (caption, tab, URL), CSV or TSV with a header, JSON Lines,
    Parquet, or one URL per line."""
    out: str
    """Folder for the images and captions. Rerun the command to continue a stopped download."""
    format: Literal["tars", "files", "parquet"] = "tars"
    """How to store them: tars (WebDataset), image files with .txt files, or Parquet."""
    image_size: Annotated[int, Range(ge=32, le=65_535)] = 512
    """Longest side in pixels; larger images are scaled down."""
    quality: Annotated[int, Range(ge=1, le=100)] = 95
    """JPEG quality."""
    shard_size: Annotated[int, Range(ge=10, le=100_000)] = 5_000
    """Links per tar, folder or Parquet file; a stopped download repeats unfinished ones."""
    url_field: str | None = None
    """Column of the URLs. Default: url, image_url, link, ..."""
    caption_field: str | None = None
    """Column of the captions. Default: caption, text, alt, ..."""
    timeout_s: Annotated[int, Range(ge=1)] = 10
    """Seconds without an answer before a link counts as dead."""
    retries: Annotated[int, Range(ge=0, le=10)] = 1
    """Further tries of a link, at once."""
    retry_failed: bool = False
    """At the end, try all failed links once more. Rerun with it for yet another try."""
    num_workers: Annotated[int | None, Range(ge=1)] = None
    """Processes. Default: one per processor."""
    num_threads: Annotated[int, Range(ge=1, le=1_024)] = 64
    """Links that each process loads at the same time."""

    def check(self) -> None:
        """Raises ValueError that names the flag of the first value that is not accepted."""
        check_ranges(self)
        if re.search(r"[*?\[\]]|::", os.path.abspath(self.out)):
            raise ValueError(
                f"--out is {self.out}: img2dataset cannot write to a folder with *, ?, [, ] or :: "
                f"in its path"
            )


def download(args: list[str]) -> int:
    """Download the images of a list of links and return the exit status."""
    config = cli.parse(
        DownloadConfig, args, prog="python -m lora_engine download",
        description="Download the images of a list of links, such as CC3M's, with img2dataset.",
    )
    config.check()
    out = Path(config.out)
    fields = LinkFields(config.url_field, config.caption_field)
    output = img2dataset.Output(
        config.format, config.image_size, config.quality, config.shard_size
    )
    kind, rows = open_links(config.links, fields)
    next(rows, None)  # refuses a table without links before anything is created
    command = img2dataset.find_command()
    with locked_folder(out):
        print(printable(f"list        {config.links}: {kind}"))
        if kind == CC3M:
            print(_READY_MADE)
        record = open_record(out, config.links, fields=fields, output=output)
        img2dataset.remove_unfinished(out, record.output)
        # A second try that was stopped is continued, and not followed by a third.
        was_retrying = len(record.passes) > 1 and pending_shards(out, record)
        _finish_pass(config, out, record, command)
        if config.retry_failed and not was_retrying:
            record = with_failed_links(out, record)
            _finish_pass(config, out, record, command)
        print(printable(_summary(out, record)))
    return 0


# --- downloading ----------------------------------------------------------------------------


def _finish_pass(config: DownloadConfig, out: Path, record: Record, command: list[str]) -> None:
    """Download all pending shards of the last pass; a stop removes those that are unfinished."""
    if not pending_shards(out, record):
        return
    check_space(out, needed=_MIN_FREE_BYTES)
    command = command + img2dataset.arguments(
        links_file(out, 0).parent.resolve(), out.resolve(), record.output,
        has_captions=record.has_captions, timeout=config.timeout_s, retries=config.retries,
        processes_count=config.num_workers or num_processors(),
        thread_count=config.num_threads,
    )
    log = out / STATE_FOLDER / "img2dataset.log"
    print(printable(f"log         {log}"))
    try:
        with img2dataset.running(command, log) as process:
            _watch(process, out, record, log)
    except (KeyboardInterrupt, SystemExit):
        print("\nrerun the same command to continue", file=sys.stderr)
        raise
    finally:
        img2dataset.remove_unfinished(out, record.output)


def _watch(process: img2dataset.Process, out: Path, record: Record, log: Path) -> None:
    """Show progress until img2dataset ends.

    Raises LoadingStopped if it does not finish all shards, if the disk is full, or if not a single
    link works.
    """
    finished, pending = all_stats(out, record), pending_shards(out, record)
    num_links = num_links_of(out, record.last_pass)
    num_done = num_links - num_links_of(out, pending)
    with tqdm(
        total=num_links, initial=num_done, unit="link", disable=not sys.stderr.isatty()
    ) as bar:
        is_running = True
        while is_running:
            is_running = not img2dataset.has_ended(process, _POLL_S)
            new = {
                shard: stats for shard in pending
                if (stats := img2dataset.read_stats(out, shard, record.output)) is not None
            }
            _check_disk(out, log, new)
            finished |= new
            pending -= new.keys()
            num_new = sum(stats["count"] for stats in new.values())
            num_done += num_new
            num_images = sum(stats["successes"] for stats in finished.values())
            bar.set_postfix_str(f"{num_images:,} images", refresh=False)
            bar.update(num_new)
            if num_images == 0 and num_done >= min(_MIN_TRIED, num_links):
                img2dataset.remove_shards(out, finished)
                raise LoadingStopped(_nothing_works_message(finished, num_links))
    if pending:
        end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise LoadingStopped(
            f"img2dataset ended (exit status {process.returncode}) with {len(pending):,} of "
            f"{len(record.last_pass):,} shards unfinished; rerun the command to continue. The end "
            f"of {log}:\n" + "\n".join(f"  {line}" for line in end[-MAX_LOG_LINES:])
        )


def _check_disk(out: Path, log: Path, new: Collection[int]) -> None:
    """Raises LoadingStopped if the disk is full; removes `new` shards, which may lack images."""
    if _DISK_IS_FULL.search(log.read_bytes()):
        img2dataset.remove_shards(out, new)
        raise LoadingStopped(
            f"the disk of {out.resolve()} is full, or a quota is reached; free space there and "
            f"rerun the command to continue"
        )
    try:
        check_space(out, needed=_MIN_FREE_BYTES)
    except OSError as error:
        raise LoadingStopped(f"{error}, and rerun the command to continue") from None


def _nothing_works_message(finished: dict[int, dict[str, Any]], num_links: int) -> str:
    num_tried = sum(stats["count"] for stats in finished.values())
    error = max(errors := _errors(finished.values()), key=errors.__getitem__, default="none")
    return (
        f"not one of {num_tried:,} links (of {num_links:,}) could be downloaded; the most frequent "
        f"error is: {error}. Check the network (DNS, and the proxy in http_proxy and https_proxy), "
        f"and rerun the command"
    )


# --- reporting ------------------------------------------------------------------------------


def _errors(stats_of_shards: Iterable[dict[str, Any]]) -> Counter[str]:
    """How often there was each error, without host names and other details in quotes."""
    errors: Counter[str] = Counter()
    for stats in stats_of_shards:
        for text, count in stats["status_dict"].items():
            if text != "success":
                text = re.sub(r"^<urlopen error (.*)>$", r"\1", " ".join(text.split()))
                text = re.sub(r"^OpenCV\S* \S+ error: ", "OpenCV: ", text)
                errors[re.sub(r"'[^']*'", "'...'", text)[:70]] += count
    return errors


def _summary(out: Path, record: Record) -> str:
    stats = all_stats(out, record)
    last = [stats[shard] for shard in record.last_pass]  # the links without an image are in these
    errors = _errors(last)
    lines = [
        f"{out}" + (f", after {len(record.passes)} passes" if len(record.passes) > 1 else ""),
        _line(record, "links", record.num_links),
        _line(record, "images", sum(each["successes"] for each in stats.values())),
        _line(record, "dead links", sum(each["failed_to_download"] for each in last)),
        _line(record, "not an image", sum(each["failed_to_resize"] for each in last)),
    ]
    lines += [
        _line(record, "", count, error) for error, count in errors.most_common(MAX_ERRORS_SHOWN)
    ]
    lines.append(
        _line(record, "duplicates", record.num_repeated, "same URL as another; downloaded again")
    )
    if record.num_problems:
        lines.append(f"{record.num_problems:,} rows of {record.source} cannot be used:")
        lines += [f"  {problem}" for problem in record.problems]
    num_temporary = sum(count for error, count in errors.items() if _TEMPORARY.search(error))
    if num_temporary:
        lines.append(
            f"{num_temporary:,} errors may be temporary; to try all failed links again, rerun the "
            f"command with --retry_failed"
        )
    if record.has_captions:
        lines.append(f"next: {this_program()} validate --data {quoted(str(out))}")
    else:
        lines.append("the list has no captions: the images can be captioned, but not trained on")
    return "\n".join(lines)


def _line(record: Record, name: str, count: int, text: str = "") -> str:
    return f"{name:<12} {count:>12,} {count / record.num_links:>7.1%}  {text}".rstrip()
