"""Python that users of other libraries type: it works, or one line says what to type."""

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
    ("captioner.save_pretrained('a')", AttributeError, "save_adapter(captioner.model, folder)"),
    ("captioner.print_trainable_parameters()", AttributeError, "use print(lora_engine.inject("),
    ("captioner.state_dict()", AttributeError, "use captioner.model, which has it"),
    ("captioner.model.generate(image)", AttributeError, "has no attribute 'generate'"),
    ("captioner.model.print_trainable_parameters()", AttributeError, "'print_trainable_parameters"),
    ("captioner(image=image)", TypeError, "unexpected keyword argument 'image'"),
    ("captioner(image, max_length=20)", TypeError, "unexpected keyword argument 'max_length'"),
    ("captioner(image, do_sample=True)", TypeError, "unexpected keyword argument 'do_sample'"),
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
    ("captioner(None)", ValueError, "the image is null, expected a path"),
    ("captioner('https://a.org/x.jpg')", ValueError, "is a web address: download the file first"),
    ("captioner(['x.png', 'y.png'])", ValueError, "images[1]: y.png: no such file"),
    ("captioner('images')", ValueError, "images: is a folder, expected an image file"),
    ("lora_engine.load_captioner('no/such')", ValueError, "run `hf download no/such --local-dir"),
    ("lora_engine.load_captioner('blip-base')", ValueError, "no model folder at 'blip-base'"),
    ("lora_engine.load_captioner(captioner.model)", ValueError, "type BlipCaptioner, expected the"),
    ("lora_engine.load_captioner(folder, adapter='runs/x')", ValueError, "no folder 'runs/x' here"),
    ("lora_engine.load_captioner(folder, adapter='images')", ValueError, "expected a run folder"),
    ("lora_engine.load_captioner(folder, device='mps')", ValueError, "is not supported; this mach"),
    ("lora_engine.load_captioner(folder, device=9)", ValueError, "--device 9"),
    ("lora_engine.load_captioner(folder, precision='float16')", ValueError, "expected auto, fp32"),
    ("lora_engine.load_captioner(folder, family='git')", ValueError, "expected blip, vision-encod"),
    ("lora_engine.load_captioner(folder, torch_dtype='auto')", TypeError, "'torch_dtype'"),
    ("lora_engine.load_model_and_preprocess('blip')", AttributeError, "lora_engine.load_captioner"),
    ("lora_engine.pipeline('image-to-text')", AttributeError, "it is lora_engine.load_captioner"),
    ("lora_engine.PeftModel.from_pretrained(model, 'run')", AttributeError, "load_captioner here"),
    ("lora_engine.LoraConfig(r=8)", AttributeError, "it is lora_engine.inject here"),
    ("lora_engine.get_peft_model(model, None)", AttributeError, "it is lora_engine.inject here"),
    ("lora_engine.Trainer(model=model)", AttributeError, "it is lora_engine.train here"),
    ("lora_engine.TrainingArguments('out')", AttributeError, "lora_engine.TrainingConfig here"),
    ("lora_engine.inject(model, ['q_proj'])", ValueError, "dense, key, query, value; groups: att"),
    ("lora_engine.inject(captioner, ['query'])", AttributeError, "use captioner.model, which"),
    ("lora_engine.inject(model, ['query'], r=8)", TypeError, "unexpected keyword argument 'r'"),
    ("lora_engine.merge(captioner)", AttributeError, "use captioner.model, which has it"),
    ("lora_engine.save_adapter(captioner, 'a')", AttributeError, "use captioner.model, which"),
    ("lora_engine.save_adapter(model, 'a')", ValueError, "no LoRA layers to save; call inject()"),
    ("lora_engine.train(dataset=rows)", TypeError, "unexpected keyword argument 'dataset'"),
    ("lora_engine.train(model, rows)", TypeError, "positional arguments but 2 were given"),
    ("lora_engine.train(model, data=rows)", ValueError, "a captioner as model="),
    ("lora_engine.train(rows)", ValueError, "give pairs as data="),
    ("lora_engine.train(model=captioner, data=rows)", ValueError, "such as captioner.name"),
    ("lora_engine.train(data=rows, learning_rate=1e-4)", TypeError, "argument 'learning_rate'"),
    ("lora_engine.train(data=rows, num_train_epochs=3)", TypeError, "argument 'num_train_epochs'"),
    ("lora_engine.train(data=rows, output_dir='out')", TypeError, "argument 'output_dir'"),
    ("lora_engine.train(data=rows, epochs=0.5)", ValueError, "epochs is 0.5, expected int"),
    ("lora_engine.train(data=rows, precision='float16')", ValueError, "expected Literal['auto'"),
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
