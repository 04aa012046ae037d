"""Export a captioner with its adapter merged, as a Hugging Face folder like its base's.

Only the adapted tensors are rewritten: in the checkpoint's own files, under their own names, in
their own layout and dtype. All other tensors, the configuration, the tokenizer and the preprocessor
are copied from the base, so that whatever loads the base loads the result, without PEFT. Of a
vocabulary head and an embedding that are tied, a base may store one; both are written, because not
every version of transformers ties them. If an adapter changes one of them, config.json says that
they are not tied. Before the folder gets its final name it is loaded and compared with the unmerged
model.

Axes: B images, T caption tokens, V vocabulary.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_engine.captioning.generation import generate
from lora_engine.devices import dtype_name
from lora_engine.features.encoder import encode_pixels
from lora_engine.files import check_space, existing_parent, replaced_folder
from lora_engine.lora.injection import lora_layers
from lora_engine.models.families import FAMILIES
from lora_engine.models.model_folder import SMALL_FILES
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.models.weights import read_weights, weight_files
from lora_engine.terminal import counted

# Files of the base that are not copied. An index is written again if one is needed. transformers
# would load an adapter beside the weights on top of the merged ones.
NOT_COPIED = ("*.index.json", "adapter_config.json")

BATCH_SIZE = 8


class MergeError(ValueError):
    """A merged model that cannot be written, or whose captions differ from the unmerged model's."""


@dataclass(frozen=True)
class Parity:
    """How closely a merged model matches the unmerged one on some images.

    `difference` is the largest difference of two logits at any token of the unmerged model's
    captions; `allowed` is how far a logit may move when the merged weights are rounded to `dtype`.
    `gap` is the largest lead in logits that a token had over the one that replaced it, at the first
    difference of two captions (0 if all captions are identical).
    """

    num_images: int
    num_identical: int
    difference: float
    gap: float
    allowed: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        # Each of two logits may move. Also False if a difference is NaN.
        return self.difference <= self.allowed and self.gap <= 2 * self.allowed

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (allowed in {dtype_name(self.dtype)}: "
            f"{self.allowed:.2g}), greedy captions identical on {self.num_identical} of "
            f"{counted(self.num_images, 'image')}"
        )


def export_merged(
    captioner: Captioner,
    out: str | Path,
    *,
    pixels: np.ndarray,
    prompt: str = "",
    changed: Mapping[str, Tensor] | None = None,
) -> Parity:
    """Write a captioner whose LoRA layers are not merged as one plain Hugging Face folder.

    `changed` are the tensors of the checkpoint to rewrite if the captioner was made `with_tensors`
    instead. `pixels` (B, 3, height, width), uint8, are the images on which the written folder is
    loaded and compared with `captioner`, with `prompt`. Afterwards the model of `captioner` is in
    evaluation mode, and otherwise unchanged.

    Raises MergeError if `out` is not empty or is inside the base's folder, if the disk has too
    little space, and if the comparison fails; `out` is then unchanged.
    """
    out = Path(out)
    check_out(out)
    _check_target(out, captioner)
    with replaced_folder(out.resolve()) as new:
        _copy_small_files(captioner.folder, new)
        dtype = _write_weights(captioner, new, changed or _merged_layers(captioner))
        parity = compare(captioner, load_captioner(new), pixels, prompt=prompt, dtype=dtype)
        if not parity.holds:
            raise MergeError(
                f"the merged model differs from {captioner.name} with the adapter: {parity}. "
                f"Nothing was written. {dtype_name(dtype)} is too coarse for the merged weights; a "
                f"base that is stored in float32 is the most precise"
            )
        check_out(out)  # another program may have written there in the meantime
    return parity


def check_out(out: Path) -> None:
    """Raises MergeError unless `out` is a folder that can be created, or an empty one."""
    if out.exists() and not out.is_dir():
        raise MergeError(f"--out {out} is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise MergeError(
            f"--out {out} already holds files, which are never overwritten; choose another folder"
        )
    parent = existing_parent(out.resolve())
    if not parent.is_dir():
        raise MergeError(f"--out {out}: {parent} is a file; name a new folder elsewhere")


def _check_target(out: Path, captioner: Captioner) -> None:
    base, model = captioner.folder, captioner.model
    if out.resolve().is_relative_to(base.resolve()):
        raise MergeError(f"--out {out} is in the base model's folder {base}; choose another one")
    needed = sum(path.stat().st_size for path in weight_files(base))
    needed += model.get_parameter(model.tied_head[1]).nbytes  # perhaps stored twice
    try:
        check_space(out.resolve().parent, needed=needed)
    except OSError as error:
        raise MergeError(f"--out {out}: {error}, or choose a folder on another disk") from None


