"""Matrix products with frozen operands equal plain torch, on every kernel and layout."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine.lora import matmul as matmul_module
from lora_engine.lora.matmul import batched_matmul, feature_matmul, frozen_linear, per_head_matmul

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SMALL, LARGE = (5, 7), (70, 90)  # (N, K), on either side of what is worth a call of oneDNN

needs_onednn = pytest.mark.skipif(
    not matmul_module._HAS_ONEDNN, reason="oneDNN is used on a CPU with AVX-512 alone"
)
onednn = pytest.param("onednn", torch.float32, marks=needs_onednn)
every_way = pytest.mark.parametrize(
    "way, dtype", [onednn, *(("plain", dtype) for dtype in RELATIVE)], ids=str
)
both_ways = pytest.mark.parametrize("way, dtype", [onednn, ("plain", torch.float32)], ids=str)

# Memory layouts of a matrix of n rows and k columns, or of a batch of them.
LAYOUTS = {
    "contiguous": lambda *b, n, k, **d: torch.randn(*b, n, k, **d),
    "transposed": lambda *b, n, k, **d: torch.randn(*b, k, n, **d).mT,
    "slice of rows": lambda *b, n, k, **d: torch.randn(*b, 3 * n, k, **d)[..., n : 2 * n, :],
    "slice of columns": lambda *b, n, k, **d: torch.randn(*b, n, 3 * k, **d)[..., k : 2 * k],
    "transposed slice": lambda *b, n, k, **d: torch.randn(*b, 3 * k, n, **d).mT[..., k : 2 * k],
    "every other row": lambda *b, n, k, **d: torch.randn(*b, 2 * n, k, **d)[..., ::2, :],
    "every other column": lambda *b, n, k, **d: torch.randn(*b, n, 2 * k, **d)[..., ::2],
    "one row repeated": lambda *b, n, k, **d: torch.randn(*b, 1, k, **d).expand(*b, n, k),
}


@pytest.fixture
def take(monkeypatch):
    """Chooses the kernel of fp32 products."""
    return lambda way: monkeypatch.setattr(matmul_module, "_USE_ONEDNN", way == "onednn")


def assert_equal(ours: Tensor, expected: Tensor, *, summed: int, what: object = "") -> None:
    """Equal within the rounding of sums of `summed` products."""
    relative = RELATIVE[ours.dtype]
    torch.testing.assert_close(
        ours, expected.to(ours.dtype), rtol=relative, atol=relative * summed**0.5,
        msg=lambda message: f"{what}: {message}",
    )


def onednn_calls(function) -> int:
    """The number of oneDNN calls, compiled or not."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return counts.get("mkldnn::_linear_pointwise", 0)


# --- one product ----------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("shape", [SMALL, LARGE, (1, 5000), (5000, 1)])
def test_a_product_is_x_times_the_transpose_plus_bias_in_every_layout(
    take, way, dtype, num_rows, shape
):
    take(way)
    n, k = shape
    for x_layout, layout, has_bias in itertools.product(LAYOUTS, LAYOUTS, [False, True]):
        x = LAYOUTS[x_layout](n=num_rows, k=k, dtype=dtype)
        frozen = LAYOUTS[layout](n=n, k=k, dtype=dtype)
        bias = torch.randn(n, dtype=dtype) if has_bias else None
        out = frozen_linear(x, frozen, bias)
        expected = x.double() @ frozen.double().T
        if bias is not None:
            expected += bias.double()
        assert out.dtype == dtype
        assert_equal(out, expected, summed=k, what=(x_layout, layout, has_bias))


@needs_onednn
def test_oneDNN_takes_fp32_products_of_some_size_alone(take):
    take("onednn")
    x = torch.randn(3, 64)
    assert onednn_calls(lambda: frozen_linear(x, torch.randn(65, 64))) == 1
    assert onednn_calls(lambda: frozen_linear(x, torch.randn(64, 65).T)) == 1
    assert not onednn_calls(lambda: frozen_linear(x, torch.randn(64, 64)))
    assert not onednn_calls(lambda: frozen_linear(x[:0], torch.randn(65, 64)))
    for dtype in (torch.float64, torch.bfloat16):
        frozen = torch.randn(65, 64, dtype=dtype)
        assert not onednn_calls(lambda: frozen_linear(x.to(dtype), frozen))


