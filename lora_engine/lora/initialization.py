"""Initial values of LoRA matrices, by the names of PEFT's `init_lora_weights`.

    default      A uniform (Kaiming), B zero            https://arxiv.org/abs/2106.09685
    gaussian     A normal, deviation 1 / rank, B zero
    orthogonal   A and B with orthogonal rows and columns, so that B A is zero
    pissa        principal singular vectors of W        https://arxiv.org/abs/2404.02948
    olora        the first columns of W's QR factors    https://arxiv.org/abs/2406.01775
    eva          principal components of the layer's inputs, B zero (training/eva.py)

PiSSA and OLoRA begin with an update that is not zero, and take it out of the frozen weight: the
layer computes what its base computed, up to rounding.
"""

import math
from reprlib import repr as shortened

import torch
from torch import Tensor, nn

INITIALIZATIONS = ("default", "gaussian", "orthogonal", "pissa", "olora")
CHANGES_WEIGHT = ("pissa", "olora")


def check_initialization(
    how: str | bool, rank: int, alpha: float, in_features: int, out_features: int
) -> None:
    """Raises ValueError for an initialization that is unknown, or impossible with this rank or
    alpha."""
    if how == "eva":
        raise ValueError(
            "init_lora_weights eva is computed from training data, which inject() does not have: "
            "give it to lora_engine.train or to a recipe"
        )
    if how not in INITIALIZATIONS:
        hint = " (B other than zero is not supported)" if how is False else ""
        raise ValueError(
            f"init_lora_weights is {shortened(how)}{hint}; expected "
            f"{', '.join(INITIALIZATIONS)} or eva"
        )
    if how == "orthogonal" and rank % 2:
        raise ValueError(f"init_lora_weights orthogonal needs an even rank, not {rank}")
    if how == "pissa" and alpha <= 0:
        raise ValueError(f"init_lora_weights pissa needs an alpha above 0, not {alpha:g}")
    if how in CHANGES_WEIGHT and rank > min(in_features, out_features):
        raise ValueError(
            f"init_lora_weights {how} takes at most {min(in_features, out_features)} singular "
            f"vectors or columns of a layer ({in_features} -> {out_features}), the rank is {rank}"
        )


def initial_matrices(how: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) for a weight (out, in), in its dtype and on its device.

    Random ones are drawn from torch's global generator.
    """
    num_out, num_in = weight.shape
    if how == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[:rank] / scaling).sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root
    if how == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:rank].contiguous(), Q[:, :rank].contiguous()
    if how == "orthogonal":  # A has rows in the span of odd, B columns in that of even rows of Q
        Q, _ = torch.linalg.qr(torch.randn(rank, rank).to(weight))
        A = Q[0::2].T @ torch.randn(num_in, rank // 2).to(weight).T / 10
        B = torch.randn(rank // 2, num_out).to(weight).T @ Q[1::2] / 10
        return A, B
    A = weight.new_empty(rank, num_in)
    if how == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, weight.new_zeros(num_out, rank)
