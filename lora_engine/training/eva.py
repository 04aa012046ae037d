"""EVA: A matrices that begin as principal components of their layers' inputs.

Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
https://arxiv.org/abs/2410.07170. Every layer keeps its rank: the paper's redistribution of ranks is
not done (rho = 1 in PEFT's EvaConfig).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lora_engine.data.batches import FeatureBatch
from lora_engine.devices import autocast
from lora_engine.lora.injection import lora_layers
from lora_engine.lora.layer import LoRALinear
from lora_engine.models import CaptioningModel

NUM_ROWS = 512  # captions of the first steps
_EXTRA = 8  # directions beyond the rank, which make those of the rank converge sooner
_NUM_ITERATIONS = 8


@dataclass
class _Moments:
    """The sum of a layer's inputs (in,) and of their products (in, in), both less `shift`."""

    shift: Tensor
    total: Tensor
    products: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        rows = rows.float() - self.shift
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products.addmm_(rows.T, rows)

    def covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)


@torch.no_grad()
def initialize_eva(
    model: CaptioningModel, batches: Iterable[FeatureBatch], *, device: torch.device
) -> None:
    """Set every lora_A of `model` to the first principal components of its layer's inputs on
    `batches`, most important first.

    B must still be zero. Padding does not count. There are at most as many components as inputs of
    a layer, and as tokens; rows of A beyond them stay as they are.
    """
    layers = [layer for _, layer in lora_layers(model)]
    was_training = model.training
    model.eval()
    moments: dict[LoRALinear, _Moments] = {}
    leaders: dict[LoRALinear, LoRALinear] = {}  # of layers that have the same input
    owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
    current: FeatureBatch | None = None
    features = torch.empty(0)

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert current is not None and isinstance(layer, LoRALinear)
        (x,) = inputs
        leader = leaders.setdefault(layer, owners.setdefault(x, layer))
        if leader is not layer:
            return
        rows = x.flatten(0, -2)
        is_text = x.data_ptr() != features.data_ptr()  # image features have no padding
        if is_text:
            positions = current.target_positions[: current.num_targets]  # a GPU's have more
            rows = rows[positions.to(x.device)]
        if layer not in moments:
            mean = rows.float().mean(dim=0)
            products = mean.new_zeros(len(mean), len(mean))
            moments[layer] = _Moments(mean, torch.zeros_like(mean), products)
        moments[layer].add(rows)

    # Layers with hooks are called one by one, whatever is computed together in training.
    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        with torch.compiler.set_stance("force_eager"):
            for current in batches:
                if current.rows:
                    input_ids, _, _, features = current.tensors(device)
                    with autocast(device, features.dtype):
                        model.decode(input_ids, features)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    for leader, found in moments.items():
        followers = [layer for layer in layers if leaders.get(layer) is leader]
        largest = max(layer.rank for layer in followers)
        components = principal_components(found.covariance(), min(largest, found.count))
        for layer in followers:
            layer.lora_A[: len(components)] = components[: layer.rank]
            if layer.cast_matrices is not None:  # a frozen A is not in what optimizers refresh
                layer.cast_matrices[0].copy_(layer.lora_A)


def principal_components(covariance: Tensor, count: int) -> Tensor:
    """The eigenvectors (count, N) of the largest eigenvalues of a covariance (N, N), by subspace
    iteration from torch's global generator."""
    size = len(covariance)
    basis = torch.randn(size, min(count + _EXTRA, size)).to(covariance)
    for _ in range(_NUM_ITERATIONS):
        basis, _ = torch.linalg.qr(covariance @ basis)
    _, vectors = torch.linalg.eigh(basis.T @ covariance @ basis)
    return (basis @ vectors).T.flip(0)[:count]
