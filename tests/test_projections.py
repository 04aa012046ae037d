"""`project` against LoRA's formula as written out: values and all gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from flop_count import count_flops
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_engine.lora import layer as layer_module
from lora_engine.lora.dropout import dropout_mask
from lora_engine.lora.injection import cast_frozen
from lora_engine.lora.layer import LoRALinear, project
from lora_engine.training.optim import FlatLoRAParameters

IN = 12
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def frozen(out: int, *, bias: bool = True, width: int = IN) -> nn.Linear:
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def adapted(out: int, rank: int, alpha: float = 6.0, base: nn.Module | None = None) -> LoRALinear:
    """A LoRA layer whose B is not zero."""
    layer = LoRALinear(base or frozen(out), rank=rank, alpha=alpha)
    nn.init.normal_(layer.lora_B)
    return layer


def conv1d(out: int) -> Conv1D:
    base = Conv1D(out, IN)
    nn.init.normal_(base.bias)
    return base


def merged(out: int, rank: int) -> LoRALinear:
    layer = adapted(out, rank)
    layer.merge()
    return layer


# Groups of layers that share an input.
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "one": lambda: [adapted(9, 3)],
    "query, key and value": lambda: [adapted(8, 3), adapted(8, 3), adapted(8, 3)],
    "query and value": lambda: [adapted(8, 3), frozen(8), adapted(8, 3)],
    "the last alone": lambda: [frozen(8), frozen(4), adapted(8, 3)],
    "ranks and scalings": lambda: [adapted(8, 1, 2.0), adapted(8, 5, 7.0), adapted(8, 2, -3.0)],
    "a scaling of 0": lambda: [adapted(8, 2, 0.0), adapted(8, 3)],
    "one scaling, of 0": lambda: [adapted(8, 2, 0.0)],
    "widths": lambda: [adapted(7, 3), frozen(5), adapted(16, 2)],
    "some biases": lambda: [
        adapted(8, 3, base=frozen(8, bias=False)), frozen(8, bias=False), adapted(8, 3)
    ],
    "conv1d": lambda: [adapted(9, 2, base=conv1d(9)), adapted(8, 3)],
    "one merged": lambda: [merged(8, 2), adapted(8, 3)],
    "all merged": lambda: [merged(8, 2), merged(8, 3)],
    "nothing adapted": lambda: [frozen(8), frozen(4)],
}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def layers_of(kind: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
    layers = LAYERS[kind]()
    for layer in layers:
        layer.to(dtype)
        if isinstance(layer, LoRALinear):
            layer.dropout = dropout
    return layers


def adapters(layers: Sequence[nn.Module]) -> list[LoRALinear]:
    """The layers with an adapter that is not merged."""
    return [layer for layer in layers if isinstance(layer, LoRALinear) and not layer.merged]


def matrices(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [matrix for layer in adapters(layers) for matrix in (layer.lora_A, layer.lora_B)]


def formula(x: Tensor, layers: Sequence[nn.Module], kept: Tensor | None = None) -> list[Tensor]:
    """W x + b + scaling B A dropout(x) of each layer, with `kept` as the dropout mask."""
    outs = []
    for layer in layers:
        weight = layer.weight.T if getattr(layer, "weight_is_transposed", False) else layer.weight
        out = x @ weight.T if layer.bias is None else x @ weight.T + layer.bias
        if layer in adapters(layers):
            _, share = dropout_mask(x, layer.dropout)
            dropped = x if kept is None else torch.where(kept, x / share, 0.0)
            out = out + layer.scaling * (dropped @ layer.lora_A.T @ layer.lora_B.T)
        outs.append(out)
    return outs


def gradients(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a random linear combination of all outputs."""
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
    return torch.autograd.grad(outs, inputs, cotangents)


def assert_equal(outs, expected, inputs, *, rtol: float, atol: float) -> None:
    """Compare values and all gradients."""
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(list(outs), list(expected), **close)
    torch.testing.assert_close(gradients(outs, inputs), gradients(expected, inputs), **close)


@pytest.fixture
def masks(monkeypatch) -> list[Tensor | None]:
    """Records every dropout mask."""
    drawn = []
    draw = layer_module._dropout_mask

    def spy(x, layers):
        kept, share = draw(x, layers)
        drawn.append(kept)
        return kept, share

    monkeypatch.setattr(layer_module, "_dropout_mask", spy)
    return drawn


# --- the formula ----------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 2)], ids=str)
def test_layers_of_one_input_equal_the_formula(kind, shape):
    layers = layers_of(kind)
    x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
    assert_equal(project(x, *layers), formula(x, layers), [x, *matrices(layers)], **EXACT)


