"""Adapters that PEFT makes and that change more than LoRA layers can: caption, merge, refuse."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import hugging_face, hugging_face_logits, random_pixels
from peft import LoraConfig, PeftModel, get_peft_model
from pictures import write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

import lora_engine
from lora_engine.captioning import merging
from lora_engine.captioning.adapted_captioner import with_adapter
from lora_engine.captioning.captioner import Caption, Captioned, side_by_side
from lora_engine.captioning.generation import generate
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.commands.app import AppConfig, _load
from lora_engine.commands.caption import caption
from lora_engine.commands.merge import merge
from lora_engine.data.pixels import normalize, to_pixels
from lora_engine.lora.adapter import AdapterError, load_adapter, naming_base, read_adapter
from lora_engine.models.pretrained import Captioner, load_captioner

# PEFT still looks up an old name in transformers, and says that it saves or adapts tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

NAMES = ["query", "c_attn"]  # attention of the two decoders
# Settings of PEFT's, and what is said of an adapter that shall be trained further.
KINDS: dict[str, tuple[dict, str]] = {
    "decoder": ({"target_modules": NAMES}, "nothing"),
    "all_linear": (
        {"target_modules": "all-linear", "use_rslora": True, "exclude_modules": r".*\.0\.mlp.*",
         "rank_pattern": {"fc2": 6}, "alpha_pattern": {r"1\.mlp\.fc2|c_attn": 3}},
        "changes the vision encoder, which is frozen here",
    ),
    "dora": (
        {"target_modules": [*NAMES, "fc1", "patch_embedding", "projection", "wte", "dense",
                            "word_embeddings"], "use_dora": True},
        "changes the vision encoder",
    ),
    "dora_decoder": ({"target_modules": NAMES, "use_dora": True}, "nothing"),
    "bias_all": ({"target_modules": NAMES, "bias": "all"}, "changes the vision encoder"),
    "bias_lora": (
        {"target_modules": NAMES, "bias": "lora_only"}, "replaces tensors of the base (bias"
    ),
    "lora_bias": (
        {"target_modules": NAMES, "lora_bias": True}, "has LoRA layers with a bias"
    ),
    "modules": (
        {"target_modules": NAMES, "modules_to_save": ["lm_head", "ln_f", "cls"]},
        "replaces tensors of the base (bias or modules_to_save)",
    ),
    "embeddings": (
        {"target_modules": [*NAMES, "wte", "word_embeddings", "wpe"]}, "is frozen here"
    ),
    "layers": (  # a number of layers counts in encoder and decoder
        {"target_modules": [*NAMES, "fc1"], "layers_to_transform": 1},
        "changes the vision encoder",
    ),
}
TOKENS = torch.randint(20, 200, (2, 6), generator=torch.Generator().manual_seed(4))
PIXELS = random_pixels(2)


@pytest.fixture(autouse=True, scope="module")
def _short_captions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "generate", functools.partial(generate, max_new_tokens=8))
        yield


def make(base: Path, folder: Path, settings: dict, **saving) -> torch.Tensor:
    """Save an adapter of PEFT's whose every tensor is random -> PEFT's logits with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            hugging_face(base), LoraConfig(r=4, lora_alpha=10, lora_dropout=0.0, **settings)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            logits = hugging_face_logits(model.eval(), PIXELS, TOKENS)
        model.save_pretrained(str(folder), **saving)
    return logits


@pytest.fixture(scope="module")
def made(captioner_folder, tmp_path_factory):
    """An adapter's folder and PEFT's logits, by its kind; each is made once for each family."""
    @functools.cache
    def by_kind(kind: str) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, make(captioner_folder, folder, KINDS[kind][0])

    return by_kind


@torch.no_grad()
def logits(captioner: Captioner) -> torch.Tensor:
    model = captioner.model
    return model.head(model.decode(TOKENS, model.encode(PIXELS)))


def adapted(base: Path, folder: Path) -> Captioner:
    return with_adapter(load_captioner(base), read_adapter(folder))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- what PEFT computes ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, (_, says) in KINDS.items() if says != "nothing"])
