"""Python that users of other libraries type: it works, or one line says what to type."""

import ast
import inspect
import logging
import re
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_engine
from lora_engine import other_names
from lora_engine.demo import captioner_folder
from lora_engine.demo.scenes import draw, plain_caption, scenes
from lora_engine.keywords import known_keywords
from lora_engine.terminal import ConsoleHandler, logging_to

CROSS, STARS = "a large pink cross at the top right on black", "two yellow stars in a row on grey"

# What was typed, and what its last expression gives. The names that it uses are those of `names`.
WORKS = [
    ("captioner(image)", CROSS),
    ("captioner('x.png')", CROSS),
    ("captioner(Path('x.png'))", CROSS),
    ("captioner(np.asarray(image))", CROSS),
    ("captioner(open('x.png', 'rb').read())", CROSS),
    ("captioner(image.convert('RGBA'))", CROSS),
    ("captioner(image.convert('L')).split()[-2:]", ["on", "black"]),
    ("captioner.caption(images=[image, 'images/b.png'])", [CROSS, STARS]),
    ("captioner(Path('images').glob('*.png'))", [STARS]),
    ("captioner(image, max_new_tokens=3)", "a large pink"),
    ("captioner(image, num_beams=4)", CROSS),
    ("captioner(image, temperature=0.1, top_k=5)", CROSS),
    ("captioner(image, prompt='a large')", CROSS.removeprefix("a large ")),
    ("captioner(image, num_beams=2, num_return_sequences=2)[0]", CROSS),
    ("captioner(image, return_scores=True).text", CROSS),
    ("lora_engine.load_captioner(Path(folder), device=torch.device('cpu'))(image)", CROSS),
    ("len(lora_engine.inject(linear, ['0']).modules)", 1),
    ("captioner.tokenizer.decode(captioner.tokenizer.encode([CROSS]).ids)", CROSS),
    (
        "run = lora_engine.train(model=folder, data=rows, validation=rows[:2], max_steps=2, "
        "output_path='run'); run.history[-1]['loss'] < 0.1",
        True,
    ),
    ("run.captioner.base.caption('x.png')", CROSS),
    ("run.captioner(image) == lora_engine.load_captioner(adapter='run')(image)", True),
    ("lora_engine.save_adapter(run.captioner.model, 'saved'); Path('saved').is_dir()", True),
]

