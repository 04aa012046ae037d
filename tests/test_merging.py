"""The merged export: transformers' plain classes load it, and failures leave nothing behind."""

import functools
import json
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import hugging_face, hugging_face_logits, write_one, write_shards
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lora_engine.captioning import merging
from lora_engine.captioning.generation import generate
from lora_engine.captioning.merging import MergeError, Parity, compare, export_merged
from lora_engine.data.pixels import to_pixels
from lora_engine.demo.scenes import draw, scene_at
from lora_engine.features.encoder import encode_pixels
from lora_engine.lora.adapter import WEIGHTS_FILE, load_adapter, save_adapter
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.lora.layer import LoRALinear
from lora_engine.models.pretrained import Captioner, load_captioner

# PEFT still asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IMAGES = [draw(scene_at(index, seed=1)) for index in range(6)]


@pytest.fixture(autouse=True, scope="module")
def _short_captions():
    """The captions by which an export is compared never end: 12 tokens in place of 30."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "generate", functools.partial(generate, max_new_tokens=12))
        yield


def write_adapter(base: Path, folder: Path, *, std: float = 0.2) -> Path:
    """An adapter of two ranks and scalings that changes the captions."""
    captioner = load_captioner(base)
    inject(
        captioner.model, ["attention", "feed_forward"], rank=4, alpha=8, dropout=0.3,
        rank_pattern={r".*\.1\..*(query|c_attn)": 6},
    )
    torch.manual_seed(3)
    for name, matrix in lora_parameters(captioner.model).items():
        torch.nn.init.normal_(matrix, std=std)
    save_adapter(captioner.model, folder, base_model=str(base))
    return folder


@pytest.fixture(scope="module")
def adapter(captioner_folder, tmp_path_factory) -> Path:
    return write_adapter(captioner_folder, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def base(captioner_folder, tmp_path) -> Path:
    """A copy of each family's checkpoint, which tests may change."""
    return shutil.copytree(captioner_folder, tmp_path / "base")


def load(base: Path, adapter: Path) -> Captioner:
    captioner = load_captioner(base)
    load_adapter(captioner.model, adapter)
    return captioner


def pixels(captioner: Captioner, images=IMAGES) -> np.ndarray:
    return np.stack([to_pixels(image, captioner.pixels) for image in images])


def export(base: Path, adapter: Path, out: Path, **settings):
    captioner = load(base, adapter)
    return export_merged(captioner, out, pixels=pixels(captioner), **settings)


def captions(captioner: Captioner, prompt: str = "") -> torch.Tensor:
    """Token ids of our greedy captions of IMAGES, adapters not merged."""
    model, tokenizer = captioner.model.eval(), captioner.tokenizer
    features = encode_pixels(model, torch.from_numpy(pixels(captioner)), captioner.pixels)
    return generate(
        model, features, prompt_ids=tokenizer.prompt_ids(prompt), end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id, max_new_tokens=12,
    )


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's safetensors or .bin files, as stored."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in folder.glob("*.bin"):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def merged_by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W + scaling * B A in fp32, rounded, of every adapted tensor, from the two folders alone."""
    tensors, matrices = stored(base), load_file(adapter / WEIGHTS_FILE)
    config = json.loads((adapter / "adapter_config.json").read_text())
    is_conv1d = "GPT2" in (base / "config.json").read_text()
    merged = {}
    for name in matrices:
        if not name.endswith("lora_A.weight"):
            continue
        A, B = matrices[name], matrices[name.replace("lora_A", "lora_B")]
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next(
            (alpha for pattern, alpha in config["alpha_pattern"].items()
             if re.fullmatch(pattern, path)), config["lora_alpha"],
        )
        update = alpha / len(A) * (B @ A)
        weight = tensors[f"{path}.weight"]
        merged[f"{path}.weight"] = (
            weight.float() + (update.T if is_conv1d else update)
        ).to(weight.dtype)
    return merged


# --- what transformers makes of it ----------------------------------------------------------