def test_captions_are_pefts_and_training_on_is_refused_in_a_sentence(captioner_folder, made, kind):
    folder, theirs = made(kind)
    base = load_captioner(captioner_folder)
    before = logits(base)
    ours = logits(with_adapter(base, read_adapter(folder)))
    assert_equal(ours, theirs)
    assert (ours - before).abs().max() > 0.01
    assert torch.equal(logits(base), before), "the base shares weights, but keeps its own"
    adapter = read_adapter(folder)
    with pytest.raises(AdapterError) as caught, naming_base(adapter, "a/copy"):
        load_adapter(base.model, adapter)
    message = str(caught.value)
    assert f"the adapter in {folder} " in message and KINDS[kind][1] in message
    assert f"merge --adapter {folder} --out MERGED), and train with --model MERGED" in message
    assert "\n" not in message
    assert torch.equal(logits(base), before)


def test_an_encoder_that_does_not_change_is_shared(captioner_folder, made):
    base = load_captioner(captioner_folder)
    weights = {id(parameter) for parameter in base.model.parameters()}
    for kind, is_shared in (("modules", True), ("bias_all", False)):
        model = with_adapter(base, read_adapter(made(kind)[0])).model
        assert (model.encoder is base.model.encoder) == is_shared
        assert any(id(parameter) in weights for parameter in model.encoder.parameters())


