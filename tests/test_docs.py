"""The documentation: links lead somewhere, names exist, code runs, and the English is plain."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora_engine
from lora_engine.__main__ import VERBS, run_verb
from lora_engine.config import TrainingConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
MAX_README_WORDS = 1300
OURS = "recipes|lora_engine|benchmarks"

# Flags of other programs, and old spellings.
OTHER_FLAGS = {
    "ipc", "shm_size", "licence", "image_folder", "max_restarts", "version", "learning_rate",
}

NOT_ENGLISH = {  # expression: what it looks like in a text
    "one file a recipe": r"\bone (plain )?(Python )?(file|line) an? \w",
    "bodies": r"\b(the|our|own|their) bod(y|ies)\b(?! (of (the )?page|tag))",
    "names near ones": r"\bnam(e|es|ing) near ones\b",
    "goes on with the same command": r"\bgoes on with the same command\b",
    "what its file holds already": r"\bwhat (its|the) file holds already\b",
    "keeps the adapter by that": r"\bkeeps? the adapter by\b",
    "for want of": r"\bfor want of\b",
    "dies of it": r"\bdies of it\b",
    "of now": r"(?<!\bas )\bof now\b",
    "is to come again": r"\bis to come again\b",
    "says too much good": r"\btoo much good\b",
    "speaker": r"(?i:\bspeakers?\b)|Speaker",
    "Place": r"\b(class|import|list\[)\s*Place\b|\bPlace\(",
    "Prepared": r"\bPrepared\b(?! (by|for|with|from)\b)",
    "journal": r"(?i:(?<![a-z])journal)(?!_mode)",
    "FlatMatrices": r"\bFlatMatrices\b",
    "products": r"\bproducts\.(py|product)\b|\b(import|lora_engine\.)\s*products\b",
    "room": r"\b(an?|each|every|own|one|as) rooms?\b(?! (for|full|with)\b)|_rooms?\b",
    "keeper": r"(?i:(?<![a-z])keepers?\b)|Keeper\b",
    "say how": r"\bsays? how\b(?! (many|much)\b)",
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `python -m` of our own in code, the words after "-m"."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        for line in [*lines, *inline_code(page)]:
            for command in re.findall(rf"python -m ((?:{OURS})[^&\"]*)", line):
                found.append((page.name, shlex.split(command)))
    return found


def flags_in(words: list[str]) -> set[str]:
    return {
        word.removeprefix("--").split("=")[0].replace("-", "_")
        for word in words if re.match(r"--[a-z]", word)
    }


def flags_of_help(text: str) -> set[str]:
    return flags_in(re.findall(r"--[a-z][\w-]*", text))


@pytest.fixture(scope="module")
def known_flags():
    """The flags that a command of ours takes, by its module and verb."""
    def known(module: str, verb: str | None = None) -> set[str]:
        if module.startswith("recipes."):
            names = {field.name for field in dataclasses.fields(TrainingConfig)}
            return names | {f"no_{name}" for name in names} | {"help"}
        if verb is not None:
            return help_of(lambda: run_verb([verb, "--help"]))
        pytest.importorskip("peft")
        return help_of(lambda: importlib.import_module(module).main(["--help"]))

    return known


def help_of(show) -> set[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        show()
    return flags_of_help(out.getvalue()) | {"help"}


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MAX_README_WORDS


def test_relative_links_lead_to_files_and_headings():
    num_links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            num_links += 1
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"
    assert num_links > 20


def test_every_page_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_that_are_named_exist(page):
    pattern = rf"(?<![\w/.-])(?:{OURS}|tests|docs|\.ci|\.github)/[\w./-]*\w/?"
    named = set(re.findall(pattern, page.read_text(encoding="utf-8")))
    missing = {name for name in named if "NAME" not in name and not (ROOT / name).exists()}
    assert not missing, f"{page.name} names {missing}"


def test_modules_and_verbs_of_commands_exist():
    assert len(commands()) > 20
    for page, words in commands():
        module = words[0]
        if module == "recipes.NAME":
            continue
        assert importlib.util.find_spec(module.rstrip(".")), f"{page}: no module {module}"
        if module == "lora_engine" and len(words) > 1 and words[1] != "VERB":
            assert words[1] in VERBS, f"{page}: no verb {words[1]}"


def test_flags_of_commands_exist(known_flags):
    for page, words in commands():
        flags = flags_in(words)
        if flags:
            verb = words[1] if words[0] == "lora_engine" else None
            unknown = flags - known_flags(words[0], verb)
            assert not unknown, f"{page}: {' '.join(words)} has no --{unknown}"


def test_flags_that_are_named_in_the_text_exist(known_flags):
    known = known_flags("recipes.blip_cc3m") | OTHER_FLAGS
    for verb in VERBS:
        known |= known_flags("lora_engine", verb)
    for module in ("all", "same_bits", "throughput", "generate"):
        known |= known_flags(f"benchmarks.{module}")
    for page in PAGES:
        for code in inline_code(page):
            if not code.startswith(("python", "pip", "git", "torchrun")):
                unknown = flags_in(code.split()) - known
                assert not unknown, f"{page.name}: `{code}` has no --{unknown}"


def test_hyperparameters_are_those_of_the_recipes(capsys):
    text = (ROOT / "docs/hyperparameters.md").read_text().partition("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)
    (_, *recipes), _, *settings = ([cell.strip(" `") for cell in row.split("|")] for row in rows)
    assert len(recipes) == 3 and len(settings) > 10
    for column, recipe in enumerate(recipes, start=1):
        importlib.import_module(f"recipes.{recipe}").main(
            ["--print_config", "--train_data_path", "train.json"]
        )
        config = json.loads(capsys.readouterr().out)
        for row in settings:
            value = config[row[0].removeprefix("--")]
            shown = " ".join(value) if isinstance(value, list) else value
            same = float(row[column]) == shown if isinstance(shown, float | int) else (
                row[column] == str(shown).lower()
            )
            assert same, f"{row[0]} of {recipe} is {shown}, not {row[column]}"


@pytest.fixture
def example_folder(tmp_path, monkeypatch, blip_folder):
    """A folder in which the pages' Python code finds what it names."""
    captioner = lora_engine.load_captioner(blip_folder)
    lora_engine.inject(captioner.model, ["attention"])
    lora_engine.save_adapter(
        captioner.model, tmp_path / "runs/mine/adapter", base_model=str(blip_folder)
    )
    (tmp_path / "captions_val2017.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a dog"}],
    }))
    for name in ("dog.jpg", "hut.jpg"):
        Image.new("RGB", (60, 48), "white").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PYTHON_BLOCKS = {
    f"{page.name}, {number}": source
    for page in PAGES for number, source in enumerate(blocks(page, "python"), start=1)
}


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_code_runs(block, example_folder, blip_folder):
    source = PYTHON_BLOCKS[block]
    if "peft" in source:
        pytest.importorskip("peft")
    names = {"lora_engine": lora_engine, "torch": torch}
    small = source.replace("Salesforce/blip-image-captioning-base", str(blip_folder))
    exec(compile(small, block, "exec"), names)
    if "captions_val2017" in source:
        rows = json.loads((example_folder / "val.json").read_text())
        assert rows == [{"text": "a dog", "image": "val2017/7.jpg"}]