def test_the_plain_class_captions_as_we_and_peft_do_with_the_adapter(
    captioner_folder, adapter, tmp_path
):
    parity = export(captioner_folder, adapter, tmp_path / "merged")
    captioner = load(captioner_folder, adapter)
    ours = captions(captioner)
    plain = hugging_face(tmp_path / "merged")
    assert type(plain).__module__.startswith("transformers.")
    pefts = PeftModel.from_pretrained(hugging_face(captioner_folder), str(adapter)).eval()
    processed = processor(tmp_path / "merged")(IMAGES)
    for model in (plain, pefts):
        theirs = model.generate(
            pixel_values=processed, do_sample=False, num_beams=1, max_new_tokens=12
        )
        assert torch.equal(theirs, ours)
    with torch.no_grad():
        torch.testing.assert_close(
            hugging_face_logits(plain, processed, ours),
            hugging_face_logits(pefts, processed, ours), rtol=1e-4, atol=1e-4,
        )
    # The test would be void if the adapter's captions were empty or all equal.
    assert not torch.equal(ours, captions(load_captioner(captioner_folder)))
    assert len({tuple(row) for row in ours.tolist()}) > 1
    assert parity.num_identical == parity.num_images == len(IMAGES)


def processor(folder: Path):
    """Images -> pixel values, by what transformers finds in the folder."""
    from transformers import AutoImageProcessor, BlipProcessor

    is_blip = "BlipFor" in (folder / "config.json").read_text()
    kind = BlipProcessor if is_blip else AutoImageProcessor
    loaded = kind.from_pretrained(folder)
    return lambda images: loaded(images=images, return_tensors="pt")["pixel_values"]


def test_tokenizer_and_preprocessor_are_the_bases(captioner_folder, adapter, tmp_path):
    from transformers import AutoTokenizer

    export(captioner_folder, adapter, tmp_path / "merged")
    text = "a red circle above two people"
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
           for folder in (captioner_folder, tmp_path / "merged")]
    assert ids[0] == ids[1] and len(ids[0]) > 3
    images = [Image.effect_noise((50, 90), 60).convert("RGB")]
    assert torch.equal(
        processor(captioner_folder)(images), processor(tmp_path / "merged")(images)
    )


# --- tensors and files ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype, write, suffix", [
    (torch.float32, write_one, "safetensors"), (torch.bfloat16, write_one, "safetensors"),
    (torch.float16, write_one, "bin"), (torch.bfloat16, write_shards, "safetensors"),
    (torch.float32, write_shards, "bin"), (torch.float16, write_shards, "bin"),
])
def test_adapted_tensors_are_merged_in_their_own_format_and_all_others_kept(
    base, tmp_path, write, suffix, dtype
):
    before = {name: tensor.to(dtype) for name, tensor in stored(base).items()}
    norms = [name for name in before if "norm" in name.lower() or ".ln_" in name]
    before |= {name: before[name].float() for name in norms}  # a checkpoint may mix formats
    (base / "model.safetensors").unlink()
    write(base, before, suffix)
    small = write_adapter(base, tmp_path / "small", std=0.05)
    export(base, small, tmp_path / "merged")
    after, expected = stored(tmp_path / "merged"), merged_by_hand(base, small)
    head, embedding = load_captioner(base).model.tied_head
    before.setdefault(head, before[embedding])
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) == (name not in expected), name
        assert torch.equal(tensor, expected.get(name, before[name])), name
    names = {path.name for path in (tmp_path / "merged").glob("*model*")}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = "model.safetensors.index.json"
    assert names == ({"model.safetensors"} if write is write_one else shards | {index})
    for path in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            if write is write_shards:
                weight_map = json.loads((path.parent / index).read_text())["weight_map"]
                assert set(file.keys()) == {k for k, v in weight_map.items() if v == path.name}
    theirs = hugging_face(tmp_path / "merged").state_dict()
    assert all(torch.equal(theirs[name].to(after[name].dtype), after[name]) for name in expected)


def test_a_tied_head_is_written_out(base, adapter, tmp_path, caplog):
    """Some versions of transformers draw a head at random that the files leave out."""
    head, embedding = load_captioner(base).model.tied_head
    tensors = {name: t for name, t in stored(base).items() if name != head}
    (base / "model.safetensors").unlink()
    write_shards(base, tensors, "safetensors")
    export(base, adapter, tmp_path / "merged")
    assert stored(tmp_path / "merged").keys() == tensors.keys() | {head}
    caplog.clear()
    kind = type(hugging_face(base))
    theirs, loading = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values()) and "newly initialized" not in caplog.text
    weights = theirs.state_dict()
    assert torch.equal(weights[head], tensors[embedding])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_head_under_both_names_loads_from_a_bin_file(base, adapter, tmp_path, kind):
    """torch.save keeps a tensor that has two names as one, safetensors refuses it."""
    head, embedding = load_captioner(base).model.tied_head
    tensors = stored(base)
    shared = tensors.get(embedding, tensors.get(head))
    tensors |= {embedding: shared, head: shared if kind == "tied" else shared + 0.1}
    (base / "model.safetensors").unlink()
    write_one(base, tensors, "bin")
    export(base, adapter, tmp_path / "merged")
    assert stored(tmp_path / "merged").keys() == tensors.keys()
    model = hugging_face(tmp_path / "merged")
    for name in (head, embedding):
        assert torch.equal(model.get_parameter(name), tensors[name])


