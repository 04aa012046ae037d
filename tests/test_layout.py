"""Package layout: folders import only those below, without cycles; one file has transformers."""

import ast
import runpy
import shutil
import subprocess
import sys
import traceback
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from pictures import write_pictures

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_engine"
# From the bottom up. What lies directly in lora_engine/ is below all of them.
FOLDERS = [
    "lora", "data", "models", "features", "captioning", "report", "training", "demo", "commands"
]


def modules() -> dict[str, Path]:
    paths = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return {".".join(name).removesuffix(".__init__"): path for name, path in zip(names, paths)}


def imports(source: str, known: set[str]) -> set[str]:
    """The modules that a source imports, anywhere in it; of packages the modules they name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else None


def upward(module: str, imported: set[str]) -> list[str]:
    """Those of its imports that a module may not have."""
    if module in ("lora_engine", "lora_engine.__main__") or module.startswith("recipes"):
        return []
    mine = folder_of(module)
    height = -1 if mine is None else FOLDERS.index(mine)
    return [
        name for name in imported
        if (folder := folder_of(name)) is not None and FOLDERS.index(folder) > height
        or name.startswith("recipes") or name == "lora_engine.__main__"
    ]


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(FOLDERS)


def test_each_folder_imports_only_those_below_it():
    known = modules()
    for module, path in known.items():
        found = upward(module, imports(path.read_text(encoding="utf-8"), set(known)))
        assert not found, f"{module} imports {found}, which lie above it"


@pytest.mark.parametrize("module, source", [
    ("lora_engine.lora.layer", "from lora_engine.models import blip"),
    ("lora_engine.data.batches", "def f():\n    import lora_engine.training.loop"),
    ("lora_engine.files", "from lora_engine.lora.layer import LoRALinear"),
    ("lora_engine.training.loop", "from recipes.blip_cc3m import SETTINGS"),
])
def test_an_import_upwards_is_found(module, source):
    assert upward(module, imports(source, set(modules())))


def test_there_are_no_import_cycles():
    known = modules()
    del known["lora_engine"]  # loads what it names when asked
    graph = {
        module: imports(path.read_text(encoding="utf-8"), set(known)) & set(known)
        for module, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")


def test_only_pretrained_imports_transformers():
    importers = {
        module for module, path in modules().items()
        for name in imports(path.read_text(encoding="utf-8"), set())
        if name.split(".")[0] == "transformers"
    }
    assert importers == {"lora_engine.models.pretrained"}


def test_the_top_of_the_package_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_an_editable_install_is_found_before_a_folder_of_the_same_name(tmp_path):
    """From the folder that holds the clone, `lora_engine` is also a folder without __init__.py."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lora_engine", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    shutil.copy(PACKAGE / "version.py", tmp_path / "lora_engine")
    build = "from setuptools import build_meta; build_meta.build_editable('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as file:
        (paths,) = (file.read(name) for name in file.namelist() if name.endswith(".pth"))
    assert paths.decode().strip() == str(tmp_path)  # a line of Python would come too late


def test_from_a_recipe_to_backward_there_are_at_most_four_frames(
    blip_folder, tmp_path, monkeypatch
):
    """Of our own: run_recipe, train, Trainer.accumulate, Trainer.micro_step."""
    stacks: list[list[str]] = []
    backward = torch.Tensor.backward

    def spy(*args, **kwargs):
        stacks.append([f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack()])
        return backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    rows = str(write_pictures(tmp_path, num_images=4))
    monkeypatch.setattr(sys, "argv", [
        "blip_cc3m", "--model", str(blip_folder), "--train_data_path", rows,
        "--val_data_path", rows, "--output_path", str(tmp_path / "run"),
        "--max_steps", "1", "--num_workers", "0", "--cache", "off", "--eval_captions", "0",
    ])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("recipes.blip_cc3m", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    recipe = str(ROOT / "recipes" / "blip_cc3m.py")
    frames = [frame for frame in stacks[0] if frame.startswith(str(ROOT / "lora_engine"))]
    assert any(frame.startswith(recipe) for frame in stacks[0])
    assert len(frames) <= 4, frames
