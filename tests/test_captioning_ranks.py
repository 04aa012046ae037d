"""Captioning and evaluating in several processes: the same output as from one."""

import dataclasses
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from adapters import adapter_folder
from forking import launch
from pictures import read_annotations, write_pictures

from lora_engine import __main__ as verbs
from lora_engine.captioning import captioner as captioner_module
from lora_engine.captioning.captioner import Caption, Captioned, caption_images
from lora_engine.cli import reported_errors
from lora_engine.commands import caption as caption_command
from lora_engine.commands.caption import CaptionConfig
from lora_engine.data.image_table import ImageTable
from lora_engine.data.workers import default_num_workers
from lora_engine.features.source import open_features
from lora_engine.models.pretrained import load_captioner
from lora_engine.ranks import OneProcess


class Thread:
    """One of several processes, as a thread; what they exchange passes through JSON."""

    def __init__(self, rank: int, barrier: threading.Barrier, texts: list[str]) -> None:
        self.rank, self.size, self.is_main = rank, barrier.parties, rank == 0
        self.local_rank, self.local_size = rank, barrier.parties
        self.barrier = barrier
        self.texts = texts

    def gather(self, value):
        self.texts[self.rank] = json.dumps(value)
        self.barrier.wait(timeout=30)
        found = [json.loads(text) for text in self.texts]
        self.barrier.wait(timeout=30)
        return found

    def maximum(self, values):
        return torch.tensor(self.gather(values.tolist())).amax(dim=0)

    def machine_first(self):
        return nullcontext()

    def name(self, rank):
        return f"rank {rank}"


def in_threads(size: int, work: Callable) -> list:
    """What `work(ranks)` returns in each of `size` processes."""
    barrier, texts = threading.Barrier(size), [""] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [Thread(rank, barrier, texts) for rank in range(size)]))


def pictures(folder: Path, num_images: int, *, bad: int) -> list[str]:
    """Image files, the one with the number `bad` damaged, and train.json."""
    images = [row.image for row in read_annotations(write_pictures(folder, num_images=num_images))]
    Path(images[bad]).write_bytes(b"none")
    return images


# --- with two processes --------------------------------------------------------------------------


def two_processes(*args, folder: Path, given: str = "") -> list[tuple[int, str, list[str]]]:
    """The status, the output and the messages of each process of a verb, with one common stdin."""
    (folder.with_name("stdin")).write_text(given)
    descriptor = os.open(folder.with_name("stdin"), os.O_RDONLY)

    def run() -> int:
        os.chdir(folder)
        sys.stdin = os.fdopen(descriptor)
        sys.stdout = open(folder.with_name(f"stdout_{os.environ['RANK']}"), "w")
        with reported_errors() as status:
            status.code = verbs.run_verb([*map(str, args)])
        return status.code

    ended = launch(2, run, folder.parent)
    os.close(descriptor)
    return [
        (status, folder.with_name(f"stdout_{rank}").read_text(), told(output))
        for rank, (status, output) in enumerate(ended)
    ]