# What was typed, the error that it raises, and words of its message.
ANSWERED = [
    ("captioner.generate(image)", AttributeError, "use captioner.caption(image)"),
    ("captioner.to('cuda')", AttributeError, 'use load_captioner(..., device="cuda")'),
    ("captioner.half()", AttributeError, 'use load_captioner(..., precision="fp16")'),
    ("captioner.processor(image)", AttributeError, "use captioner.caption(image)"),
    ("captioner.set_adapter('run')", AttributeError, "use captioner.load_adapter(folder)"),
    ("captioner.unload()", AttributeError, "use captioner.unload_adapter()"),
    ("captioner.load_adapter('no_such')", ValueError, "no adapter at no_such: expected a run fol"),
    ("captioner.load_adapter(None)", ValueError, "the adapter is of the type NoneType; expected a"),
    ("captioner.load_adapter(folder)", ValueError, "not an adapter; give it with `load_captioner`"),
    ("captioner.save_pretrained('a')", AttributeError, "save_adapter(captioner.model, folder)"),
    ("captioner.print_trainable_parameters()", AttributeError, "use print(lora_engine.inject("),
    ("captioner.state_dict()", AttributeError, "use captioner.model, which has it"),
    ("captioner.model.generate(image)", AttributeError, "has no attribute 'generate'"),
    ("captioner.model.print_trainable_parameters()", AttributeError, "'print_trainable_parameters"),
    ("captioner(image=image)", TypeError, "argument 'image'; it is images here"),
    ("captioner(image, max_length=20)", TypeError, "'max_length'; it is max_new_tokens here"),
    ("captioner.caption(image, do_sample=True)", TypeError, "it is temperature=1 here"),
    ("captioner.caption(image, min_length=5)", TypeError, "it is min_new_tokens here"),
    ("captioner.caption(image, num_bems=5)", TypeError, "'num_bems'; did you mean num_beams?"),
    ("captioner(image, 'a photo of')", TypeError, "takes 2 positional arguments but 3"),
    ("captioner(image, top_p=0.9)", ValueError, "top_p is for sampling: give temperature 1, too"),
    ("captioner(image, num_beams='4')", ValueError, "num_beams is '4'; it must be a whole number"),
    ("captioner(image, num_return_sequences=3)", ValueError, "give num_beams 3, or temperature 1"),
    ("captioner(image, prompt=['a', 'b'])", ValueError, "expected text, one for all images"),
    ("captioner(torch.rand(3, 64, 64))", ValueError, "type Tensor, expected a path"),
    ("captioner(np.zeros((3, 64, 64), 'uint8'))", ValueError, "array.transpose(1, 2, 0)"),
    ("captioner(np.random.rand(64, 64, 3))", ValueError, "expected uint8, 0 to 255: scale the"),
    ("captioner(open('x.png', 'rb'))", ValueError, "type BufferedReader, expected a path"),
    ("captioner({'image': image})", ValueError, "type dict, expected a path"),
    ("captioner(None)", ValueError, "the image is None, expected a path"),
    ("captioner('https://a.org/x.jpg')", ValueError, "is a web address: download the file first"),
    ("captioner(['x.png', 'y.png'])", ValueError, "images[1]: y.png: no such file"),
    ("captioner('images')", ValueError, "images: is a folder, expected an image file"),
    ("lora_engine.load_captioner('no/such')", ValueError, "run `hf download no/such --local-dir"),
    ("lora_engine.load_captioner('blip-base')", ValueError, "no model folder at 'blip-base'"),
    ("lora_engine.load_captioner(captioner.model)", ValueError, "type BlipCaptioner, expected the"),
    ("lora_engine.load_captioner(folder, adapter='runs/x')", ValueError, "no folder 'runs/x' here"),
    ("lora_engine.load_captioner(folder, adapter='images')", ValueError, "expected a run folder"),
    ("lora_engine.load_captioner(folder, device='mps')", ValueError, "is not supported; this mach"),
    ("lora_engine.load_captioner(folder, device=9)", ValueError, "`device` 9 is unknown"),
    ("lora_engine.load_captioner(folder, precision='float16')", ValueError, "expected auto, fp32"),
    ("lora_engine.load_captioner(folder, family='git')", ValueError, "expected blip, vision-encod"),
    ("lora_engine.load_captioner(folder, torch_dtype='auto')", TypeError, "it is precision here"),
    ("lora_engine.load_captioner(model=folder)", TypeError, "it is name_or_path here"),
    ("lora_engine.load_captioner(folder, load_in_8bit=True)", TypeError, "not quantized; `encode"),
    ("lora_engine.load_captioner('.')", ValueError, "no config.json; `name_or_path` takes a"),
    ("lora_engine.load_model_and_preprocess('blip')", AttributeError, "lora_engine.load_captioner"),
    ("lora_engine.pipeline('image-to-text')", AttributeError, "it is lora_engine.load_captioner"),
    ("lora_engine.PeftModel.from_pretrained(model, 'run')", AttributeError, "load_captioner here"),
    ("lora_engine.LoraConfig(r=8)", AttributeError, "it is lora_engine.inject here"),
    ("lora_engine.get_peft_model(model, None)", AttributeError, "it is lora_engine.inject here"),
    ("lora_engine.Trainer(model=model)", AttributeError, "it is lora_engine.train here"),
    ("lora_engine.TrainingArguments('out')", AttributeError, "lora_engine.TrainingConfig here"),
    (
        "lora_engine.inject(model, ['q_proj'])", ValueError,
        "here use the group attention (dense, key, query, value); groups: attention, feed_forward",
    ),
    ("lora_engine.inject(model, ['up_proj'])", ValueError, "the group feed_forward (dense)"),
    ("lora_engine.inject(captioner, ['query'])", AttributeError, "use captioner.model, which"),
    ("lora_engine.inject(model, 'all-linear')", ValueError, "give all groups; groups: atten"),
    ("lora_engine.inject(model, ['query'], r=8)", TypeError, "'r'; it is rank here"),
    ("lora_engine.merge(captioner)", AttributeError, "use captioner.model, which has it"),
    ("lora_engine.save_adapter(captioner, 'a')", AttributeError, "use captioner.model, which"),
    ("lora_engine.save_adapter(model, 'a')", ValueError, "no LoRA layers to save; call inject()"),
    ("lora_engine.train(dataset=rows)", TypeError, "'dataset'; it is data here"),
    ("lora_engine.train(model, rows)", TypeError, "positional arguments but 2 were given"),
    ("lora_engine.train(model, data=rows)", ValueError, "a captioner as model="),
    ("lora_engine.train(rows)", ValueError, "give pairs as data="),
    ("lora_engine.train(model=captioner, data=rows)", ValueError, "such as captioner.name"),
    ("lora_engine.train(data=rows, learning_rate=1e-4)", TypeError, "'learning_rate'; it is lr he"),
    ("lora_engine.train(data=rows, num_train_epochs=3)", TypeError, "it is epochs here"),
    ("lora_engine.train(data=rows, output_dir='out')", TypeError, "it is output_path here"),
    ("lora_engine.train(data=rows, r=8)", TypeError, "'r'; it is lora_rank here"),
    ("lora_engine.train(data=rows, per_device_train_batch_size=8)", TypeError, "it is batch_size"),
    ("lora_engine.train(data=rows, eval_dataset=rows)", TypeError, "it is validation here"),
    ("lora_engine.train(data=rows, bf16=True)", TypeError, "it is precision='bf16' here"),
    (
        "lora_engine.train(data=rows, gradient_accumulation_steps=2)", TypeError,
        "it is grad_accum_steps here",
    ),
    ("lora_engine.train(data=rows, layers_to_transform=[0])", TypeError, "it is lora_layers here"),
    ("lora_engine.train(data=rows, train_data_path='t.json')", TypeError, "it is data here"),
    ("lora_engine.train(data=rows, peft_config=None)", TypeError, "such as `lora_rank` and"),
    ("lora_engine.train(data=rows, pissa=True)", TypeError, "init_lora_weights='pissa' here"),
    ("lora_engine.train(data=rows, rank_pattern=['attention'])", ValueError, "`rank_pattern` is"),
    ("lora_engine.train(data=rows, patience='3')", ValueError, "patience is '3', expected int"),
    ("lora_engine.train(data=rows, adam_beta1=np.nan)", ValueError, "`adam_beta1` is nan; it must"),
    ("lora_engine.train(data=rows, ema_decay=0)", ValueError, "`ema_decay` is 0; it must be above"),
    ("lora_engine.TrainingConfig(learning_rate=1e-4)", TypeError, "'learning_rate'; it is lr here"),
    ("lora_engine.train(data=rows, lora_rnk=8)", TypeError, "did you mean lora_rank?"),
    ("lora_engine.train(data=rows, lr_scheduler_type='cosine')", TypeError, "it is lr_schedule he"),
    ("lora_engine.train(data=rows, sharpness=1)", TypeError, "docstring describes all of them"),
    ("lora_engine.train(data=rows, lr=-1.0)", ValueError, "`lr` is -1.0; it must be above 0"),
    ("lora_engine.train(data=[('x.png', 'a', 'b')])", ValueError, "row 1: found 3 values, expe"),
    ("lora_engine.train(data=[('a.png', 'a')])", ValueError, "a.png (row 1). Image paths are abs"),
    ("lora_engine.train(data=rows[:1])", ValueError, "pass validation data with `validation`"),
    ("lora_engine.train(data=rows, epochs=0.5)", ValueError, "epochs is 0.5, expected int"),
    ("lora_engine.train(data=rows, precision='float16')", ValueError, "expected Literal['auto'"),
    ("lora_engine.train(data=rows, lr_schedule='cos')", ValueError, "'linear', 'cosine', 'const"),
    ("lora_engine.train(data=[('x.png',)])", ValueError, 'expected (image, caption) or {"image":'),
    ("lora_engine.train(data=[{'image': 'x.png'}])", ValueError, 'no "text" among its keys'),
    ("lora_engine.train(data=[(torch.rand(3, 8, 8), 'a')])", ValueError, "type Tensor, expected a"),
    ("lora_engine.train(data={'train': rows})", ValueError, "expected a list of (image, caption)"),
    ("lora_engine.train(data=iter(rows))", ValueError, "expected a list of (image, caption)"),
    ("lora_engine.train(data=['x.png'])", ValueError, "is an image; give an annotation file"),
    ("lora_engine.train()", ValueError, "no training data: give data="),
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names that the snippets use; the working folder has x.png and images/b.png."""
    some = list(islice(scenes("validation", seed=1), 6))
    rows = [{"image": draw(scene), "text": plain_caption(scene)} for scene in some]
    folder = captioner_folder("blip")
    captioner = lora_engine.load_captioner(folder, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        rows[0]["image"].save("x.png")
        Path("images").mkdir()
        rows[1]["image"].save("images/b.png")
        yield {
            "lora_engine": lora_engine, "np": np, "torch": torch, "Path": Path, "CROSS": CROSS,
            "folder": folder, "captioner": captioner, "model": captioner.model, "rows": rows,
            "image": rows[0]["image"], "linear": torch.nn.Sequential(torch.nn.Linear(2, 2)),
        }


def typed(snippet: str, names: dict):
    before, _, last = snippet.rpartition("; ")
    exec(before, names)
    return eval(last, names)


def test_what_users_of_other_libraries_type_works(names):
    given = {snippet: typed(snippet, names) for snippet, _ in WORKS}
    assert given == dict(WORKS)


@pytest.mark.parametrize("snippet, kind, words", ANSWERED, ids=[row[0] for row in ANSWERED])
def test_what_does_not_work_is_answered_in_one_line(names, snippet, kind, words):
    before = sorted(Path().rglob("*"))
    with pytest.raises(kind) as raised:
        typed(snippet, names)
    error = raised.value
    assert words in str(error) and "\n" not in str(error)
    # Nothing from inside: neither the frame that raises, nor an error before this one.
    raising = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    assert raising[-1] == "<string>" or "lora_engine" in raising or raising[-1] == "module.py"
    assert error.__cause__ is None and (error.__suppress_context__ or error.__context__ is None)
    assert sorted(Path().rglob("*")) == before


def test_our_names_are_never_taken_for_those_of_other_libraries():
    ours = set(lora_engine.__all__)
    others = " ".join(other_names.PYTHON.values()).split()
    assert ours >= other_names.PYTHON.keys() and not ours & set(others)
    assert len(set(others)) == len(others)


def test_keywords_of_other_libraries_are_never_ours_and_name_one_that_exists():
    functions = [
        lora_engine.train, lora_engine.load_captioner, lora_engine.inject,
        lora_engine.ImageCaptioner.caption,
    ]
    ours = {name for function in functions for name in inspect.signature(function).parameters}
    ours.remove("settings")  # of `train`: the fields of TrainingConfig
    assert {line.split()[0] for line in other_names.KEYWORDS} <= ours
    assert not ours & set(" ".join(other_names.KEYWORDS.values()).split())


# --- messages ---------------------------------------------------------------------------------

# Flags in messages that are no setting of `train`: of commands in them, and of other programs.
OF_COMMANDS = {
    "adapter", "data", "force", "from", "ipc", "json", "local", "lrs", "minutes", "nproc_per_node",
    "out", "python", "ranks", "shm", "sort", "spec", "url_field", "variants",
}


def flags_in_messages() -> set[str]:
    """The names of all flags in texts of the package, apart from its commands and docstrings."""
    package = Path(lora_engine.__file__).parent
    others = {"commands", "demo", "cli.py", "__main__.py", "other_names.py"}
    found = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in others:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""  # a docstring; its node comes later
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"(?<![\w-])--([a-z]\w*)", node.value))
    return found


def test_errors_name_keywords_in_place_of_every_flag():
    names = flags_in_messages() - OF_COMMANDS
    assert len(names) > 30

    @known_keywords(lora_engine.TrainingConfig, val_data_path="validation")
    def fail(message: str, lr: float = 1.0, resume: bool = False) -> None:
        error = ValueError(message)
        error.add_note(message)
        raise error

    def told(message: str) -> str:
        with pytest.raises(ValueError) as raised:
            fail(message)
        assert raised.value.__notes__ == [str(raised.value)]
        return str(raised.value)

    left = re.findall("--[a-z_]+", told(" ".join(f"--{name}" for name in names)))
    assert left == []
    shown = {
        "--lr is -1": "`lr` is -1",
        "(--resume)": "(`resume=True`)",
        "--resume=a/b, or": "`resume=a/b`, or",
        "pass --val_data_path": "pass `validation`",
        "--max_bad_share 0.1;": "`max_bad_share` 0.1;",
        "rerun with --no_cuda_graphs": "rerun with `cuda_graphs=False`",
        "run `doctor --device cuda`": "run `doctor --device cuda`",
        "--shm-size, ----lr, a--lr": "--shm-size, ----lr, a--lr",
    }
    assert {message: told(message) for message in shown} == shown


def test_warnings_name_keywords_in_place_of_flags(capsys):
    @known_keywords()
    def warn(lr: float) -> None:
        with logging_to(ConsoleHandler()):
            logging.getLogger("lora_engine").warning("lower --lr")

    warn(1.0)
    with logging_to(ConsoleHandler()):
        logging.getLogger("lora_engine").warning("lower --lr")
    assert capsys.readouterr().err == "warning: lower `lr`\nwarning: lower --lr\n"


def test_decorated_functions_keep_their_signature():
    for function in (lora_engine.train, lora_engine.load_captioner):
        plain = function.__wrapped__
        assert inspect.signature(function) == inspect.signature(plain)
        assert (function.__name__, function.__doc__) == (plain.__name__, plain.__doc__)
