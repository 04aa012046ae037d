"""What reaches a terminal: nothing that moves its cursor, and no ten megabytes of one value."""

import io
import json
import logging
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import read_annotations, settings, write_pictures

from lora_engine import __main__ as verbs
from lora_engine.captioning.captioner import Caption
from lora_engine.report.metrics_log import MetricsLogger
from lora_engine.terminal import MAX_LINE, MAX_TEXT, counted, escaped, one_line, printable
from lora_engine.training.loop import train

HOSTILE = "a\x1b[2J\x07\x9b31m\x7f\u202e\u2028b"
SHOWN = r"a\x1b[2J\x07\x9b31m\x7f\u202e\u2028b"


def test_one_thing_is_singular():
    numbers = [counted(number, "source file") for number in (0, 1, 2, 1200)]
    assert numbers == ["0 source files", "1 source file", "2 source files", "1,200 source files"]


def is_control(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Zl", "Zp")
        or unicodedata.bidirectional(character) in
        ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or character in "\u061c\u200e\u200f"
    )


@given(st.text())
def test_control_characters_are_escaped_and_nothing_else_is(text):
    expected = "".join(
        character.encode("unicode_escape").decode()
        if is_control(character) and character not in "\t\n\r" else
        f"\\x{ord(character):02x}" if is_control(character) else character
        for character in text
    )
    assert escaped(text) == expected
    lines = [line.split("\t") for line in text.split("\n")]
    assert printable(text) == "\n".join("\t".join(map(escaped, line)) for line in lines)


def test_ordinary_text_of_all_languages_is_left_alone():
    text = "ein Hündchen, 子犬, كلب, כלב, 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿\tand\nmore " + 60 * "whole " * 10
    assert printable(text) == text and escaped("é 👩‍👩‍👧") == "é 👩‍👩‍👧"


def test_long_lines_keep_what_was_wrong_and_what_to_do():
    text = printable(f"error: no {'x' * 10**7}; give another\nand the rest")
    assert len(text) < MAX_LINE + 100
    assert text.startswith("error: no x") and text.endswith("x; give another\nand the rest")
    assert " [... 9,99" in text
    assert len(printable("\n" * 10**7)) < MAX_TEXT + 100


def test_an_error_shows_what_a_file_holds_without_obeying_it(command, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{HOSTILE: 1, "x" * 10**6: 2}]))
    status, out, err = command(verbs.run_verb, "validate", "--data", path)
    assert r"\u001b[2J" in out and not any(map(is_control, out.replace("\n", "")))
    assert len(out) < 1000
    status, out, err = command(verbs.run_verb, f"x{HOSTILE}{'y' * 10**6}")
    assert status == 2 and len(err) < 5000 and not any(map(is_control, err.replace("\n", "")))


def test_messages_of_a_run_are_printable(tmp_path):
    stream = io.StringIO()
    with MetricsLogger(tmp_path / "metrics.jsonl", total_steps=1, stream=stream):
        logging.getLogger("lora_engine.x").info(f"skipped {HOSTILE}")
    assert stream.getvalue() == f"skipped {SHOWN}\n"


def test_captions_and_names_are_printed_escaped_and_written_whole(
    command, data, blip_folder, tmp_path, monkeypatch
):
    caption = f"ein Hündchen 👩‍👩‍👧 {HOSTILE}"
    monkeypatch.setattr(
        "lora_engine.captioning.captioner.caption_features",
        lambda *args, **kwargs: [Caption(caption, ended=True)],
    )
    image = tmp_path / "é 名前\n\x1b[2J.png"
    shutil.copy(read_annotations(data / "train.json")[0].image, image)
    bad = tmp_path / "bad\x1b[2J.png"
    bad.write_bytes(b"")
    status, out, err = command(
        verbs.run_verb, "caption", "--model", blip_folder, image, bad, "--out", "captions.jsonl"
    )
    shown = SHOWN.replace(r"\u2028", " ")  # whitespace is one space here
    assert out == f"{tmp_path}/é 名前\\x0a\\x1b[2J.png\tein Hündchen 👩‍👩‍👧 {shown}\n"
    assert f"skipped {tmp_path}/bad\\x1b[2J.png: " in err and "\x1b" not in err
    line = json.loads(Path("captions.jsonl").read_text(encoding="utf-8"))
    assert line == {"image": str(image), "caption": caption}


@pytest.mark.parametrize("num_scored", [0, 4])
def test_a_run_on_hostile_captions_prints_none_of_their_controls(
    blip_folder, tmp_path, monkeypatch, capsys, num_scored
):
    write_pictures(tmp_path, num_images=8)
    rows = json.loads(write_pictures(tmp_path, num_images=4, name="val.json").read_text())
    rows = [row | {"text": f"{HOSTILE}\nadapter {row['text']}"} for row in rows]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    train(settings(
        blip_folder, tmp_path, tmp_path / "run", max_steps=1, eval_captions=num_scored
    ))
    out = capsys.readouterr().out
    assert rf"  reference  {SHOWN}\x0aadapter a red circle" in out
    assert not any(map(is_control, out.replace("\n", "")))


def test_an_error_is_put_on_one_line():
    assert one_line(ValueError("no route\nto  host")) == "no route to host"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line(ValueError("x" * 5000), limit=5) == "xxxxx..."
