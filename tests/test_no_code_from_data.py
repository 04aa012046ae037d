"""No code from data files is ever run: the sources are searched for calls that could."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for name in ("lora_engine", "recipes") for path in (ROOT / name).rglob("*.py")
)
MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "subprocess", "pty", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {  # of any module or object
    "os.system", "os.popen", "os.execv", "os.spawnv", "torch.load", "np.load", "numpy.load",
    "yaml.load", "torch.hub.load",
}
ALLOWED = {
    # some published checkpoints are .bin files, read with weights_only
    ("lora_engine/lora/tensor_files.py", "torch.load"),
    # only its list2cmdline, which quotes a command line
    ("lora_engine/cli.py", "subprocess"),
    # downloads run in an environment of their own
    ("lora_engine/data/download/img2dataset.py", "subprocess"),
}


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in CALLS or called in METHODS:
                yield called
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not is_false:
                    yield keyword.arg
                if keyword.arg == "weights_only" and is_false:
                    yield "weights_only=False"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_can_run_code_from_a_file(path):
    name = path.relative_to(ROOT).as_posix()
    source = path.read_text(encoding="utf-8")
    assert {(name, danger) for danger in dangers(source)} <= ALLOWED


def test_the_one_load_of_torch_takes_weights_only():
    tree = ast.parse((ROOT / "lora_engine/lora/tensor_files.py").read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    (only,) = [k.value for k in calls[0].keywords if k.arg == "weights_only"]
    assert isinstance(only, ast.Constant) and only.value is True


def test_the_only_programs_started_are_img2dataset_and_its_watchdog():
    """With a list of arguments, so that no shell reads them."""
    path = ROOT / "lora_engine/data/download/img2dataset.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func).startswith("subprocess.")
    ]
    assert [(dotted(call.func), ast.unparse(call.args[0])) for call in calls] == [
        ("subprocess.Popen", "command"),
        ("subprocess.Popen", "[sys.executable, '-S', '-c', _WATCHDOG]"),
    ]
    assert not any(keyword.arg in ("shell", None) for call in calls for keyword in call.keywords)
    watchdog, = (
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_WATCHDOG"
    )
    assert isinstance(watchdog, ast.Constant)  # and nothing that was read


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_transformers_loads_from_folders_without_their_code_and_without_the_hub(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
            given = {
                keyword.arg: keyword.value.value for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant)
            }
            assert given.get("trust_remote_code") is False, ast.unparse(node)
            assert given.get("local_files_only") is True, ast.unparse(node)


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import load", "eval('1')", "torch.load(x)", "import subprocess",
    "AutoModel.from_pretrained(x, trust_remote_code=True)", "np.load(x)", "os.system('x')",
    "torch.load(x, weights_only=False)", "f(x, trust_remote_code=y)", "exec(open(x).read())",
])
def test_the_search_finds(source):
    assert list(dangers(source))


@pytest.mark.parametrize("source", [
    "layer.compile()", "re.compile('x')", "model.eval()", "f(x, trust_remote_code=False)",
])
def test_the_search_leaves_alone(source):
    assert not list(dangers(source))