def test_a_bin_file_is_read(vit_gpt2_folder, tmp_path):
    theirs = make(vit_gpt2_folder, tmp_path, KINDS["layers"][0], safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert_equal(logits(adapted(vit_gpt2_folder, tmp_path)), theirs)


def test_module_names_of_earlier_transformers_are_known(vit_gpt2_folder, tmp_path):
    """Adapters name a ViT's modules as in the version of transformers that made them."""
    theirs = make(vit_gpt2_folder, tmp_path, {"target_modules": ["q_proj", "fc2", "c_attn"]})
    earlier = {"encoder.layers.": "encoder.encoder.layer.", "mlp.fc2": "output.dense",
               "attention.q_proj": "attention.attention.query"}

    def renamed(text: str) -> str:
        for later, name in earlier.items():
            text = text.replace(later, name)
        return text

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in tensors if renamed(key) != key}
    tensors = {renamed(key): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    configure(tmp_path, target_modules=r".*(c_attn|attention\.query|layer\.\d\.output\.dense)")
    assert_equal(logits(adapted(vit_gpt2_folder, tmp_path)), theirs)


def test_a_pooler_that_captioning_does_not_use_is_ignored(vit_gpt2_folder, tmp_path):
    theirs = make(vit_gpt2_folder, tmp_path, {"target_modules": ["c_attn", "pooler.dense"]})
    assert any("pooler" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert_equal(logits(adapted(vit_gpt2_folder, tmp_path)), theirs)


# --- merge, and captions side by side -------------------------------------------------------


@pytest.mark.parametrize("kind", ["all_linear", "modules"])
def test_merged_folders_are_plain_models_with_pefts_logits_and_our_captions(
    captioner_folder, made, tmp_path, kind, capsys
):
    folder, theirs = made(kind)
    merge(["--adapter", str(folder), "--model", str(captioner_folder),
           "--out", str(tmp_path / "merged")])
    assert "greedy captions identical on 4 of 4 images" in capsys.readouterr().out
    plain = hugging_face(tmp_path / "merged")
    with torch.no_grad():
        assert_equal(hugging_face_logits(plain, PIXELS, TOKENS), theirs)
    captioner = adapted(captioner_folder, folder)
    tokenizer = captioner.tokenizer
    ours = generate(
        captioner.model, captioner.model.encode(PIXELS), prompt_ids=tokenizer.prompt_ids(),
        end_id=tokenizer.end_id, pad_id=tokenizer.pad_id, max_new_tokens=8,
    )
    assert torch.equal(ours, plain.generate(
        pixel_values=PIXELS, do_sample=False, num_beams=1, max_new_tokens=8
    ))
    load_adapter(load_captioner(tmp_path / "merged").model, made("decoder")[0])  # to train on
    # Older versions of transformers tie head and embedding by the configuration alone.
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    part = config["text_config" if captioner.family == "blip" else "decoder"]
    is_apart = captioner.model.vocabulary.weight is not captioner.model.get_parameter(
        captioner.model.tied_head[1]
    )
    assert is_apart == (kind == "modules" or captioner.family == "blip")
    assert part.get("tie_word_embeddings", True) != is_apart


def test_groups_of_captioners_are_put_in_order_for_each_setting():
    """Captioners 0 and 2 share an encoder; the second setting has two captions of an image."""
    settings = [GenerationSettings(), GenerationSettings(num_beams=2, num_return_sequences=2)]
    texts = "0a 2a 0b 0c 2b 2c", "1a 1b 1c"
    results = [
        Captioned("dog.jpg", tuple(Caption(text, True) for text in of_group.split()))
        for of_group in texts
    ]
    merged = side_by_side(results, [[0, 2], [1]], settings)
    found = [caption.text for caption in merged.captions]
    assert found == "0a 1a 2a 0b 0c 1b 1c 2b 2c".split()


@pytest.mark.parametrize("kind", ["decoder", "all_linear"])
def test_a_base_with_names_of_wrapped_modules_is_merged(captioner_folder, made, tmp_path, kind):
    folder, theirs = made(kind)
    base = shutil.copytree(captioner_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
    )
    merge(["--adapter", str(folder), "--model", str(base), "--out", str(tmp_path / "merged")])
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() >= tensors.keys()
    with torch.no_grad():
        plain = hugging_face(tmp_path / "merged")
        assert_equal(hugging_face_logits(plain, PIXELS, TOKENS), theirs)


ON_ENCODER = {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"], "alpha_pattern": {".*": 400}}


def test_an_adapter_of_the_encoder_captions_in_python_beside_its_base(vit_gpt2_folder, tmp_path):
    make(vit_gpt2_folder, tmp_path / "encoder", ON_ENCODER)
    captioner = lora_engine.load_captioner(vit_gpt2_folder, adapter=tmp_path / "encoder")
    images = list(torch.randint(0, 256, (3, 70, 50, 3), dtype=torch.uint8).numpy())
    pixels = torch.from_numpy(np.stack([
        to_pixels(Image.fromarray(image), captioner.pixels) for image in images
    ]))
    plain = hugging_face(vit_gpt2_folder)

    def theirs(model) -> list[str]:
        tokens = model.generate(
            pixel_values=normalize(pixels, captioner.pixels), do_sample=False, num_beams=1,
            max_new_tokens=6,
        )
        return [captioner.tokenizer.decode(row) for row in tokens[:, 1:].tolist()]

    expected = theirs(plain), theirs(PeftModel.from_pretrained(plain, str(tmp_path / "encoder")))
    for _ in range(2):  # one does not change the other
        ours = captioner.base.caption(images, max_new_tokens=6), captioner.caption(
            images, max_new_tokens=6
        )
        assert ours == expected and ours[0] != ours[1]


def test_adapters_side_by_side_do_not_share_features(vit_gpt2_folder, foreign, tmp_path, capsys):
    """The base's encoder, an adapted one, and the cache on disk of both; the app has no cache."""
    write_pictures(tmp_path / "photos", num_images=3)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    make(vit_gpt2_folder, tmp_path / "encoder", ON_ENCODER)
    folders = [foreign("decoder"), tmp_path / "encoder", foreign("modules")]

    def captions(*adapters: Path) -> list[list[str]]:
        out = tmp_path / "captions.jsonl"
        status = caption([
            str(tmp_path / "photos"), "--model", str(vit_gpt2_folder), "--out",
            str(out), "--overwrite", "--cache", "disk", "--max_new_tokens", "6",
            *(word for adapter in adapters for word in ("--adapter", str(adapter))),
        ])
        assert status == 1 and "broken.jpg" in capsys.readouterr().err
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return [
            [line["caption"] for line in lines if line.get("adapter", adapter) == adapter]
            for adapter in map(str, adapters or [None])
        ]

    together = captions(*folders)
    assert together == [captions(folder)[0] for folder in folders]
    assert len({tuple(column) for column in [*together, *captions()]}) == 4
    assert all(len(column) == 3 for column in together)
    config = AppConfig(adapter=tuple(map(str, folders)), model=str(vit_gpt2_folder), device="cpu")
    images = sorted(tmp_path.glob("photos/images/*.png"))
    in_app = [captioner.caption(images, max_new_tokens=6) for captioner in _load(config).values()]
    assert in_app == [*captions(), *together]


# --- refusals -------------------------------------------------------------------------------


def configure(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(key: str):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(key)}


def with_tensor(key: str, tensor: torch.Tensor):
    """Puts a tensor in place of the first whose name ends with `key`, or adds it."""
    def change(tensors):
        found = [name for name in tensors if name.endswith(key)]
        return tensors | {found[0] if found else f"base_model.model.{key}": tensor}

    return change


@pytest.mark.parametrize("kind, change, message", [
    ("modules", without("ln_f.weight"), "decoder.transformer.ln_f.weight is missing"),
    ("modules", with_tensor("lm_head.weight", torch.zeros(3, 64)),
     "decoder.lm_head.weight is (3, 64), expected (401, 64)"),
    ("modules", with_tensor("lm_head.weight", torch.zeros(401, 64).int()),
     "decoder.lm_head.weight is torch.int32, expected floating-point numbers"),
    ("modules", with_tensor("decoder.surprise.weight", torch.zeros(3)),
     "the base model has no tensor decoder.surprise.weight"),
    ("modules", with_tensor("decoder.transformer.h.0.ln_1.weight", torch.zeros(64)),
     "decoder.transformer.h.0.ln_1.weight is left over"),
    ("modules", with_tensor("ln_f.weight", torch.full((64,), torch.nan)), "holds NaN"),
    ("bias_lora", without("h.0.attn.c_attn.base_layer.bias"), "h.0.attn.c_attn.bias is missing"),
    ("dora_decoder", without("h.0.attn.c_attn.lora_magnitude_vector"),
     "has no decoder.transformer.h.0.attn.c_attn.lora_magnitude_vector, although use_dora is true"),
    ("dora_decoder", with_tensor("lora_magnitude_vector", torch.ones(3)),
     "lora_magnitude_vector has 3 values, expected 192"),
    ("layers", without("fc1.lora_A.weight"), "has encoder.layers.1.mlp.fc1.lora_B but not "),
    ("layers", lambda tensors: {n: t for n, t in tensors.items() if "fc1" not in n}
     | {n.replace("fc1", "fc3"): t for n, t in tensors.items() if "fc1" in n},
     "the base model has no module encoder.layers.1.mlp.fc3"),
    ("layers", with_tensor("fc1.lora_A.weight", torch.zeros(4, 65)),
     "encoder.layers.1.mlp.fc1.lora_A is (4, 65), expected (4, 64)"),
    ("embeddings", without("wte.lora_embedding_B"), "wte.lora_embedding_A but not "),
    ("embeddings", lambda tensors: {n: t for n, t in tensors.items() if ".wpe." not in n},
     "decoder.transformer.wpe is missing"),
])
def test_tensors_that_do_not_fit_are_named_in_one_line(
    vit_gpt2_folder, foreign, tmp_path, kind, change, message
):
    folder = shutil.copytree(foreign(kind), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    assert_refused(vit_gpt2_folder, folder, message)


@pytest.fixture(scope="module")
def foreign(vit_gpt2_folder, tmp_path_factory):
    """The folder of an adapter for ViT+GPT2, by its kind."""
    @functools.cache
    def by_kind(kind: str) -> Path:
        make(vit_gpt2_folder, folder := tmp_path_factory.mktemp(kind), KINDS[kind][0])
        return folder

    return by_kind


def assert_refused(base: Path, folder: Path, message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        adapted(base, folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_cannot_be_used_is_named_with_its_file(vit_gpt2_folder, foreign, tmp_path):
    folder = shutil.copytree(foreign("layers"), tmp_path / "adapter")
    configure(folder, rank_pattern={"((": 3})
    assert_refused(vit_gpt2_folder, folder, "adapter_config.json: '((' is not a regular expression")


class _RunsCode:
    def __reduce__(self):
        return (pytest.fail, ("code from an adapter was run",))


@pytest.mark.parametrize("content, message", [
    ({"base_model.model.x.lora_A.weight": _RunsCode()}, "code, which is never run"),
    ([torch.zeros(2)], "it holds more than named tensors"),
    ({"surprise": torch.zeros(2, 2)}, "surprise is not a LoRA matrix"),
    (None, "has 1,099,511,627,776 bytes"),
], ids=["code", "list", "key", "huge"])
def test_a_bin_file_of_anything_else_is_refused(
    vit_gpt2_folder, foreign, tmp_path, content, message
):
    folder = shutil.copytree(foreign("layers"), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    if content is None:
        with open(folder / "adapter_model.bin", "wb") as file:
            file.truncate(2**40)  # sparse
    assert_refused(vit_gpt2_folder, folder, message)


def test_peft_itself_agrees_on_a_loaded_adapter(vit_gpt2_folder, foreign):
    """The oracle of these tests is the model that made the adapter; one that loads it is equal."""
    folder = foreign("modules")
    loaded = PeftModel.from_pretrained(hugging_face(vit_gpt2_folder), str(folder)).eval()
    with torch.no_grad():
        theirs = hugging_face_logits(loaded, PIXELS, TOKENS)
    assert_equal(logits(adapted(vit_gpt2_folder, folder)), theirs)
