"""The embedded demo: reproducible scenes, and the tiny captioners that ship with the package."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import hugging_face
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lora_engine.demo import captioner_folder as demo_folder
from lora_engine.demo import pretrain, scenes
from lora_engine.demo.scenes import Figure, Scene, cc3m_caption, draw, hard_caption, plain_caption
from lora_engine.lora.injection import inject
from lora_engine.models.pretrained import load_captioner
from lora_engine.training.validation_captions import MAX_NEW_TOKENS

FAMILIES = ["blip", "vit_gpt2"]
MEASURED = {"blip": 0.985, "vit_gpt2": 0.981}  # exactly right captions, by demo/pretrain.py
MARGIN = 0.03


def unseen(count: int) -> list[Scene]:
    return list(islice(scenes.scenes("validation", seed=5), count))


# --- scenes -----------------------------------------------------------------------------------


def test_a_scene_and_its_image_depend_on_index_and_seed_alone():
    first, again = scenes.scene_at(7, seed=1), scenes.scene_at(7, seed=1)
    assert first == again
    assert draw(first).tobytes() == draw(again).tobytes()
    assert len({scenes.scene_at(7, seed) for seed in range(20)}) == 20
    assert len({scenes.scene_at(index, seed=1) for index in range(20)}) == 20


def test_images_are_small_rgb_images_that_differ_with_the_variation():
    scene = Scene("alone", "white", (Figure("red", "circle"),), variation=1)
    varied = Scene("alone", "white", (Figure("red", "circle"),), variation=2)
    assert draw(scene).mode == "RGB" and draw(scene).size == (64, 64)
    assert scene.content == varied.content
    assert draw(scene).tobytes() != draw(varied).tobytes()
    red, green, blue = draw(scene).getpixel((32, 32))
    assert red > 180 and max(green, blue) < 80


@pytest.mark.parametrize(("scene", "plain", "cc3m"), [
    (
        Scene("above", "white", (Figure("red", "circle"), Figure("blue", "square"))),
        "a red circle above a blue square",
        "cartoon drawing of a red circle floating over a blue square , isolated on a white"
        " background .",
    ),
    (
        Scene("beside", "black", (Figure("orange", "star"), Figure("pink", "heart"))),
        "an orange star to the left of a pink heart on black",
        "orange star and pink heart standing side by side , against the night sky .",
    ),
    (
        Scene("inside", "grey", (Figure("green", "ring"), Figure("orange", "diamond"))),
        "a green ring inside an orange diamond on grey",
        "modern logo design , green ring surrounded by an orange diamond , painted on a concrete"
        " wall .",
    ),
    (
        Scene("row", "white", (Figure("brown", "cross"),), count=3),
        "three brown crosses in a row",
        "seamless pattern with three bright brown crosses isolated on a white background .",
    ),
    (
        Scene("alone", "white", (Figure("red", "star"),), "small"),
        "a small red star in the middle",
        "vector illustration of a tiny red star isolated on a white background .",
    ),
    (
        Scene("alone", "black", (Figure("red", "star"),), "large", (1, -1)),
        "a large red star at the top right on black",
        "huge red star in the upper right corner with copy space for your text , against the"
        " night sky .",
    ),
])
def test_captions_describe_what_is_drawn(scene, plain, cc3m):
    assert plain_caption(scene) == plain
    assert cc3m_caption(scene) == cc3m


def test_splits_share_no_scene_and_hold_thousands():
    contents = {
        split: {scene.content for scene in islice(scenes.scenes(split, seed), count)}
        for split, seed, count in (("train", 0, 5000), ("validation", 9, 1000))
    }
    assert not contents["train"] & contents["validation"]
    assert len(contents["train"]) > 4000 and len(contents["validation"]) > 700


def test_written_scenes_match_their_annotations_and_are_reused(tmp_path, monkeypatch):
    lists = scenes.write_scenes(tmp_path, num_train=30, num_val=10, seed=3)
    texts = []
    for path, count in zip(lists, (30, 10)):
        rows = json.loads(path.read_text())
        assert len(rows) == count
        for row in rows:
            assert not Path(row["image"]).is_absolute()
            assert Image.open(path.parent / row["image"]).size == (64, 64)
        texts += [row["text"] for row in rows]
    first = next(scenes.scenes("train", seed=3))
    assert texts[0] == cc3m_caption(first)
    stored = Image.open(lists[0].parent / json.loads(lists[0].read_text())[0]["image"])
    assert stored.tobytes() == draw(first).tobytes()
    assert len(set(texts)) == 40

    monkeypatch.setattr(scenes, "draw", None)  # drawing again would fail
    assert scenes.write_scenes(tmp_path, num_train=30, num_val=10, seed=3) == lists


def test_an_interrupted_run_leaves_no_partial_set(tmp_path, monkeypatch):
    def draw_until_killed(scene, left=iter(range(25))):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(scene)

    monkeypatch.setattr(scenes, "draw", draw_until_killed)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path, num_train=30, num_val=10, seed=3)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    train_path, val_path = scenes.write_scenes(tmp_path, num_train=30, num_val=10, seed=3)
    assert len(json.loads(train_path.read_text())) == 30


def test_the_hard_set_has_the_same_images_with_longer_captions(tmp_path):
    sizes = {"num_train": 20, "num_val": 5, "seed": 3}
    demo = scenes.write_scenes(tmp_path, **sizes)
    hard = scenes.write_scenes(tmp_path, **sizes, caption=hard_caption)
    assert scenes.write_scenes(tmp_path, **sizes, caption=hard_caption) == hard
    drawn = islice(scenes.scenes("train", seed=3), 20)
    for scene, row, hard_row in zip(drawn, *(json.loads(path[0].read_text())
                                             for path in (demo, hard)), strict=True):
        assert hard_row == {"text": hard_caption(scene), "image": row["image"]}
        assert hard_row["text"].startswith(row["text"] + " a ")
        stored = [(path[0].parent / row["image"]).read_bytes() for path in (demo, hard)]
        assert stored[0] == stored[1]


def test_most_names_of_the_hard_set_are_rare_and_all_can_be_learned():
    words = [set(hard_caption(scene).split()) for scene in islice(scenes.scenes("train", 0), 2000)]
    names = set(scenes.names_by_look().values())
    counts = [count for _, count in Counter(
        word for caption in words for word in caption & names
    ).most_common()]
    assert len(names) == len(counts) == scenes.NUM_NAMES
    assert counts[0] > 600 and 5 < counts[-1] < 30  # the shares of looks are 45 and 1 of 192
    assert sum(count < 60 for count in counts) > 25  # in less than 3 % of the captions
    assert names == set(scenes.names_by_look.__wrapped__().values())
    assert not names & {word for scene in unseen(500) for word in cc3m_caption(scene).split()}


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_captions_are_spelled_within_the_length_of_generated_ones(family):
    tokenizer = Tokenizer.from_file(f"{demo_folder(family)}/tokenizer.json")
    captions = [hard_caption(scene) for scene in islice(scenes.scenes("train", 0), 500)]
    encodings = [tokenizer.encode(caption, add_special_tokens=False) for caption in captions]
    assert "[UNK]" not in {token for encoding in encodings for token in encoding.tokens}
    decoded = [tokenizer.decode(encoding.ids) for encoding in encodings]
    assert [text.replace(" ##", "") for text in decoded] == captions
    assert max(len(encoding.ids) for encoding in encodings) <= MAX_NEW_TOKENS


@pytest.mark.parametrize("count", [0, 20_001])
def test_impossible_numbers_of_scenes_are_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"num_train is {count}; expected 1 to 20,000"):
        scenes.write_scenes(tmp_path, num_train=count, num_val=10, seed=0)


# --- the captioners that ship -----------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_captions_equal_those_of_hugging_face(family):
    import transformers

    folder = demo_folder(family)
    drawn = unseen(12)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = processor([draw(scene) for scene in drawn], return_tensors="pt").pixel_values
    tokens = hugging_face(folder).float().generate(
        pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=30
    )
    theirs = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert pretrain.caption_scenes(load_captioner(folder), drawn) == theirs


def test_captions_of_unseen_scenes_are_plain_and_right(family):
    drawn = unseen(200)
    captions = pretrain.caption_scenes(load_captioner(demo_folder(family)), drawn)
    right = np.mean([a == plain_caption(scene) for a, scene in zip(captions, drawn)])
    assert right >= MEASURED[family] - MARGIN


def test_tokenizers_keep_cc3m_captions_and_spell_unknown_words(family):
    tokenizer = load_captioner(demo_folder(family)).tokenizer
    known = [cc3m_caption(scene) for scene in unseen(50)]
    strange = "my cat , 2 jam-jars & a kazoo ?"
    for caption, ids in zip([*known, strange], map(list, tokenizer.encode([*known, strange]))):
        decoded = tokenizer.decode(ids[1:])
        assert decoded.replace(" ", "") == caption.replace(" ", "")
        if caption != strange:
            assert decoded == caption and len(ids) == len(caption.split()) + 2


def test_shipped_files_are_what_the_script_writes_and_small(family, tmp_path):
    shipped = Path(demo_folder(family))
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 4e6
    model = load_captioner(shipped).model
    pretrain.save_weights(model, tmp_path, family)
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (shipped, tmp_path))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, ours[name]), name


def test_pretraining_trains_all_but_the_token_embeddings(family):
    captioner = load_captioner(demo_folder(family))
    before = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    pretrain.train(captioner, num_steps=1, seed=0)
    unchanged = {
        name for name, value in captioner.model.state_dict().items()
        if torch.equal(value, before[name])
    }
    assert set(captioner.model.tied_head) <= unchanged
    assert any(name.startswith("encoder") or "vision" in name for name in before.keys() - unchanged)


def test_adapters_learn_words_that_the_captioner_never_said(family):
    captioner = load_captioner(demo_folder(family))
    train = islice(scenes.scenes("train", seed=5), 30 * 16)
    validation = pretrain.batch_of(captioner, unseen(50), cc3m_caption)
    with torch.no_grad():
        before = pretrain.mean_loss(captioner, validation)
    inject(captioner.model, ["attention", "feed_forward"], dropout=0.0)
    matrices = [p for p in captioner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=4e-3)
    for _ in range(30):
        batch = pretrain.batch_of(captioner, list(islice(train, 16)), cc3m_caption)
        pretrain.mean_loss(captioner, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = pretrain.mean_loss(captioner, validation)
    assert after < before / 4, (before, after)