@every_kind
def test_gradients_equal_finite_differences(kind):
    layers = layers_of(kind)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    # gradcheck changes the matrices in place, so the layers see every step.
    assert gradcheck(lambda x, *_: project(x, *layers), (x, *matrices(layers)))


@every_kind
def test_dropout_is_one_mask_for_all_layers_of_the_input(kind, masks):
    layers = layers_of(kind, dropout=0.4)
    x = torch.randn(4, 7, IN, dtype=torch.float64, requires_grad=True)
    outs = project(x, *layers)
    kept, = masks
    assert (kept is not None) == bool(adapters(layers))
    if kept is not None:
        assert 0.5 < kept.double().mean() < 0.7
        kept = kept.view_as(x)
    assert_equal(outs, formula(x, layers, kept), [x, *matrices(layers)], **EXACT)


def test_dropout_gradients_equal_finite_differences(monkeypatch):
    layers = layers_of("query and value", dropout=0.4)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(3, IN) < 0.6
    monkeypatch.setattr(layer_module, "_dropout_mask", lambda *_: (kept, 0.6))
    assert gradcheck(lambda x, *_: project(x, *layers), (x, *matrices(layers)))


def test_in_evaluation_nothing_is_dropped(masks):
    layers = layers_of("query and value", dropout=0.4)
    for layer in layers:
        layer.eval()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert_equal(project(x, *layers), formula(x, layers), [x, *matrices(layers)], **EXACT)
    assert masks == [None]


@pytest.mark.parametrize("x_is", ["transposed", "a slice", "one row"])
def test_any_strides_work(x_is):
    layers = layers_of("query and value")
    x = torch.randn(30, 30, dtype=torch.float64, requires_grad=True)
    view = {
        "transposed": x[:IN].T, "a slice": x[::2, 3 : 3 + IN], "one row": x[:1, :IN].expand(5, IN),
    }[x_is]
    assert_equal(project(view, *layers), formula(view, layers), [x, *matrices(layers)], **EXACT)


@every_kind
def test_an_expanded_gradient_works(kind):
    """Such as that of a sum, whose strides are zero."""
    layers = layers_of(kind)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    totals = [sum(out.sum() for out in outs) for outs in (project(x, *layers), formula(x, layers))]
    ours, expected = (torch.autograd.grad(total, [x, *matrices(layers)]) for total in totals)
    torch.testing.assert_close(ours, expected, **EXACT)


def test_unused_outputs_add_no_gradient():
    layers = layers_of("ranks and scalings")
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    ours, expected = (
        gradients(outs[1:2], [x, *matrices(layers[1:2])])
        for outs in (project(x, *layers), formula(x, layers))
    )
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_in_fp32_large_layers_equal_the_formula_too(dropout, masks):
    """Large enough to use oneDNN on processors where it is used."""
    width = 80
    layers: list[nn.Module] = [
        adapted(90, 3, base=frozen(90, width=width)), frozen(70, width=width),
        adapted(64, 8, base=frozen(64, width=width, bias=False)),
    ]
    for layer in adapters(layers):
        layer.dropout = dropout
    x = torch.randn(3, 11, width, requires_grad=True)
    outs = project(x, *layers)
    kept = None if masks[0] is None else masks[0].view_as(x)
    expected = formula(x, layers, kept)
    assert_equal(outs, expected, [x, *matrices(layers)], rtol=1e-4, atol=1e-4)


# --- only what is needed --------------------------------------------------------------------


@every_kind
def test_only_the_matrices_and_an_input_that_needs_it_get_a_gradient(kind):
    layers = layers_of(kind, dropout=0.2)
    for needs_gradient in (False, True):
        x = torch.randn(4, IN, dtype=torch.float64, requires_grad=needs_gradient)
        outs = project(x, *layers)
        assert all(out.requires_grad == bool(needs_gradient or adapters(layers)) for out in outs)
        if outs[0].requires_grad:
            sum(out.sum() for out in outs).backward()
        assert (x.grad is not None) == needs_gradient
    for layer in layers:
        assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)
    assert all(matrix.grad is not None for matrix in matrices(layers))