def test_comments_of_results_in_python_code_are_true(example_folder, capsys):
    (source,) = (code for code in PYTHON_BLOCKS.values() if "# 640" in code)
    exec(compile(source, "training.md", "exec"), {})
    assert capsys.readouterr().out == "640\n"


def test_ci_ends_with_the_readmes_test_command():
    (command,) = (line for line in blocks(README, "bash") if "pytest" in line)
    assert (ROOT / ".ci/run").read_text().endswith(command)


def texts() -> list[Path]:
    folders = ("docs", "lora_engine", "recipes", "benchmarks", "tests")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [*PAGES, ROOT / "benchmarks/LOG.md", ROOT / "lora_engine/report/report.css"]
    return [path for path in files if path != Path(__file__)]


@pytest.mark.parametrize("expression", NOT_ENGLISH)
def test_the_english_is_plain(expression):
    pattern = re.compile(NOT_ENGLISH[expression])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line, expression", [
    ("one plain Python file a model", "one file a recipe"),
    ("loads our own bodies", "bodies"),
    ("verbs have a room", "room"),
    ("import checkpoint as room", "room"),
    ("class AdapterKeeper:", "keeper"),
    ("adapter_keeper = 1", "keeper"),
    ("the best adapter of now", "of now"),
    ("class Speaker:", "speaker"),
    ("from lora_engine import products", "products"),
])
def test_an_expression_is_found(line, expression):
    assert re.search(NOT_ENGLISH[expression], line)


@pytest.mark.parametrize("line", [
    "headroom for the optimizer", "a room full of people", "room = 0.1 * (high - low)",
    "a goalkeeper in a journey", "as of now", "matrix products", "loudspeakers", "in place",
])
def test_ordinary_words_pass(line):
    assert [name for name, pattern in NOT_ENGLISH.items() if re.search(pattern, line)] == []