def _copy_small_files(base: Path, folder: Path) -> None:
    for pattern in SMALL_FILES:
        for path in base.glob(pattern):
            if path.is_file() and not any(path.match(name) for name in NOT_COPIED):
                shutil.copyfile(path, folder / path.name)


def _merged_layers(captioner: Captioner) -> dict[str, Tensor]:
    """The weights of the checkpoint that the model's LoRA layers change, merged."""
    # GPT-2's Conv1D stores (in, out), our layers (out, in).
    is_transposed = captioner.model.fan_in_fan_out
    return {
        f"{path}.weight": layer.merged_weight().T if is_transposed else layer.merged_weight()
        for path, layer in lora_layers(captioner.model)
    }


def _write_weights(
    captioner: Captioner, folder: Path, merged: Mapping[str, Tensor]
) -> torch.dtype:
    """Write the base's files with `merged` tensors -> the coarsest of their dtypes."""
    tied_head, head_biases = captioner.model.tied_head, FAMILIES[captioner.family].head_biases
    tied = set(tied_head)
    dtypes = set()
    file_of: dict[str, str] = {}
    num_bytes = 0
    paths = weight_files(captioner.folder)
    last = None
    while paths:
        path = paths.pop(0)
        tensors = read_weights(path)
        stored = tied & tensors.keys()
        if len(stored) == 1 and not tied & file_of.keys():
            if paths and last is None:  # another file may hold the other one
                last = path
                paths.append(path)
                continue
            (name,), (other,) = stored, tied - stored
            tensors[other] = tensors[name].clone()
        if path.suffix == ".bin":  # one tensor may have two names there, but not in safetensors
            tensors = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        biases = [tensors[name] for name in head_biases if name in tensors]
        for name in head_biases:  # one name may be enough in the base
            if biases and name in merged:
                tensors.setdefault(name, biases[0])
        for name in tensors.keys() & merged.keys():
            dtype = tensors[name].dtype
            tensors[name] = merged[name].to(dtype, copy=True).contiguous()
            if not tensors[name].isfinite().all():
                raise MergeError(
                    f"the merged {name} has values too large for {dtype_name(dtype)}, the dtype of "
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
    if tied_head[0] in merged and not torch.equal(*(merged[name] for name in tied_head)):
        _untie(folder / "config.json")
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _untie(path: Path) -> None:
    """Tell transformers that head and embedding differ, or else it may tie them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and "model_type" in part:
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also for a full disk
        raise OSError(f"cannot write {path}: {error}") from None
    # save_file makes files readable for their owner only, whatever the umask.
    shutil.copymode(path.with_name("config.json"), path)


# --- the comparison -------------------------------------------------------------------------


@torch.no_grad()
def compare(
    unmerged: Captioner, merged: Captioner, pixels: np.ndarray, *, prompt: str, dtype: torch.dtype
) -> Parity:
    """Caption `pixels` (B, 3, height, width), uint8, greedily with both, in fp32 on the CPU.

    Logits are compared on the captions of `unmerged`, whose model has LoRA layers; the weights of
    `merged` were rounded to `dtype`.
    """
    unmerged.model.eval()  # injected layers start in training mode, with dropout
    differences, gaps, spreads, num_identical = [], [], [], 0
    for begin in range(0, len(pixels), BATCH_SIZE):
        batch = torch.from_numpy(pixels[begin : begin + BATCH_SIZE])
        features, tokens = _encode_and_caption(unmerged, batch, prompt)
        merged_features, merged_tokens = _encode_and_caption(merged, batch, prompt)
        tokens, merged_tokens = _equally_long(tokens, merged_tokens, unmerged.tokenizer.pad_id)
        logits = _logits(unmerged, tokens, features)
        differences.append((_logits(merged, tokens, merged_features) - logits).abs().max())
        gaps.append(_gaps(logits, tokens, merged_tokens).max())
        # Over the vocabulary: a constant added to all logits of a token changes no probability.
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
    """Features of images, and the tokens (B, T) of their captions, starting with the prompt."""
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
    """Logits (B, T - 1, V) for each of `tokens` (B, T) except the first."""
    return captioner.model.head(captioner.model.decode(tokens[:, :-1], features))


def _gaps(logits: Tensor, tokens: Tensor, others: Tensor) -> Tensor:
    """By how much each row's first different token leads the other row's -> (B,)."""
    first = (tokens != others).int().argmax(dim=1).clamp(min=1)  # a row without one has gap 0
    rows = torch.arange(len(tokens))
    scores = logits[rows, first - 1]  # (B, V)
    return scores[rows, tokens[rows, first]] - scores[rows, others[rows, first]]


def _tolerance(dtype: torch.dtype) -> float:
    """How far a logit may move, in standard deviations of the logits over the vocabulary.

    Rounding changes a weight by up to eps / 2 of itself; in fp32 the order of sums changes more.
    """
    return max(1e-3, 16 * torch.finfo(dtype).eps)