@every_kind
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_only_needed_products_are_computed(kind, needs_gradient):
    """Forward: W x, A x, B A x. Backward: dA, dB and their G; with W and A for dX if needed."""
    layers, num_rows = layers_of(kind), 7
    x = torch.randn(num_rows, IN, dtype=torch.float64, requires_grad=needs_gradient)
    dense = sum(2 * num_rows * layer.weight.numel() for layer in layers)
    into_rank = sum(2 * num_rows * layer.lora_A.numel() for layer in adapters(layers))
    out_of_rank = sum(2 * num_rows * layer.lora_B.numel() for layer in adapters(layers))
    with count_flops() as forward:
        outs = project(x, *layers)
    assert forward.get_total_flops() == dense + into_rank + out_of_rank
    with count_flops() as backward:
        if outs[0].requires_grad:
            sum(out.sum() for out in outs).backward()
    of_matrices = into_rank + 2 * out_of_rank  # dA; dB and G
    of_input = dense + into_rank if needs_gradient else 0
    assert backward.get_total_flops() == of_matrices + of_input


@every_kind
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_input_is_kept_once_for_the_backward_pass_and_only_for_an_adapter(kind, dropout):
    layers, num_rows = layers_of(kind, dropout=dropout), 37
    x = torch.randn(num_rows, IN, dtype=torch.float64, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        project(x, *layers)
    of_rows = [t for t in kept if num_rows in t.shape]
    total_rank = sum(layer.rank for layer in adapters(layers))
    expected = [(x.shape, x.dtype), ((num_rows, total_rank), x.dtype)] if total_rank else []
    if total_rank and dropout:
        expected.insert(1, (x.shape, torch.bool))
    assert [(t.shape, t.dtype) for t in of_rows] == expected
    assert not of_rows or of_rows[0].data_ptr() == x.data_ptr()
    weights = {layer.weight.data_ptr() for layer in layers}
    assert weights <= {t.data_ptr() for t in kept}  # themselves, no copies


# --- layers that are called -----------------------------------------------------------------


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def trained_weight() -> nn.Module:
    return nn.Linear(IN, 8)


def trained_bias() -> nn.Module:
    layer = frozen(8)
    layer.bias.requires_grad_(True)
    return layer


class DoubledLoRA(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled_lora() -> nn.Module:
    layer = DoubledLoRA(frozen(8), rank=3, alpha=6.0)
    nn.init.normal_(layer.lora_B)
    return layer


def replaced_forward(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def parametrized() -> nn.Module:
    layer = frozen(8)
    return parametrize.register_parametrization(layer, "weight", nn.Tanh()).requires_grad_(False)


# Layers whose call is not the formula with their weight, bias, A and B.
OTHER_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Doubled(IN, 8).requires_grad_(False),
    "subclass of LoRALinear": doubled_lora,
    "replaced forward": lambda: replaced_forward(frozen(8)),
    "replaced forward of LoRALinear": lambda: replaced_forward(adapted(8, 3)),
    "parametrization": parametrized,
    "trained weight": trained_weight,
    "trained bias": trained_bias,
    "sequence": lambda: nn.Sequential(frozen(8), nn.Tanh()),
    "bare Conv1D": lambda: conv1d(8),
}


@pytest.mark.parametrize("other", OTHER_LAYERS)
def test_layers_of_other_kinds_and_trained_layers_are_called(other):
    layer, beside = OTHER_LAYERS[other]().double(), adapted(8, 3).double()
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *matrices([beside]), *(p for p in layer.parameters() if p.requires_grad)]
    assert_equal(project(x, layer, beside), [layer(x), beside(x)], inputs, **EXACT)


every_hook = pytest.mark.parametrize("register", [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
])


@every_hook
@pytest.mark.parametrize("make", [lambda: frozen(8), lambda: adapted(8, 3)], ids=["frozen", "lora"])
def test_hooks_are_run(make, register):
    layer, beside = make(), adapted(8, 3)
    calls = []
    getattr(layer, register)(lambda *_: calls.append(1))
    x = torch.randn(4, IN, requires_grad=True)
    outs = project(x, layer, beside)
    assert_equal(outs, formula(x, [layer, beside]), [x], rtol=1e-5, atol=1e-5)
    assert calls


@every_hook
def test_hooks_of_all_modules_are_run(register):
    """Global hooks, such as those of profilers."""
    layers, seen = [frozen(8), adapted(8, 3)], []
    x = torch.randn(4, IN, requires_grad=True)
    name = register.replace("register_", "register_module_")
    handle = getattr(nn.modules.module, name)(lambda module, *_: seen.append(module))
    try:
        outs = project(x, *layers)
        sum(out.sum() for out in outs).backward()
    finally:
        handle.remove()
    assert sorted(map(id, seen)) == sorted(map(id, layers))


def test_a_layer_that_was_compiled_is_called():
    layer, x = frozen(8), torch.randn(4, IN)
    layer._compiled_call_impl = lambda x: torch.zeros(4, 8)  # what nn.Module.compile sets
    assert not project(x, layer)[0].any()


def test_each_layer_keeps_its_own_dropout_probability(masks):
    layers = layers_of("query and value", dropout=0.4)
    layers[-1].dropout = 0.0
    x = torch.randn(50, IN, dtype=torch.float64, requires_grad=True)
    project(x, *layers)
    assert [mask is None for mask in masks] == [False, True]


# --- half precision -------------------------------------------------------------------------


def half(kind: str, dtype: torch.dtype) -> list[nn.Module]:
    layers = layers_of(kind, dtype=torch.float32)
    for layer in layers:
        cast_frozen(layer, dtype)
    return layers


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_values_and_gradients_stay_near_the_formula(kind, dtype):
    """Within 1 % of the norm (bf16) or 0.15 % (fp16); gradients have their tensors' dtype."""
    layers = half(kind, dtype)
    x = torch.randn(2, 20, IN, requires_grad=True)
    with torch.autocast("cpu", dtype):
        outs = project(x, *layers)
    ours = [*outs, *gradients(outs, [x, *matrices(layers)])]
    accurate = layers_of(kind)
    for layer, copy in zip(layers, accurate):
        copy.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    expected_outs = formula(wide, accurate)
    expected = [*expected_outs, *gradients(expected_outs, [wide, *matrices(accurate)])]
    assert {out.dtype for out in outs} == {dtype}
    assert {gradient.dtype for gradient in ours[len(outs) :]} == {torch.float32}
    for one, other in zip(ours, expected, strict=True):
        limit = {torch.bfloat16: 0.01, torch.float16: 0.0015}[dtype]
        assert (one - other).norm() <= limit * other.norm()


def test_gradients_of_cast_matrices_are_added_up_in_fp32():
    """Accumulated over micro-batches they equal the exact fp32 sum."""
    layers = half("ranks and scalings", torch.bfloat16)
    flat = FlatLoRAParameters(adapters(layers), torch.bfloat16)
    batches = [torch.randn(5, IN) * 10.0 ** -number for number in range(4)]

    def add_gradients(x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            outs = project(x, *layers)
        sum(out.float().square().sum() for out in outs).backward()

    alone = []
    for batch in batches:
        flat.gradient.zero_()
        add_gradients(batch)
        alone.append(flat.gradient.clone())
    flat.gradient.zero_()
    for batch in batches:
        add_gradients(batch)
    assert flat.gradient.dtype == torch.float32
    assert torch.equal(flat.gradient, sum(alone[1:], alone[0]))
    in_bf16 = sum((gradient.bfloat16() for gradient in alone[1:]), alone[0].bfloat16())
    assert not torch.equal(in_bf16.float(), flat.gradient)  # bf16 sums would differ


# --- compilation and checkpointing ----------------------------------------------------------


@pytest.mark.parametrize("kind, dropout", [
    ("query and value", 0.4), ("conv1d", 0.4), ("nothing adapted", 0.0),
])
def test_compiled_projections_equal_eager_ones(kind, dropout):
    torch._dynamo.reset()
    layers = layers_of(kind, dropout=dropout)
    compiled = torch.compile(project, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_rows in (3, 5):
        x = torch.randn(2, num_rows, IN, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        expected = project(x, *layers)
        torch.manual_seed(1)
        outs = compiled(x, *layers)
        assert_equal(outs, expected, [x, *matrices(layers)], **EXACT)


def test_compiled_projections_with_cast_matrices_equal_eager_ones():
    torch._dynamo.reset()
    layers = half("query and value", torch.bfloat16)
    flat = FlatLoRAParameters(adapters(layers), torch.bfloat16)
    compiled = torch.compile(project, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, IN, requires_grad=True)
    results = []
    for function in (project, compiled):
        flat.gradient.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            outs = function(x, *layers)
        sum(out.float().square().sum() for out in outs).backward()
        results.append([*outs, flat.gradient.clone()])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    assert results[0][-1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_leaves_values_and_gradients(dropout):
    layers = layers_of("query and value", dropout=dropout)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return sum(F.gelu(out) for out in project(x, *layers))

    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    out = checkpoint(block, x, use_reentrant=False)
    torch.manual_seed(2)  # whatever has been drawn in between
    inputs = [x, *matrices(layers)]
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(gradients([out], inputs), gradients([expected], inputs), **EXACT)