class Operands(TorchDispatchMode):
    """Records the operands of oneDNN calls."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(args[:2])
        return function(*args, **(kwargs or {}))


@needs_onednn
def test_oneDNN_never_sees_strides_that_it_is_slow_at_and_a_transpose_is_not_copied(take):
    take("onednn")
    for x_layout, layout in itertools.product(LAYOUTS, LAYOUTS):
        x, frozen = LAYOUTS[x_layout](n=3, k=90), LAYOUTS[layout](n=70, k=90)
        with Operands() as operands:
            frozen_linear(x, frozen)
        (seen_x, seen), = operands.seen
        assert seen_x.is_contiguous(), x_layout
        assert seen.is_contiguous() or seen.T.is_contiguous(), layout
        if layout in ("contiguous", "transposed", "slice of rows"):
            assert seen.data_ptr() == frozen.data_ptr()


# --- products of a batch --------------------------------------------------------------------


def batched_cases():
    """(x layout, y layout, B, M, N, K): every layout, and sizes around each threshold."""
    for x_layout, y_layout in itertools.product(LAYOUTS, LAYOUTS):
        yield x_layout, y_layout, 3, 4, 5, 6
    for sizes in [(1, 4, 5, 6), (2, 4, 6, 5), (2, 1, 1, 1), (2, 7, 70, 90), (1, 7, 90, 70)]:
        yield "contiguous", "transposed", *sizes


@every_way
def test_a_batched_product_and_its_gradients_equal_plain_torchs(take, way, dtype):
    take(way)
    for x_layout, y_layout, b, m, n, k in batched_cases():
        x = LAYOUTS[x_layout](b, n=m, k=k, dtype=dtype).requires_grad_()
        y = LAYOUTS[y_layout](b, n=n, k=k, dtype=dtype).requires_grad_()
        out = batched_matmul(x, y)
        # The gradient of a sum is expanded, with strides of zero.
        for cotangent in (torch.randn(b, m, n, dtype=dtype), torch.ones((), dtype=dtype)):
            cotangent = cotangent.expand(b, m, n)
            gradients = torch.autograd.grad(out, (x, y), cotangent, retain_graph=True)
            as_x, as_y = (t.detach().double().requires_grad_() for t in (x, y))
            expected = as_x @ as_y.mT
            expected_gradients = torch.autograd.grad(expected, (as_x, as_y), cotangent.double())
            what = x_layout, y_layout, b, m, n, k
            assert_equal(out, expected, summed=k, what=what)
            assert_equal(gradients[0], expected_gradients[0], summed=n, what=("dx", what))
            assert_equal(gradients[1], expected_gradients[1], summed=m, what=("dy", what))


@both_ways
def test_one_operand_can_serve_a_whole_batch(take, way, dtype):
    """The gradient of an operand that is expanded over the batch is a sum."""
    take(way)
    x = torch.randn(4, 3, 6, dtype=dtype, requires_grad=True)
    y = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(4, 3, 5, dtype=dtype)
    ours = torch.autograd.grad(batched_matmul(x, y.expand(4, 5, 6)), (x, y), cotangent)
    expected = torch.autograd.grad(x @ y.T, (x, y), cotangent)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 3, 5, 4), (1, 1, 3, 2)])
def test_gradients_of_a_batched_product_equal_finite_differences(sizes):
    b, m, n, k = sizes
    x = torch.randn(b, m, k, dtype=torch.float64, requires_grad=True)
    y = torch.randn(b, k, n, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, y: batched_matmul(x, y.mT), (x, y))


@pytest.mark.parametrize("x_needs", [False, True])
@pytest.mark.parametrize("y_needs", [False, True])
def test_only_gradients_that_are_needed_are_formed_and_only_what_they_need_is_kept(
    monkeypatch, x_needs, y_needs
):
    formed, kept = [], []
    batched = matmul_module._batched
    monkeypatch.setattr(matmul_module, "_batched", lambda *pair: formed.append(1) or batched(*pair))
    x = torch.randn(2, 3, 5, requires_grad=x_needs)
    y = torch.randn(2, 4, 5, requires_grad=y_needs)
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = batched_matmul(x, y)
    assert len(formed) == 1
    assert kept == [t.data_ptr() for t, needed in ((x, y_needs), (y, x_needs)) if needed]
    if x_needs or y_needs:
        out.sum().backward()
    assert len(formed) == 1 + x_needs + y_needs
    assert (x.grad is not None, y.grad is not None) == (x_needs, y_needs)


@needs_onednn
def test_oneDNN_takes_batched_products_of_fp32_forward_and_backward(take):
    take("onednn")
    x, y = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    assert onednn_calls(lambda: batched_matmul(x, y)) == 2
    out = batched_matmul(x, y).sum()
    assert onednn_calls(out.backward) == 4
    assert not onednn_calls(lambda: batched_matmul(x.double(), y.double()))


def test_the_maker_of_the_processor_is_read_from_where_the_system_says_it(monkeypatch):
    for text in ("vendor_id : AuthenticAMD", "vendor_id : GenuineIntel"):
        monkeypatch.setattr(matmul_module.Path, "read_text", lambda *_, text=text, **__: text)
        assert matmul_module._is_amd() == ("AMD" in text)

    def no_such_file(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(matmul_module.Path, "read_text", no_such_file)
    monkeypatch.setattr(
        matmul_module.platform, "processor", lambda: "AMD64 Family 25, AuthenticAMD"
    )
    assert matmul_module._is_amd()


# --- a product per head --------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_product_of_heads_is_one_for_each_head_with_the_inputs_gradient_alone(
    take, way, dtype, shape
):
    take(way)
    n, k = shape
    for layout in LAYOUTS:
        x = torch.randn(9, 3, k, dtype=dtype, requires_grad=True)
        matrices = LAYOUTS[layout](3, n=k, k=n, dtype=dtype)
        out = per_head_matmul(x, matrices)
        assert out.is_contiguous()
        expected = torch.einsum("mhk,hkn->mhn", x.double(), matrices.double())
        assert_equal(out, expected.detach(), summed=k, what=layout)
        cotangent = torch.randn(9, 3, n, dtype=dtype)
        (gradient,) = torch.autograd.grad(out, x, cotangent)
        expected = torch.einsum("mhn,hkn->mhk", cotangent.double(), matrices.double())
        assert_equal(gradient, expected, summed=n, what=layout)


# --- a product with features ----------------------------------------------------------------


@every_way
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_a_product_of_features_has_the_matrixs_gradient_alone(take, way, dtype, shape):
    take(way)
    n, k = shape
    for layout, matrix_layout in itertools.product(LAYOUTS, LAYOUTS):
        features = LAYOUTS[layout](n=130, k=k, dtype=dtype)
        matrix = LAYOUTS[matrix_layout](n=n, k=k, dtype=dtype).requires_grad_()
        out = feature_matmul(features, matrix)
        what = layout, matrix_layout
        assert_equal(out, features.double() @ matrix.double().T, summed=k, what=what)
        for cotangent in (torch.randn(130, n, dtype=dtype), torch.ones((), dtype=dtype)):
            cotangent = cotangent.expand(130, n)
            (gradient,) = torch.autograd.grad(out, matrix, cotangent, retain_graph=True)
            assert_equal(gradient, cotangent.double().T @ features.double(), summed=130, what=what)


def test_the_gradient_of_a_product_of_features_equals_finite_differences():
    features = torch.randn(6, 4, dtype=torch.float64)
    matrix = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda matrix: feature_matmul(features, matrix), (matrix,))


# --- compiled -------------------------------------------------------------------------------


def all_products(x: Tensor, y: Tensor, features: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """One product of each kind, of x (B, M, K), y (B, N, K), features (P, K) and bias (P)."""
    return (
        frozen_linear(x.detach().flatten(0, 1), features, bias),
        batched_matmul(x, y),
        feature_matmul(features, y[0]),
    )


@both_ways
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_products_and_gradients_equal_eager_ones_on_the_same_kernels(
    take, way, dynamic, dtype
):
    take(way)
    torch._dynamo.reset()
    compiled = torch.compile(all_products, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    features, bias = torch.randn(90, 70, dtype=dtype).T, torch.randn(70, dtype=dtype)
    for num_tokens in (3, 4):
        x = torch.randn(2, num_tokens, 90, dtype=dtype, requires_grad=True)
        y = torch.randn(2, 5, 90, dtype=dtype, requires_grad=True)
        expected, outs = all_products(x, y, features, bias), compiled(x, y, features, bias)
        torch.testing.assert_close(outs, expected, rtol=1e-6, atol=1e-6)
        gradients = [
            torch.autograd.grad(scores.sum() + low_rank.square().sum(), (x, y))
            for _, scores, low_rank in (outs, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    calls = onednn_calls(lambda: compiled(x, y, features, bias))
    assert calls == (1 + len(x) if way == "onednn" else 0)  # the last one is too small


@needs_onednn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_compiler_knows_of_the_operators_is_true(layout):
    """torch's checks of custom operators: shapes, strides, and no mutation."""
    x, frozen = LAYOUTS[layout](n=4, k=6), LAYOUTS[layout](n=5, k=6)
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(matmul_module._onednn_op, (x, frozen, bias))
    x, y = LAYOUTS[layout](2, n=4, k=6), LAYOUTS[layout](2, n=5, k=6)
    torch.library.opcheck(matmul_module._batched_onednn_op, (x, y))
