"""Matmuls with frozen operands, by the fastest kernel that torch has for them.

A frozen operand gets no gradient, so one of the three matmuls of a linear layer (forward, input
gradient, weight gradient) is never computed.

On AMD processors with AVX-512, fp32 matmuls use oneDNN. `F.linear` and `torch.bmm` use MKL, which
does not use the full vector width there and runs at less than half of oneDNN's rate. On Intel
processors MKL is faster (benchmarks/LOG.md).

Axes: M rows, N columns of the result, K the summed axis, B batch, H heads.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_engine.devices import attention_kernels, processor_supports


def _is_amd() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor


_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_USE_ONEDNN = _HAS_ONEDNN and _is_amd()
_CPU = "cpu"
_MIN_SIZE = 2**12  # elements of the second operand, below which the call of oneDNN costs too much


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matmul with `x`: autocast's if it is enabled, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def is_on_cpu(x: Tensor) -> bool:
    """Whether an operation costs what it computes; on a GPU each kernel has a price of its own."""
    return x.device.type == _CPU


def frozen_linear(x: Tensor, frozen: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K), frozen (N, K), bias (N) -> x frozen^T + bias (M, N).

    Use it inside autograd functions, or on operands that need no gradient: with oneDNN, autograd
    records nothing. `frozen` may be a transposed view.
    """
    is_small = frozen.numel() <= _MIN_SIZE or x.shape[0] == 0
    has_gradient = torch.is_grad_enabled() and (x.requires_grad or frozen.requires_grad)
    uses_torch = is_small or has_gradient or not uses_onednn(x.device, x.dtype)
    if uses_torch or frozen.dtype != torch.float32:
        return F.linear(x, frozen, bias)
    onednn = _onednn_op if torch.compiler.is_compiling() else _onednn
    return onednn(x, frozen, bias)


def uses_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls there use oneDNN instead of torch's choice."""
    return _USE_ONEDNN and device.type == "cpu" and dtype == torch.float32


def describe_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels for `dtype` on `device`, as a text for the run's first lines."""
    if device.type == "cuda":
        return f"attention by {attention_kernels(dtype)} kernels, no TF32"
    if dtype == torch.float32:
        return f"matmuls by {'oneDNN' if uses_onednn(device, dtype) else 'torch'}"
    if dtype == torch.bfloat16 and processor_supports("bf16"):
        return "matmuls by the processor's bf16 instructions"
    return "this processor may only emulate this format: fp32 may be faster"


def _onednn(x: Tensor, frozen: Tensor, bias: Tensor | None = None) -> Tensor:
    # For other strides oneDNN falls back to a reference kernel, which is a hundred times slower.
    if not (frozen.is_contiguous() or frozen.T.is_contiguous()):
        frozen = frozen.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), frozen, bias, "none", [], "")


def _batched_onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_onednn(rows, matrix) for rows, matrix in zip(x, y)])


# For torch.compile, which accepts oneDNN's own operator with constant matrices only.
_onednn_op = torch.library.custom_op("lora_engine::onednn", _onednn, mutates_args=())
_onednn_op.register_fake(lambda x, frozen, bias=None: x.new_empty(x.shape[0], frozen.shape[0]))
_batched_onednn_op = torch.library.custom_op(
    "lora_engine::batched_onednn", _batched_onednn, mutates_args=()
)
_batched_onednn_op.register_fake(lambda x, y: x.new_empty(*x.shape[:2], y.shape[1]))


class _FeatureMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return frozen_linear(features, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (features,) = ctx.saved_tensors
        if not is_on_cpu(gradient):
            return None, gradient.T @ features
        return None, frozen_linear(gradient.T.contiguous(), features.T)


def feature_matmul(features: Tensor, matrix: Tensor) -> Tensor:
    """features (M, K), matrix (N, K) -> features matrix^T (M, N); only `matrix` gets a gradient."""
    return _FeatureMatmul.apply(features, matrix)


def scaled_matmul(x: Tensor, y: Tensor, scaling: float) -> Tensor:
    """x (M, K), y (K, N) -> scaling * x y (M, N); on a GPU by one kernel."""
    if is_on_cpu(x):
        return frozen_linear(x, y.T).mul_(scaling)
    return x.new_empty(len(x), y.shape[1]).addmm_(x, y, beta=0, alpha=scaling)


def scaled_weight_gradient(gradient: Tensor, x: Tensor, scaling: float) -> Tensor:
    """gradient (M, N), x (M, K) -> scaling * gradient^T x (N, K), of the weight of a x W^T."""
    if not is_on_cpu(x):
        return scaled_matmul(gradient.T, x, scaling)
    # As the transpose of (K, M) (M, N): kernels are faster for a result with few rows than for one
    # with few columns.
    return (x.T @ gradient).mul_(scaling).T


def sum_of_matmuls(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of x (M, K) y (K, N) over the pairs -> (M, N); on a GPU by one kernel each."""
    if is_on_cpu(xs[0]):
        products = [frozen_linear(x, y.T) for x, y in zip(xs, ys)]
        return sum(products[1:], products[0])
    total = xs[0] @ ys[0]
    for x, y in zip(xs[1:], ys[1:]):
        total.addmm_(x, y)
    return total


class _BatchedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        # Each is saved only if the gradient of the other is needed.
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, y if ctx.needs_input_grad[0] else None
        )
        return _batched(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, y = ctx.saved_tensors
        dx = None if y is None else _batched(gradient, y.transpose(1, 2))
        dy = None
        if x is not None:  # gradient^T x, or its transpose if that has fewer rows
            if x.shape[2] < gradient.shape[2]:
                dy = _batched(x.transpose(1, 2), gradient.transpose(1, 2)).transpose(1, 2)
            else:
                dy = _batched(gradient.transpose(1, 2), x.transpose(1, 2))
        return dx, dy


def _batched(x: Tensor, y: Tensor) -> Tensor:
    if not uses_onednn(x.device, x.dtype):
        return torch.bmm(x, y.transpose(1, 2))
    return _batched_onednn_op(x, y) if torch.compiler.is_compiling() else _batched_onednn(x, y)


def batched_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x (B, M, K), y (B, N, K) -> x y^T (B, M, N), with gradients for both."""
    return _BatchedMatmul.apply(x, y)


def per_head_matmul(x: Tensor, frozen: Tensor) -> Tensor:
    """x (M, H, K), frozen (H, K, N) -> (M, H, N): each head times its own matrix."""
    out = batched_matmul(x.transpose(0, 1), frozen.transpose(1, 2))  # (H, M, N)
    return out.transpose(0, 1).contiguous()