def told(err: str) -> list[str]:
    """The messages of our own."""
    return [line for line in err.splitlines() if re.match(r"skipped|warning|error|\d+ ", line)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_evaluate_as_one_does(command, blip_folder, tmp_path):
    pictures(tmp_path, 7, bad=3)
    args = [
        "evaluate", "--adapter", adapter_folder(blip_folder, tmp_path / "adapter"),
        "--data", tmp_path / "train.json", "--batch_size", "2", "--num_threads", "1",
        "--max_new_tokens", "6", "--out", "each.jsonl", "--coco_out", "coco.json",
    ]
    (tmp_path / "two").mkdir()
    status, out, err = command(verbs.run_verb, *args)
    assert status == 1 and "6 images of" in out and "difference" in out
    assert two_processes(*args, folder=tmp_path / "two") == [(1, out, told(err)), (1, "", [])]
    assert len(told(err)) == 2
    assert contents(tmp_path / "two") == contents(command.work)
    assert contents(command.work).keys() == {"each.jsonl", "coco.json", "skipped.jsonl"}


def test_two_processes_caption_as_one_does(command, blip_folder, tmp_path, monkeypatch):
    """Resumed, with images from stdin, which only one process can read."""
    images = pictures(tmp_path, 9, bad=5)
    args = [
        "caption", "--model", blip_folder, "--batch_size", "2", "--num_threads", "1",
        "--max_new_tokens", "6", "--temperature", "2", "--out", "each.jsonl", "-", images[0],
    ]
    kept = json.dumps({"image": images[4], "caption": "mine"}) + "\n"
    (tmp_path / "two").mkdir()
    for folder in (tmp_path / "two", command.work):
        (folder / "each.jsonl").write_text(f"{kept}incompl")
    given = "\n".join(images[1:])
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    status, out, err = command(verbs.run_verb, *args)
    assert status == 1 and out.count("\n") == 7
    ended = two_processes(*args, folder=tmp_path / "two", given=given)
    assert ended == [(1, out, told(err)), (1, "", [])]
    assert told(err)[0].startswith("1 of 9 images already have a caption")
    assert contents(tmp_path / "two") == contents(command.work)


# --- how images are shared out --------------------------------------------------------------


@pytest.fixture
def captioned(blip_folder, tmp_path, monkeypatch):
    """Captions 19 images, one of them bad, by two captioners -> a generator of results.

    A caption tells what it was made from. `captioned.num_batches` have been captioned so far.
    """
    def caption(captioner, features, settings, *, numbers):
        run.num_batches += 1
        return [
            Caption(f"{captioner.prompt} {image.sum().item()} {number}", ended=number % 2 == 0)
            for image, number in zip(features, numbers)
        ]

    monkeypatch.setattr(captioner_module, "caption_features", caption)
    base = load_captioner(blip_folder)
    captioners = [dataclasses.replace(base, prompt=prompt) for prompt in ("a", "b")]
    table = ImageTable.of_files(pictures(tmp_path, 19, bad=11))

    def run(ranks) -> Iterator[Captioned]:
        features = open_features(
            base, device=torch.device("cpu"), dtype=torch.float32, num_images=19, cache="off",
            cache_dir=None, cache_dtype=None, cache_limit_bytes=0, used_once=True, ranks=ranks,
        )
        return caption_images(
            captioners, table, features=features, batch_size=2, numbers=range(100, 119),
            ranks=ranks,
        )

    run.num_batches = 0
    return run


def test_every_process_has_each_result_once_and_in_order(captioned):
    expected = list(captioned(OneProcess()))
    assert [result.image[-6:-4] for result in expected] == [f"{n:02}" for n in range(19)]
    assert [n for n, result in enumerate(expected) if result.reason is not None] == [11]
    assert len({caption for result in expected for caption in result.captions}) == 2 * 18
    for size in (2, 3, 4, 20):
        assert in_threads(size, lambda ranks: list(captioned(ranks))) == size * [expected]


@pytest.mark.parametrize("size, num_batches", [(1, 1), (2, 8)])
def test_results_come_before_all_images_are_captioned(captioned, size, num_batches):
    def first(ranks):
        with closing(captioned(OneProcess() if size == 1 else ranks)) as results:
            next(results)

    in_threads(size, first)
    assert captioned.num_batches == 2 * num_batches  # by two captioners


# --- what must be the same in all processes -------------------------------------------------


def test_what_the_main_process_finds_in_the_output_is_left_out_by_all(tmp_path):
    table = ImageTable.of_files(["a.png", "b.png", "c.png"])
    for rank, image in enumerate(["b.png", "a.png"]):
        (tmp_path / f"{rank}.jsonl").write_text(
            json.dumps({"image": image, "caption": "x"}) + "\n"
        )

    def left(ranks):
        config = CaptionConfig(images=(), out=str(tmp_path / f"{ranks.rank}.jsonl"))
        return caption_command._left(config, table, ranks)

    assert in_threads(2, left) == [[0, 2], [0, 2]]


@pytest.mark.parametrize("images, changes, words", [
    (["a/x.png", "a/z.png"], {}, "names of images"),
    (["a/x.png"], {}, "number of images 1 instead of 2"),
    (["b/x.png", "b/y.png"], {"batch_size": 3}, "--batch_size 3 instead of 16"),
    (["b/x.png", "b/y.png"], {"device": "cpu", "out": "here", "model": "there"}, None),
])
def test_other_images_or_settings_are_refused(images, changes, words):
    def check(ranks):
        own = ranks.rank == 1
        table = ImageTable.of_files(images if own else ["a/x.png", "a/y.png"])
        CaptionConfig(images=(), **(changes if own else {})).check_same(table, ranks)

    if words is None:
        in_threads(2, check)
    else:
        with pytest.raises(ValueError, match=f"rank 1 differs from rank 0: .*{words}"):
            in_threads(2, check)


def test_another_adapter_is_refused_before_anything_is_captioned(blip_folder, tmp_path):
    images = pictures(tmp_path, 2, bad=0)
    adapter = str(adapter_folder(blip_folder, tmp_path / "adapter"))

    def run(ranks):
        config = CaptionConfig(
            images=(), model=str(blip_folder), adapter=(adapter,) if ranks.rank else (), cache="off"
        )
        captioners = caption_command._captioners(config)
        table = ImageTable.of_files(images)
        with config.captions(captioners, table, [config.generation], ranks=ranks):
            pytest.fail("this is reached")

    with pytest.raises(ValueError, match="rank 1 differs from rank 0: weights"):
        in_threads(2, run)


# --- each process' share of the machine -----------------------------------------------------


def test_threads_and_loading_processes_are_shared_out(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    for asked in (None, 3):
        CaptionConfig(images=(), device="cpu", num_threads=asked).take_share(
            Thread(1, threading.Barrier(4), [])
        )
    assert found == [4, 3]
    cuda = torch.device("cuda")
    assert [default_num_workers(cuda, None, size) for size in (1, 4, 16)] == [8, 2, 0]
    assert default_num_workers(cuda, 5, 4) == 5


@pytest.mark.parametrize("verb, words", [
    *((verb, f"lora_engine {verb} runs in one process; start it without torchrun")
      for verb in ("merge", "report", "download", "validate", "doctor")),
    ("captoin", "there is no verb 'captoin'"),
])
def test_other_verbs_are_refused_within_the_processes_of_torchrun(
    refused, monkeypatch, verb, words
):
    """There the main process reports the error, and all end with it."""
    has_ended = []

    @contextmanager
    def processes():
        try:
            yield Thread(0, threading.Barrier(2), [])
        except ValueError:
            has_ended.append(True)
            raise

    monkeypatch.setattr(verbs, "open_ranks", processes)
    refused(verbs.run_verb, verb, words=[words])
    assert has_ended == [True]
