"""A captioner with its adapter folded in, as the kind of folder that its base came from.

Only the adapted tensors are written anew: in the checkpoint's own files, under their own names, in
their own layout and number format. Every other tensor, the configuration, the tokenizer and the
preprocessor are the base's, so that whatever loads the base loads the result, without PEFT. Before
the folder takes its name it is loaded back and compared with base and adapter apart.

Axes: B images, T caption tokens, V vocabulary.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_engine.captioning.generation import generate
from lora_engine.features.encoder import encode_pixels
from lora_engine.files import replaced_folder
from lora_engine.lora.injection import lora_layers
from lora_engine.models.model_folder import SMALL_FILES
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.models.weights import read_weights, weight_files

# An index is written anew where one is needed. An adapter that lies beside the base's weights
# would be loaded on top of the merged ones: transformers does so unasked.
LEFT_BEHIND = ("*.index.json", "adapter_config.json")

IMAGES_AT_ONCE = 8


class MergeError(ValueError):
    """A merged model that cannot be written, or does not say what base and adapter say."""


@dataclass(frozen=True)
class Parity:
    """How near a merged model comes to base and adapter apart, on some images.

    `difference` is the largest between two logits, at any token of the captions of base and
    adapter; `allowed` is how far a logit may move by rounding the merged weights to `dtype`. `gap`
    is the largest lead in logits that a token had over the one which took its place, first in its
    caption (0 where all captions are identical).
    """

    num_images: int
    num_identical: int
    difference: float
    gap: float
    allowed: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        # Each of two logits may move. False, too, for differences that are not numbers.
        return self.difference <= self.allowed and self.gap <= 2 * self.allowed

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (allowed in {_name(self.dtype)}: "
            f"{self.allowed:.2g}), greedy captions identical on {self.num_identical} of "
            f"{self.num_images} images"
        )


def export_merged(
    captioner: Captioner, out: str | Path, *, pixels: np.ndarray, prompt: str = ""
) -> Parity:
    """Write a captioner and its LoRA layers, not merged, as one plain Hugging Face folder.

    `pixels` (B, 3, height, width), uint8, are the images on which the written folder, loaded back,
    is compared with `captioner`, behind `prompt`. The model of `captioner` is in evaluation mode
    afterwards, and else as it was.

    Raises MergeError where `out` holds anything or lies in the base's folder, where the disk has
    too little space, and where the comparison fails; `out` is then as it was.
    """
    out = Path(out)
    check_out(out)
    _check_room(out, captioner.folder)
    with replaced_folder(out.resolve()) as new:
        _copy_small_files(captioner.folder, new)
        dtype = _write_weights(captioner, new)
        parity = compare(captioner, load_captioner(new), pixels, prompt=prompt, dtype=dtype)
        if not parity.holds:
            raise MergeError(
                f"the merged model does not say what {captioner.name} and the adapter say apart: "
                f"{parity}. Nothing was written. {_name(dtype)} is too coarse for the merged "
                f"weights (finest is a base that is stored in float32)"
            )
        check_out(out)  # this took a while, in which another program may have written there
    return parity


def check_out(out: Path) -> None:
    """Raises MergeError unless `out` is a folder that can be made, or an empty one."""
    if out.exists() and not out.is_dir():
        raise MergeError(f"--out {out} is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise MergeError(
            f"--out {out} already holds files, which are never overwritten; choose another folder"
        )
    if not out.resolve().parent.is_dir():
        raise MergeError(f"--out {out}: there is no folder {out.parent}; make it first")


def _check_room(out: Path, base: Path) -> None:
    if out.resolve().is_relative_to(base.resolve()):
        raise MergeError(f"--out {out} lies in the base model's folder {base}; choose another one")
    needed = sum(path.stat().st_size for path in weight_files(base))
    free = shutil.disk_usage(out.resolve().parent).free
    if free < needed:
        raise MergeError(
            f"--out {out}: the merged model takes {needed / 1e9:.2f} GB, but that disk has "
            f"{free / 1e9:.2f} GB free; free some, or choose a folder on another disk"
        )


def _copy_small_files(base: Path, folder: Path) -> None:
    for pattern in SMALL_FILES:
        for path in base.glob(pattern):
            if path.is_file() and not any(path.match(name) for name in LEFT_BEHIND):
                shutil.copyfile(path, folder / path.name)


def _write_weights(captioner: Captioner, folder: Path) -> torch.dtype:
    """Write the base's files with the adapted tensors merged -> the coarsest format of those."""
    merged = {f"{path}.weight": layer for path, layer in lora_layers(captioner.model)}
    # GPT-2's Conv1D stores (in, out), our layers (out, in).
    is_transposed = captioner.model.fan_in_fan_out
    dtypes = set()
    file_of: dict[str, str] = {}
    num_bytes = 0
    for path in weight_files(captioner.folder):
        tensors = read_weights(path)
        if path.suffix == ".bin":  # one tensor may have two names there, but not in safetensors
            tensors = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        for name in tensors.keys() & merged.keys():
            weight, dtype = merged[name].merged_weight(), tensors[name].dtype
            tensors[name] = (weight.T if is_transposed else weight).to(dtype).contiguous()
            if not tensors[name].isfinite().all():
                raise MergeError(
                    f"the merged {name} has numbers too large for {_name(dtype)}, the format of "
                    f"{captioner.name}; merge into a base that is stored in float32. Nothing was "
                    f"written"
                )
            dtypes.add(dtype)
        file_name = path.with_suffix(".safetensors").name.removeprefix("pytorch_")
        _save(tensors, folder / file_name)
        file_of |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    assert merged and merged.keys() <= file_of.keys(), merged.keys() - file_of.keys()
    if set(file_of.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, too
        raise OSError(f"cannot write {path}: {error}") from None
    # save_file's are readable by their owner alone, whatever the umask.
    shutil.copymode(path.with_name("config.json"), path)


# --- the comparison -------------------------------------------------------------------------


@torch.no_grad()
def compare(
    apart: Captioner, merged: Captioner, pixels: np.ndarray, *, prompt: str, dtype: torch.dtype
) -> Parity:
    """Caption `pixels` (B, 3, height, width), uint8, greedily with both, in fp32 on the CPU.

    Logits are compared on the captions of `apart`, whose model has LoRA layers; `merged` had its
    weights rounded to `dtype`.
    """
    apart.model.eval()  # layers that were injected come in training mode, with dropout
    differences, gaps, spreads, num_identical = [], [], [], 0
    for begin in range(0, len(pixels), IMAGES_AT_ONCE):
        batch = torch.from_numpy(pixels[begin : begin + IMAGES_AT_ONCE])
        features, tokens = _encode_and_caption(apart, batch, prompt)
        merged_features, merged_tokens = _encode_and_caption(merged, batch, prompt)
        tokens, merged_tokens = _equally_long(tokens, merged_tokens, apart.tokenizer.pad_id)
        logits = _logits(apart, tokens, features)
        differences.append((_logits(merged, tokens, merged_features) - logits).abs().max())
        gaps.append(_gaps(logits, tokens, merged_tokens).max())
        # Over the vocabulary: what all logits of a token have in common changes no probability.
        spreads.append(logits.std(dim=-1).mean())
        num_identical += int((tokens == merged_tokens).all(dim=1).sum())
    return Parity(
        num_images=len(pixels),
        num_identical=num_identical,
        difference=float(torch.stack(differences).max()),
        gap=float(torch.stack(gaps).max()),
        allowed=_tolerance(dtype) * float(torch.stack(spreads).mean()),
        dtype=dtype,
    )


def _encode_and_caption(captioner: Captioner, pixels: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """Features of images and the tokens (B, T) of their captions, prompt first."""
    features = encode_pixels(captioner.model, pixels, captioner.pixels)
    tokenizer = captioner.tokenizer
    tokens = generate(
        captioner.model,
        features,
        prompt_ids=tokenizer.prompt_ids(prompt),
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
    )
    return features, tokens


def _equally_long(a: Tensor, b: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    num_tokens = max(a.shape[1], b.shape[1])
    a, b = (F.pad(tokens, (0, num_tokens - tokens.shape[1]), value=pad_id) for tokens in (a, b))
    return a, b


def _logits(captioner: Captioner, tokens: Tensor, features: Tensor) -> Tensor:
    """Logits (B, T - 1, V) of every token (B, T) but the first."""
    return captioner.model.head(captioner.model.decode(tokens[:, :-1], features))


def _gaps(logits: Tensor, tokens: Tensor, others: Tensor) -> Tensor:
    """By how much each row's first token that differs leads the other one's -> (B,)."""
    first = (tokens != others).int().argmax(dim=1).clamp(min=1)  # a row without one has gap 0
    rows = torch.arange(len(tokens))
    scores = logits[rows, first - 1]  # (B, V)
    return scores[rows, tokens[rows, first]] - scores[rows, others[rows, first]]


def _tolerance(dtype: torch.dtype) -> float:
    """How far a logit may move, in standard deviations of the logits over the vocabulary.

    Rounding moves a weight by up to eps / 2 of itself; in fp32 the order of sums moves more.
    """
    return max(1e-3, 16 * torch.finfo(dtype).eps)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