def test_the_bases_small_files_are_copied_and_nothing_else(base, adapter, tmp_path):
    small = {path.name for path in base.iterdir()} - {"model.safetensors"}
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= small
    (base / "generation_config.json").write_text('{"max_length": 7}')
    left_behind = [
        "pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.onnx", "training_args.bin",
        "pytorch_model.bin.index.json", "model.safetensors.index.json", "other.safetensors",
    ]
    for name in left_behind:
        (base / name).write_text("not to be read")
    (base / "folder.json").mkdir()
    export(base, adapter, tmp_path / "merged")
    expected = small | {"generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == expected
    for name in expected - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_beside_the_bases_weights_is_not_applied_again(base, adapter, tmp_path):
    export(base, adapter, tmp_path / "once")
    for path in adapter.iterdir():  # transformers would load it, unasked
        shutil.copy(path, base)
    export(base, adapter, tmp_path / "merged")
    once, again = (hugging_face(tmp_path / name).state_dict() for name in ("once", "merged"))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_links_of_a_download_cache_become_files_that_others_may_read(base, adapter, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in base.iterdir():
        path.chmod(0o400)
        (snapshot / path.name).symlink_to(path)
    export(snapshot, adapter, tmp_path / "merged")
    new = tmp_path / "new"
    new.touch()
    for path in (tmp_path / "merged").iterdir():
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(new.stat().st_mode)


# --- the comparison -------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "a picture of"])
def test_the_comparison_measures_differences_of_logits_and_captions(
    captioner_folder, adapter, monkeypatch, prompt
):
    monkeypatch.setattr(merging, "BATCH_SIZE", 4)  # the six images take two batches
    pair = load(captioner_folder, adapter), load_captioner(captioner_folder)
    tokens, others = (captions(captioner, prompt) for captioner in pair)
    first = (tokens != others).int().argmax(dim=1).tolist()
    assert min(first) >= len(pair[0].tokenizer.prompt_ids(prompt))  # all captions differ
    with torch.no_grad():
        logits, other_logits = (
            captioner.model.head(captioner.model.decode(
                tokens[:, :-1], encode_pixels(
                    captioner.model, torch.from_numpy(pixels(captioner)), captioner.pixels
                ),
            )) for captioner in pair
        )
    parity = compare(*pair, pixels(pair[0]), prompt=prompt, dtype=torch.float16)
    assert (parity.num_images, parity.num_identical) == (len(IMAGES), 0)
    assert parity.difference == pytest.approx(float((logits - other_logits).abs().max()), rel=1e-4)
    gaps = [logits[row, t - 1, tokens[row, t]] - logits[row, t - 1, others[row, t]]
            for row, t in enumerate(first)]
    assert parity.gap == pytest.approx(float(max(gaps)), rel=1e-4)
    assert parity.allowed == pytest.approx(16 * 2**-10 * float(logits.std(dim=-1).mean()), rel=0.1)
    assert not parity.holds
    assert str(parity) == (
        f"largest logit difference {parity.difference:.2g} (allowed in float16: "
        f"{parity.allowed:.2g}), greedy captions identical on 0 of 6 images"
    )


@pytest.mark.parametrize("changes, holds", [
    ({}, True),
    ({"difference": 0.11}, False),
    ({"difference": float("nan")}, False),
    ({"gap": 0.21, "num_identical": 3}, False),
    ({"gap": 0.19, "num_identical": 3}, True),  # the two may have changed places by rounding
])
def test_which_differences_are_allowed(changes, holds):
    values = {"num_images": 4, "num_identical": 4, "difference": 0.09, "gap": 0.0,
              "allowed": 0.1, "dtype": torch.bfloat16}
    assert Parity(**values | changes).holds == holds


def assert_nothing_written(folder: Path, *, kept: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} == kept


def test_a_merged_model_with_different_captions_is_not_kept(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda layer: layer.weight)
    with pytest.raises(MergeError) as caught:
        export(base, adapter, tmp_path / "merged")
    for words in ("the merged model differs from", "largest logit difference ",
                  "(allowed in float32: ", "0 of 6 images", "Nothing was written"):
        assert words in str(caught.value)
    assert_nothing_written(tmp_path, kept={"base"})


def test_values_too_large_for_the_dtype_are_not_kept(base, tmp_path):
    write_one(base, {k: v.half() for k, v in stored(base).items()}, "safetensors")
    adapter = write_adapter(base, tmp_path / "adapter", std=300.0)
    with pytest.raises(MergeError, match="values too large for float16, .* stored in float32"):
        export(base, adapter, tmp_path / "merged")
    assert_nothing_written(tmp_path, kept={"base", "adapter"})


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("disk full")])
@pytest.mark.parametrize("where", ["configuration", "second shard", "comparison"])
def test_an_interrupted_export_leaves_nothing(base, adapter, tmp_path, monkeypatch, where, error):
    tensors = stored(base)
    (base / "model.safetensors").unlink()
    write_shards(base, tensors, "safetensors")
    captioner = load(base, adapter)

    def interrupted(*arguments, **settings):
        if where == "second shard" and "00001" in str(arguments[1]):
            return save_file(*arguments, **settings)
        raise error

    owner, name = {
        "configuration": (shutil, "copyfile"), "second shard": (merging, "save_file"),
        "comparison": (merging, "compare"),
    }[where]
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(type(error), match="disk full"):
        export_merged(captioner, tmp_path / "new/parents/merged", pixels=pixels(captioner))
    assert_nothing_written(tmp_path, kept={"base"})


