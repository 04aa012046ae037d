"""Damaged and hostile folders: whatever they hold, only the named errors come out, and soon.

`python tests/test_fuzzed_folders.py SECONDS [SEED]` goes on for as long as it is told to.
"""

import builtins
import collections
import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch

from lora_engine.lora.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    load_adapter,
    save_adapter,
)
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.models.model_folder import PretrainedError
from lora_engine.models.pretrained import load_captioner

SECONDS = 0.7  # for each kind and family
LONGEST = 15.0  # for one input: what is allowed for patterns, several times over
FEWEST = 20  # folders

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 64, 2**31, 2**63, 10**9, 10**18, 10**400, -(10**400), 0.5,
    1e-320, 1e39, 1e308, float("nan"), float("inf"), -float("inf"), "", "a", "\x00", "\ud800",
    "\x1b[2J", "../../x", "/dev/zero", "/", "float32", "x" * 10**5, "(.+)+!", "(" * 5000, "[",
    "a{2}", "a{99999999999}", "(?R)", ".*", "auto", "blip", "gpt2", "timm_wrapper", "gelu",
    "evil.Evil",
    "AutoProcessor", "AutoModel", "PreTrainedTokenizerFast", "stranger/repo--evil.Evil",
    [], {}, [[]], [None], [5], ["a"], [0.5] * 3, [10**400] * 3, {"a": 1}, {"": None},
    {"height": 5, "width": -1},
    {"shortest_edge": 10**9}, {"content": "a", "__type": "AddedToken"}, {".*": 5}, {"(": 5},
    {"query": "8"}, {str(10**12): {"content": "a"}}, {"AutoConfig": "evil.Evil"},
]
KEYS = [
    "auto_map", "model_type", "tokenizer_class", "tokenizer_file", "vocab_file", "merges_file",
    "gguf_file", "init_inputs", "fast_tokenizer_files", "configuration_files", "chat_template",
    "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "do_lower_case",
    "image_processor_type", "feature_extractor_type", "image_processor", "size", "crop_size",
    "do_center_crop", "quantization_config", "torch_dtype", "dtype", "attn_implementation",
    "architectures", "text_config", "decoder", "self", "cls", "kwargs", "trust_remote_code", "name",
    "rank_pattern", "alpha_pattern", "exclude_modules", "use_rslora", "revision", "n_inner",
    "bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "id2label", "backend",
    "unk_token",
]


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with one entry replaced, left out or added, at any depth."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        value = copy.copy(value)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        draw = rng.random()
        if draw < 0.1:
            del value[key]
        elif draw < 0.25 and isinstance(value, dict):
            value[rng.choice(KEYS)] = rng.choice(VALUES)
        else:
            value[key] = changed(rng, value[key])
        return value
    return rng.choice(VALUES)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A file's bytes, mostly of its beginning, flipped, cut, repeated or replaced."""
    array = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        limit = rng.choice([8, 200, 3000, len(array)])
        place = rng.randrange(max(min(limit, len(array)), 1))
        kind = rng.randrange(5)
        if kind == 0:
            array[place:place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del array[place:]
        elif kind == 2:
            array[place:place] = rng.choice(
                [b"\xff" * 8, b"[" * 5000, b"9" * 5000, b'"', b"-", b"\0"]
            )
        elif kind == 3:
            del array[place:place + rng.randrange(1, 40)]
        else:
            array[place:place] = array[place:place + rng.randrange(1, 400)]
    return bytes(array)


def change_file(rng: random.Random, path: Path) -> None:
    data = path.read_bytes() if path.exists() else b"{}"
    if path.suffix == ".json" and rng.random() < 0.8:
        value = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            value = changed(rng, value)
        data = json.dumps(value).encode()
    else:
        data = changed_bytes(rng, data)
    path.write_bytes(data)


Fuzzed = collections.namedtuple("Fuzzed", "number outcomes longest_s")


def fuzz(
    original: Path, work: Path, names: list[str], use: Callable[[Path], None],
    errors: type[Exception], *, seconds: float, seed: int,
) -> Fuzzed:
    """Use copies of a folder, one or two files of which are changed, until the time is over.

    At least FEWEST copies are used.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    longest, number, end = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < end or number < FEWEST:  # on a busy machine
        rng = random.Random(f"{seed} {number}")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(original, work)
        changed_names = set(rng.sample(names, rng.choice([1, 1, 2])))
        for name in sorted(changed_names):
            change_file(rng, work / name)
        begin = time.monotonic()
        try:
            use(work)
            outcomes["accepted"] += 1
        except errors:
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, input {number}: {work}, changed {changed_names}")
            raise
        took = time.monotonic() - begin
        assert took < LONGEST, f"seed {seed}, input {number}, took {took:.1f} s: {work}"
        longest, number = max(longest, took), number + 1
    return Fuzzed(number, dict(outcomes), longest)


def fuzz_adapters(base: Path, tmp: Path, *, seconds: float, seed: int) -> Fuzzed:
    model = load_captioner(base).model
    adapted = copy.deepcopy(model)
    inject(
        adapted, ["attention"], rank=2, rank_pattern={".*(query|q_attn)": 3},
        alpha_pattern={"value|c_proj": 5},
    )
    for matrix in lora_parameters(adapted).values():
        torch.nn.init.normal_(matrix, std=0.1)
    save_adapter(adapted, tmp / "adapter", base_model="owner/base", provenance={"prompt": "a"})
    return fuzz(
        tmp / "adapter", tmp / "fuzzed", [CONFIG_FILE, WEIGHTS_FILE],
        lambda folder: load_adapter(copy.deepcopy(model), folder), AdapterError,
        seconds=seconds, seed=seed,
    )


MODEL_FILES = [
    "config.json", "config.json", "config.json", "preprocessor_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "model.safetensors",
    "pytorch_model.bin",
]


def fuzz_models(base: Path, tmp: Path, *, seconds: float, seed: int) -> Fuzzed:
    """Whole and in a .bin file, whose bytes are changed in every second folder."""
    shutil.copytree(base, tmp / "model")
    tensors = checkpoints.hugging_face(base).state_dict()
    torch.save(tensors, tmp / "model" / "pytorch_model.bin")
    number = 0

    def use(folder: Path) -> None:
        nonlocal number
        number += 1
        if number % 2:
            (folder / "model.safetensors").unlink()
        load_captioner(folder).tokenizer.prompt_ids("a dog on the beach")

    return fuzz(
        tmp / "model", tmp / "fuzzed", MODEL_FILES, use, PretrainedError,
        seconds=seconds, seed=seed,
    )


def refuse(*arguments: object) -> None:
    raise AssertionError(f"asked on stdin: {arguments}")


@pytest.mark.parametrize("kind", [fuzz_adapters, fuzz_models])
def test_only_named_errors_come_out_of_fuzzed_folders(
    captioner_folder, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(builtins, "input", refuse)
    done = kind(captioner_folder, tmp_path, seconds=SECONDS, seed=0)
    assert done.outcomes["refused"] > 5


if __name__ == "__main__":
    import tempfile

    builtins.input = refuse  # type: ignore[assignment]
    torch.set_num_threads(1)
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for write in (checkpoints.write_blip, checkpoints.write_vit_gpt2):
        folder = Path(tempfile.mkdtemp())
        write(folder / "base")
        for kind in (fuzz_adapters, fuzz_models):
            (folder / kind.__name__).mkdir()
            done = kind(folder / "base", folder / kind.__name__, seconds=seconds / 4, seed=seed)
            print(write.__name__, kind.__name__, done, flush=True)
        shutil.rmtree(folder)
