"""What a training step asks of a GPU, counted without one, and the speed to expect of it.

    python -m benchmarks.gpu_budget                      both captioners at their published sizes
    python -m benchmarks.gpu_budget --kinds              and the kernels by kind

The published recipe's step (LoRA of rank 8 with dropout 0.1 on 120 or 84 layers, bf16, features
kept, captions of T tokens, all of them targets) runs on the meta device, and each operation that
launches a kernel is counted:

- kernels: a view or an allocation launches none, anything else one; attention is one forward and
  one backward, as by torch's flash kernel, and a concatenation one for each 128 tensors.
- GB: operands read and results written, without what caches save.
- unaligned: the share of the matrix FLOPs in products with an operand or result whose contiguous
  axis is not a multiple of 16 bytes long, or whose rows begin elsewhere. Tensor cores then need
  slower kernels.
- saved: what the forward pass keeps for the backward pass.
- peak: the largest amount of memory that tensors of the step take at once.
- waits: operations whose result the host waits for; there must be none.

The expected speed is a roofline: each kernel takes the longest of its FLOPs at 60 % of the
published dense rate, its bytes at 80 % of the published bandwidth, and 2 us (a launch in a CUDA
graph; unaligned products at a quarter of the rate). Nothing overlaps. Loading of data is not
included, and no card has confirmed the figures. On one of these cards benchmarks/throughput.py
prints the expected speed beside the measured one, in first epochs with the encoder's work.

CUDA graphs keep memory for each shape. With a common pool the largest shape's peak serves all;
each shape adds its inputs, unless these are shared, too. The last lines add up both for captions
as long as CC3M's.

Axes: B captions (each with its own image), T tokens, P image tokens.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import MODELS, table
from lora_engine.data.batches import FeatureBatch, bucket_length, epoch_batches
from lora_engine.data.pixels import normalize
from lora_engine.features.encoder import encoder_batch_size
from lora_engine.lora.injection import inject
from lora_engine.models.families import FAMILIES
from lora_engine.training.setup import place_model
from lora_engine.training.speed import PIXELS
from lora_engine.training.trainer import Trainer

RANK, ALPHA, DROPOUT = 8, 32, 0.1
BATCH_SIZES, LENGTHS = (32, 256), (8, 16, 28)
META = torch.device("meta")

_ALIGNED_BYTES = 16
_TENSORS_PER_CAT = 128
_NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "detach", "lift_fresh", "resize_")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Card(NamedTuple):
    """Published figures: dense TFLOP/s of tensor cores in bf16 (fp16: T4), and GB/s of memory.

    `pattern` finds the card in torch's name of a device.
    """

    tflops: float
    bandwidth_gb_s: float
    pattern: str = ""


CARDS = {
    "H100 SXM": Card(989, 3350, r"\bH100 80GB HBM3$"),
    "H200": Card(989, 4800, r"\bH200$"),
    "A100 80GB": Card(312, 2039, r"\bA100-SXM4-80GB$"),
    "RTX 4090": Card(165, 1008, r"\bRTX 4090$"),
    "T4": Card(65, 320, r"\bT4$"),
}
_RATE_SHARE, _UNALIGNED_SHARE, _BANDWIDTH_SHARE, _LAUNCH_S = 0.6, 0.25, 0.8, 2e-6


class Kernel(NamedTuple):
    name: str
    num_launches: int
    num_bytes: int
    flops: int
    is_aligned: bool

    def seconds(self, card: Card) -> float:
        rate = card.tflops * 1e12 * _RATE_SHARE * (1 if self.is_aligned else _UNALIGNED_SHARE)
        bandwidth = card.bandwidth_gb_s * 1e9 * _BANDWIDTH_SHARE
        return max(self.flops / rate, self.num_bytes / bandwidth, self.num_launches * _LAUNCH_S)


@dataclass
class Budget:
    """What one step took."""

    batch_size: int
    input_bytes: int
    kernels: list[Kernel] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    saved_bytes: int = 0
    peak_bytes: int = 0

    @property
    def num_kernels(self) -> int:
        return sum(kernel.num_launches for kernel in self.kernels)

    @property
    def num_bytes(self) -> int:
        return sum(kernel.num_bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def unaligned_share(self) -> float:
        return sum(k.flops for k in self.kernels if not k.is_aligned) / self.flops

    def by_kind(self) -> Counter[str]:
        return Counter(k.name for k in self.kernels for _ in range(k.num_launches))

    def seconds(self, card: Card) -> float:
        return sum(kernel.seconds(card) for kernel in self.kernels)

    def captions_per_s(self, card: Card) -> float:
        return self.batch_size / self.seconds(card)


class _Counting(TorchDispatchMode):
    """Counts the kernels of all operations, and the memory of tensors made meanwhile."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget
        self.alive: dict[StorageWeakRef, int] = {}
        self.alive_bytes = 0  # or more: what was freed is found only where it matters

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_WAITS) or name == "_to_copy" and kwargs.get("device", META) != META:
            self.budget.waits.append(name)
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._follow_memory(inputs, outputs)
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(info is not None and not info.is_write for info in returns)
        if is_view or name.startswith(_NO_KERNEL) or not (inputs or outputs):
            return result
        num_launches = -(-len(args[0]) // _TENSORS_PER_CAT) if name == "cat" else 1
        product = _product(name, args, outputs)
        self.budget.kernels.append(Kernel(
            name, num_launches, sum(map(_touched_bytes, [*inputs, *outputs])), *product
        ))
        return result

    def _follow_memory(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        known = {StorageWeakRef(x.untyped_storage()) for x in inputs}
        for x in outputs:
            reference = StorageWeakRef(x.untyped_storage())
            if reference not in known:
                self.alive[reference] = x.untyped_storage().nbytes()
                self.alive_bytes += self.alive[reference]
        if self.alive_bytes > self.budget.peak_bytes:
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.alive_bytes = sum(self.alive.values())
            self.budget.peak_bytes = max(self.budget.peak_bytes, self.alive_bytes)


def _touched_bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _product(name: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> tuple[int, bool]:
    """FLOPs of a matrix product, and whether all of its matrices are aligned."""
    if name.startswith("_scaled_dot_product_flash_attention"):
        is_backward = name.endswith("backward")
        query, key = args[is_backward : is_backward + 2]
        return (10 if is_backward else 4) * query.numel() * key.shape[-2], True
    if name.rstrip("_") not in ("mm", "addmm", "bmm", "baddbmm"):
        return 0, True
    matrices = [x for x in args if isinstance(x, Tensor) and x.dim() >= 2]
    factors = matrices[-2:]
    flops = 2 * factors[0].numel() * factors[1].shape[-1]
    return flops, all(map(is_aligned, [*factors, outputs[0]]))


def is_aligned(matrix: Tensor) -> bool:
    """Whether the rows of a matrix, or its columns if those are contiguous, suit tensor cores."""
    strides, sizes = matrix.stride(), matrix.shape
    contiguous = -1 if strides[-1] == 1 else -2
    if strides[contiguous] != 1:
        return False
    elements = _ALIGNED_BYTES // matrix.element_size()
    counts = [sizes[contiguous], matrix.storage_offset()]
    counts += [stride for stride, size in zip(strides, sizes) if stride != 1 and size > 1]
    return all(count % elements == 0 for count in counts)


def _flash_attention(
    query, key, value, *, attn_mask=None, is_causal=False, scale=None, dropout_p=0.0
) -> Tensor:
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if p and training else x


@contextmanager
def _as_on_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """Lets the meta device stand for CUDA: autocast, fused AdamW, dropout and attention."""
    with ExitStack() as stack:
        for owner, name, value in (
            (torch, "is_autocast_enabled", lambda *_: dtype != torch.float32),
            (torch, "get_autocast_dtype", lambda *_: dtype),
            (F, "scaled_dot_product_attention", _flash_attention),
            (F, "dropout", _fused_dropout),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch(
            "lora_engine.training.trainer.autocast", lambda *_: nullcontext()
        ))
        stack.enter_context(mock.patch(
            "torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]
        ))
        yield


@cache
def meta_trainer(
    model: str,
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
    *,
    lora_dropout: float = DROPOUT,
    checkpoint_dropout: float = DROPOUT,
) -> Trainer:
    """The trainer of a captioner without values, with the published recipe's adapters."""
    from benchmarks.checkpoints import configuration

    config = configuration(model, small=small, dropout=checkpoint_dropout)
    with META:
        captioner = FAMILIES[config.model_type].from_config(config)
        inject(
            captioner, ["attention", "feed_forward"], rank=RANK, alpha=ALPHA, dropout=lora_dropout
        )
        captioner = place_model(captioner, META, dtype)
        with _as_on_a_gpu(dtype):
            return Trainer(captioner, device=META, dtype=dtype, lr=1e-5)


def step_budget(trainer: Trainer, batch_size: int, num_tokens: int) -> Budget:
    """What a step of one micro-batch takes, forward to AdamW."""
    batch = meta_batch(trainer, batch_size, num_tokens)
    budget = Budget(batch_size, sum(x.numel() * x.element_size() for x in batch.tensors(META)))
    kept = [trainer.lora.cast, *trainer.model.parameters(), *batch.tensors(META)]
    mine = {StorageWeakRef(x.untyped_storage()) for x in kept if x is not None}
    saved: dict[StorageWeakRef, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if StorageWeakRef(storage) not in mine:
            saved[StorageWeakRef(storage)] = storage.nbytes()
        return x

    with _as_on_a_gpu(trainer.dtype):
        if not trainer.optimizer.state:  # the first step makes what later ones find
            trainer.update(trainer.accumulate([batch], 0), lr=1e-5)
        with _Counting(budget):
            with saved_tensors_hooks(keep, lambda x: x):
                loss = trainer.accumulate([batch], 1)
            trainer.update(loss, lr=1e-5)
    budget.saved_bytes = sum(saved.values())
    return budget


def encoder_budget(trainer: Trainer, batch_size: int) -> Budget:
    """What encoding a batch of images takes, from their pixels on."""
    budget = Budget(batch_size, 0)
    size = trainer.model.encoder.image_size
    pixels = torch.empty(batch_size, 3, *size, dtype=torch.uint8, device=META)
    with _as_on_a_gpu(trainer.dtype), torch.no_grad(), _Counting(budget):
        trainer.model.encode(normalize(pixels, PIXELS).to(trainer.dtype))
    return budget


def card_of(device: torch.device, dtype: torch.dtype) -> Card | None:
    """The figures of a GPU; None if they are not known, and for fp32, which uses no tensor cores.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((card for card in CARDS.values() if re.search(card.pattern, name)), None)


def expected_captions_per_s(
    trainer: Trainer, card: Card, lengths: np.ndarray, *, batch_size: int, num_images: int = 0
) -> float:
    """The speed to expect of an epoch over captions of `lengths` (N,) tokens, start and end
    included, in which `num_images` images are encoded.

    Its batches are those of an epoch, padded as for a GPU.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    for rows in epoch_batches(lengths, batch_size=batch_size, seed=0, epoch=0):
        shapes[len(rows), bucket_length(int(lengths[rows].max()) - 1)] += 1
    seconds = sum(
        number * step_budget(trainer, *shape).seconds(card) for shape, number in shapes.items()
    )
    if num_images:
        together = encoder_batch_size(torch.device("cuda"), trainer.model.encoder.num_tokens)
        num_batches = -(-num_images // together)
        seconds += num_batches * encoder_budget(trainer, together).seconds(card)
    return len(lengths) / seconds


def meta_batch(trainer: Trainer, batch_size: int, num_tokens: int) -> FeatureBatch:
    encoder: Any = trainer.model.encoder
    number = batch_size * num_tokens
    with META:
        return FeatureBatch(
            input_ids=torch.empty(batch_size, num_tokens, dtype=torch.long),
            target_positions=torch.empty(number, dtype=torch.long),
            target_ids=torch.empty(number, dtype=torch.long),
            num_targets=number,
            rows=list(range(batch_size)),
            images=list(range(batch_size)),
            skipped=[],
            features=torch.empty(
                batch_size, encoder.num_tokens, encoder.width, dtype=trainer.dtype
            ),
        )


def graph_memory(budgets: Sequence[Budget]) -> dict[str, int]:
    """Bytes that the graphs of several shapes keep, by what they share."""
    peaks, inputs = ([getattr(b, f"{x}_bytes") for b in budgets] for x in ("peak", "input"))
    return {
        "of the largest alone": max(map(sum, zip(peaks, inputs))),
        "sharing nothing": sum(peaks) + sum(inputs),
        "sharing activations": max(peaks) + sum(inputs),
        "sharing inputs, too": max(peaks) + max(inputs),
    }


def caption_buckets(model: str) -> list[int]:
    """The padded lengths of captions as long as CC3M's."""
    from benchmarks.rows import Rows

    lengths = Rows(300, (1, 1), model=model).lengths
    return sorted({bucket_length(int(length) - 1) for length in lengths})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", dest="models", choices=MODELS, default=MODELS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--kinds", action="store_true", help="list the kernels by kind")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    arguments = parser.parse_args(argv)
    rows = [["model", "B", "T", "kernels", "GB", "GFLOP", "unaligned", "saved MB", "peak MB",
             "waits", *CARDS]]
    notes = []
    for model in arguments.models:
        trainer = meta_trainer(model, small=arguments.quick)
        for batch_size in arguments.batch_sizes:
            for length in arguments.lengths:
                budget = step_budget(trainer, batch_size, length)
                rows.append([
                    model, str(batch_size), str(length), f"{budget.num_kernels:,}",
                    f"{budget.num_bytes / 1e9:.1f}", f"{budget.flops / 1e9:,.0f}",
                    f"{budget.unaligned_share:.0%}", f"{budget.saved_bytes / 1e6:,.0f}",
                    f"{budget.peak_bytes / 1e6:,.0f}", str(len(budget.waits)),
                    *(f"{budget.captions_per_s(card):,.0f}" for card in CARDS.values()),
                ])
                if arguments.kinds:
                    kinds = ", ".join(f"{n} {kind}" for kind, n in budget.by_kind().most_common())
                    notes.append(f"{model}, B = {batch_size}, T = {length}: {kinds}")
            buckets = caption_buckets(model)
            memory = graph_memory([step_budget(trainer, batch_size, T) for T in buckets])
            sizes = ", ".join(f"{size / 1e6:,.0f} MB {kind}" for kind, size in memory.items())
            notes.append(f"{model}, B = {batch_size}, graphs of {len(buckets)} lengths: {sizes}")
    print("captions/s of each card are expected, not measured")
    print(table(rows))
    print("\n".join(notes))


if __name__ == "__main__":
    main()