def test_a_disk_that_fills_up_is_an_error_that_the_command_line_knows(
    base, adapter, tmp_path, monkeypatch
):
    def save(*arguments, **settings):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(merging, "save_file", save)
    with pytest.raises(OSError, match="cannot write .*model.safetensors: .*No space left"):
        export(base, adapter, tmp_path / "merged")
    assert_nothing_written(tmp_path, kept={"base"})


def test_files_of_another_program_are_kept(base, adapter, tmp_path, monkeypatch):
    def compared(*arguments, **settings):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "notes.txt").write_text("dear")
        return compare(*arguments, **settings)

    monkeypatch.setattr(merging, "compare", compared)
    with pytest.raises(MergeError, match="already holds files"):
        export(base, adapter, tmp_path / "merged")
    assert_nothing_written(tmp_path, kept={"base", "merged"})
    assert_nothing_written(tmp_path / "merged", kept={"notes.txt"})


# --- where it may be written ----------------------------------------------------------------


def test_an_empty_folder_may_be_given_and_a_link_to_one(blip_folder, tmp_path):
    adapter = write_adapter(blip_folder, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "merged")
    export(blip_folder, adapter, tmp_path / "link")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    assert_nothing_written(tmp_path, kept={"adapter", "merged", "link"})


@pytest.mark.parametrize("out, words", [
    ("base", "already holds files, which are never overwritten"),
    ("full", "already holds files, which are never overwritten"),
    ("base/merged", "is in the base model's folder"),
    ("link/merged", "is in the base model's folder"),
    ("base/config.json", "is a file; name a new folder"),
    ("base/config.json/new/folder", "config.json is a file; name a new folder elsewhere"),
])
def test_an_impossible_output_folder_is_refused(blip_folder, tmp_path, out, words):
    base = shutil.copytree(blip_folder, tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("dear")
    adapter = write_adapter(base, tmp_path / "adapter")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(MergeError, match=f"--out {tmp_path / out}.*{words}"):
        export(base, adapter, tmp_path / out)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_too_little_space_is_an_error_before_writing(base, adapter, tmp_path, monkeypatch):
    size = (base / "model.safetensors").stat().st_size
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=size - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(merging, "replaced_folder", None)
    with pytest.raises(MergeError, match=f"{size / 1e6:,.0f} MB are needed: free space there"):
        export(base, adapter, tmp_path / "merged")
    assert asked == [tmp_path]
