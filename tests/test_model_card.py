"""The model card: metadata for the Hub, code that runs, and no local paths."""

import html
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pictures import json_lines, settings, write_pictures

from lora_engine import __main__ as verbs
from lora_engine import terminal
from lora_engine.config import TrainingConfig
from lora_engine.lora.adapter import CONFIG_FILE, read_adapter
from lora_engine.report.markdown import escape_markdown, table
from lora_engine.report.model_card import write_model_card
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.summary import TrainingSummary
from lora_engine.stopping import TrainingStopped
from lora_engine.training import validation as validation_module
from lora_engine.training.loop import train
from lora_engine.training.trainer import Trainer
from lora_engine.training.validation import ValidationLoss
from recipes import blip_cc3m, vit_gpt2_cc3m

RECIPES = {"blip_cc3m": blip_cc3m.main, "vit_gpt2_cc3m": vit_gpt2_cc3m.main}
PROMPT = "a picture of"

# PEFT still asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@dataclass
class Finished:
    config: TrainingConfig
    summary: TrainingSummary

    @property
    def card(self) -> str:
        return card_of(self.summary.path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, num_images=20)
    write_pictures(folder, num_images=6, name="val.json")
    return folder


# Whatever the machine is like on which these tests run: no word of the card, nor part of one.
SECRET = "qzx7secret"


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory, whole_captions):
    """The working folder, the home folder, the user and the folders of runs are named SECRET."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(f"working-{SECRET}"))
        patch.setenv("HOME", str(tmp_path_factory.mktemp(f"home-{SECRET}")))
        for name in ("LOGNAME", "USER"):
            patch.setenv(name, SECRET)
        yield


@pytest.fixture(scope="module", params=["blip", "vit_gpt2"])
def finished(request, data, machine, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp(SECRET)
    model = request.getfixturevalue(f"{request.param}_folder")
    shutil.copytree(model, folder / f"model-{SECRET}")
    shutil.copytree(data, folder / f"data-{SECRET}")
    config = settings(
        folder / f"model-{SECRET}", folder / f"data-{SECRET}", folder / f"run-{SECRET}",
        max_caption_tokens=32,
    )
    return Finished(config, train(config))


@pytest.fixture(scope="module")
def prompted(finished, tmp_path_factory) -> Finished:
    run = tmp_path_factory.mktemp(SECRET) / "run"
    config = replace(finished.config, output_path=str(run), prompt=PROMPT)
    return Finished(config, train(config))


@pytest.fixture
def changed(finished, tmp_path):
    """A function that writes the card for a copy of the run with changed files."""
    shutil.copytree(finished.summary.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")

    def rewrite(*, adapter=None, config=None, metrics=None, samples=None) -> str:
        for path, changes in (
            (folder.adapter / CONFIG_FILE, adapter), (folder.path / "config.json", config)
        ):
            values = json.loads(path.read_text()) | (changes or {})
            path.write_text(json.dumps(values))
        for path, lines in ((folder.metrics, metrics), (folder.samples, samples)):
            if lines is not None:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
        write_model_card(folder)
        return card_of(folder.path)

    return rewrite


def card_of(run: Path) -> str:
    return (run / "adapter" / "README.md").read_text(encoding="utf-8")


def code(card: str, language: str) -> str:
    block, = re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    return block


def tables(card: str) -> list[list[list[str]]]:
    """The rows of every table of a card, as an independent Markdown library reads them."""
    rendered = MarkdownIt("commonmark").enable("table").render(card)
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
        ]
        for shown in re.findall(r"<table>(.*?)</table>", rendered, re.DOTALL)
    ]


# --- front matter -----------------------------------------------------------------------------


def test_the_hubs_own_reader_finds_exactly_the_known_metadata(finished, changed):
    known = {
        "library_name": "peft", "pipeline_tag": "image-to-text",
        "tags": ["lora", "image-captioning"],
    }
    assert ModelCard(finished.card).data.to_dict() == known
    assert "No license has been chosen" in finished.card and "base_model:" not in finished.card
    base = "Salesforce/blip-image-captioning-base"
    card = changed(adapter={"base_model_name_or_path": base}, config={"license": "cc-by-4.0"})
    assert ModelCard(card).data.to_dict() == known | {"base_model": base, "license": "cc-by-4.0"}
    assert "`cc-by-4.0`" in card and "No license" not in card


@pytest.mark.parametrize("license", ["Apache 2.0", "MIT", "mit\nbase_model: x", '"', ""])
def test_a_license_that_the_hub_would_not_know_is_refused_at_the_start(license):
    with pytest.raises(ValueError, match="--license is .*apache-2.0"):
        TrainingConfig(model="m", license=license).check()
    for known in ("apache-2.0", "mit", "cc0-1.0", "llama3.1", "other"):
        TrainingConfig(model="m", license=known).check()


# --- nothing of this machine -------------------------------------------------------------------


def test_the_card_contains_no_local_path(finished, prompted):
    for run in (finished, prompted):
        paths = [run.config.model, run.config.train_data_path, run.summary.path, Path.cwd()]
        assert all(SECRET in str(path) for path in (*paths, Path.home()))
        assert SECRET not in run.card


# --- code that runs ----------------------------------------------------------------------------


def run_snippet(run: Finished, monkeypatch) -> tuple[str, str]:
    """What the card's Python prints for the first sample, and the run's caption of it."""
    monkeypatch.chdir(run.summary.path / "adapter")
    sample = run.summary.samples[0]
    source = code(run.card, "python")
    assert source.count("'BASE_MODEL'") == 1 and source.count('"photo.jpg"') == 1
    source = source.replace("'BASE_MODEL'", repr(run.config.model))
    source = source.replace('"photo.jpg"', repr(sample.image))
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), {})
    return printed.getvalue(), sample.after


def test_the_snippet_captions_as_the_run_did(finished, monkeypatch):
    printed, caption = run_snippet(finished, monkeypatch)
    assert printed == f"{caption}\n" and caption != finished.summary.samples[0].before


def test_the_snippet_of_an_adapter_with_a_prompt_captions_as_the_run_did(prompted, monkeypatch):
    assert PROMPT in code(prompted.card, "python")
    printed, caption = run_snippet(prompted, monkeypatch)
    assert printed == f"{caption}\n"


def test_the_commands_caption_and_train_further(prompted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(prompted.summary.path / "adapter")
    sample = prompted.summary.samples[0]
    names = {"BASE_MODEL": prompted.config.model, "photo.jpg": sample.image,
             "train.json": prompted.config.train_data_path}
    caption, further = (
        [names.get(word, word) for word in shlex.split(line)]
        for line in code(prompted.card, "bash").splitlines()
    )
    assert caption[:3] == ["python", "-m", "lora_engine"]
    assert verbs.run_verb([*caption[3:], "--device", "cpu"]) == 0
    said = terminal.escaped(" ".join(sample.after.split()))
    assert capsys.readouterr().out == f"{sample.image}\t{said}\n"
    recipe = RECIPES[further[2].removeprefix("recipes.")]
    small = "--max_steps 1 --num_samples 0 --device cpu --max_caption_tokens 32"
    assert recipe([*further[3:], *small.split(), "--output_path", str(tmp_path / "run")]) == 0
    start = json_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert start["step"] == 0 and "those of the initial adapter" in card_of(
        tmp_path / "run"
    )


def test_a_base_and_an_adapter_on_the_hub_are_named_where_they_are_used(changed):
    card = changed(
        adapter={"base_model_name_or_path": "owner/base", "revision": "v1"},
        config={"push_to_hub": "me/mine"},
    )
    source = code(card, "python")
    assert "base, adapter = 'owner/base', 'me/mine'" in source
    assert source.count("from_pretrained(base, revision='v1')") == 3
    download, caption, further = map(shlex.split, code(card, "bash").splitlines())
    assert download == ["hf", "download", "me/mine", "--local-dir", "adapter"]
    assert "--model" not in caption
    assert further[further.index("--model") :][:4] == ["--model", "owner/base", "--revision", "v1"]
    assert "# me/mine" in card and "[owner/base](https://huggingface.co/owner/base)" in card
    assert "BASE_MODEL" not in card


def test_a_repository_without_an_owner_is_not_looked_for_among_the_hubs_own(changed):
    card = changed(config={"push_to_hub": "mine"})
    assert "adapter = 'BASE_MODEL', '.'" in code(card, "python") and "mine" not in card


# --- what it says ------------------------------------------------------------------------------


def test_data_settings_and_fingerprints_are_those_of_the_run(finished):
    adapter = read_adapter(finished.summary.path / "adapter")
    origin, _, _, set_to = tables(finished.card)
    cells = {row[0]: row[1] for row in origin + set_to}
    assert cells["training data"] == "20 captions of 20 images"
    assert cells["validation data"] == "6 captions of 6 images"
    for name in ("base_fingerprint", "data_fingerprint"):
        assert adapter.provenance[name] in finished.card
    expected = {
        "rank": "8", "alpha": "32", "dropout": "0.1", "peak learning rate": "0.001",
        "epochs": "at most 2", "batch": "4 captions", "precision": "float32", "seed": "42",
        "targets": f"attention feed_forward ({len(adapter.config['target_modules'])} modules)",
    }
    assert expected.items() <= cells.items()


def test_a_rank_that_saving_has_doubled_is_explained(changed):
    card = changed(config={"init_lora_weights": "olora"})
    assert "| rank | 8 (saved as plain LoRA of twice the trained rank) |" in card


def test_every_score_is_there_before_training_and_at_the_adapters_step(changed):
    def validation(step, **scores):
        return {"event": "validation", "step": step, "epoch": step / 5, **scores}

    card = changed(metrics=[
        validation(0, loss=5.0, bleu_4=0.125, cider_d=None),
        {"event": "train", "step": 5, "loss": 4.5},
        # The best step, but saving it failed: the saved adapter is that of step 10.
        validation(5, loss=3.75, bleu_4=0.5, cider_d=0.75, rouge_l=0.625),
        validation(10, loss=4.0, bleu_4=0.375, cider_d=1.0, rouge_l=0.25, num_images=9),
        {"event": "train", "step": 12, "loss": 4.5},
    ])
    scores = next(rows for rows in tables(card) if rows[0][0] == "validation")
    assert scores[0][1:] == ["before training", "this adapter (step 10 of 12, epoch 2)"]
    assert [[cell.replace("<code>", "").replace("</code>", "") for cell in row]
            for row in scores[1:]] == [
        ["loss (nats per token)", "5.0000", "4.0000"], ["BLEU-4", "0.1250", "0.3750"],
        ["CIDEr-D", "", "1.0000"], ["ROUGE-L", "", "0.2500"],
    ]


def test_an_adapter_that_training_did_not_improve_says_so(
    blip_folder, data, tmp_path, monkeypatch
):
    losses = iter([4.0, 4.5, 4.25])
    monkeypatch.setattr(
        validation_module, "validation_loss", lambda *a, **k: ValidationLoss(next(losses), [])
    )
    train(settings(blip_folder, data, tmp_path / "run"))
    card = card_of(tmp_path / "run")
    assert "Training improved nothing: this is the initial adapter." in card
    assert "this adapter (step 0 of 10, epoch 0)" in card and "| 4.0000 | 4.0000 |" in card


def test_the_loss_curve_is_beside_the_card(finished):
    run = finished.summary.path
    assert '<img src="loss_curve.png"' in finished.card
    assert (run / "adapter" / "loss_curve.png").read_bytes() == (
        run / "loss_curve.png"
    ).read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TrainingStopped("no more"), OSError("x")])
def test_a_run_that_ends_early_leaves_the_card_of_the_adapter_that_is_there(
    blip_folder, data, tmp_path, monkeypatch, error
):
    real, calls = Trainer.update, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(Trainer, "update", step)
    with pytest.raises((type(error), TrainingStopped)):
        train(settings(blip_folder, data, tmp_path / "run"))
    card = card_of(tmp_path / "run")
    assert read_adapter(tmp_path / "run" / "adapter").provenance["step"] == "5"
    assert "this adapter (step 5 of 6, epoch 1)" in card
    assert (tmp_path / "run" / "adapter" / "loss_curve.png").exists()


# --- text of strangers -------------------------------------------------------------------------

HOSTILE = [
    "a | b", "<script>alert(1)</script>", "**bold** _it_ `x` ~~y~~", "[a](javascript:b)", "\\|",
    "![i](http://x.y/z.png)", "line\nbreak\u2028and\x85more", "http://x.y and www.x.y",
    "&lt; &#124;", "---", "# title", "$x$", "a@b.c", "<!--", "\x00\x1b[31m", "1. one", "- item",
]


def as_shown(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", " ".join(text.split())).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_caption_is_shown_literally(changed, finished, text):
    samples = json_lines(finished.summary.path / "samples.jsonl")
    card = changed(samples=[line | {"reference": text, "caption": text} for line in samples])
    shown = next(rows for rows in tables(card) if rows[0][0] == "reference")
    assert shown[1:] == [[as_shown(text)] * 3] * 2
    assert "<script" not in card and "<!--" not in card and "http://x.y" not in card
    assert ModelCard(card).data.library_name == "peft"


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@example("\\\\|`")
@example("**a**b_c_")
def test_any_text_is_shown_literally(text):
    """Compared with what a Markdown library makes of it, in a cell and with HTML allowed."""
    rows, = tables(table(["", ""], [["-", escape_markdown(text)]]))
    assert rows[1] == ["-", as_shown(text)]


def test_half_a_character_does_not_stop_the_card(changed, finished):
    samples = json_lines(finished.summary.path / "samples.jsonl")
    card = changed(samples=[line | {"reference": "a \ud800 b"} for line in samples])
    assert "| a ? b |" in card


def test_the_number_of_samples_shown_is_limited(changed, finished):
    line = json_lines(finished.summary.path / "samples.jsonl")[0]
    lines = [line | {"step": step, "image": f"{index}.png"}
             for step in (0, 10) for index in range(50)]
    shown = next(rows for rows in tables(changed(samples=lines)) if rows[0][0] == "reference")
    assert len(shown) == 9
