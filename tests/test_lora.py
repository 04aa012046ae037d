"""LoRA's algebra against PEFT; injection, target matching and its errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_engine.lora import layer as layer_module
from lora_engine.lora.dropout import dropout_mask
from lora_engine.lora.injection import (
    cast_frozen,
    count_parameters,
    inject,
    lora_layers,
    lora_parameters,
    merge,
    select,
    unmerge,
)
from lora_engine.lora.layer import LinearParts, LoRALinear
from lora_engine.models import cross_attention

IN, OUT, RANK = 12, 20, 3


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def linear_without_bias() -> nn.Module:
    return nn.Linear(IN, OUT, bias=False)


def conv1d() -> nn.Module:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


every_kind = pytest.mark.parametrize("make_base", [linear, linear_without_bias, conv1d])


def adapted(base: nn.Module, *, alpha: float = 6.0, **settings) -> LoRALinear:
    """A LoRA layer whose B is not zero."""
    layer = LoRALinear(base, rank=RANK, alpha=alpha, **settings)
    nn.init.normal_(layer.lora_B)
    return layer


class Tree(nn.Module):
    """A small module tree with similar names; `lora_scope` excludes `head` and `encoder`."""

    lora_groups = {"attention": r".*\.(query|value)", "mlp": r".*\.mlp\.dense"}
    lora_scope = r"body\..*"

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"query": nn.Linear(4, 4)})
        self.body = nn.ModuleList(
            nn.ModuleDict({
                "query": nn.Linear(4, 4),
                "value": nn.Linear(4, 6),
                "subquery": nn.Linear(4, 4),
                "query_norm": nn.Linear(4, 4),
                "mlp": nn.ModuleDict({"dense": Conv1D(8, 4)}),
                "norm": nn.LayerNorm(4),
            })
            for _ in range(2)
        )
        self.head = nn.ModuleDict({"dense": nn.Linear(4, 4)})


# --- the formula ----------------------------------------------------------------------------


@every_kind
def test_zero_B_is_the_identity(make_base):
    base = make_base()
    x = torch.randn(2, 5, IN)
    expected = base(x)
    torch.testing.assert_close(LoRALinear(base, rank=RANK, alpha=6)(x), expected, rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("rslora", [False, True])
def test_formula_equals_pefts(make_base, rslora):
    base = make_base()
    is_conv1d = isinstance(base, Conv1D)
    config = LoraConfig(
        r=RANK, lora_alpha=7, use_rslora=rslora, fan_in_fan_out=is_conv1d, lora_dropout=0.0
    )
    theirs = PeftLinear(
        copy.deepcopy(base), "default", config, r=RANK, lora_alpha=7, fan_in_fan_out=is_conv1d,
        is_target_conv_1d_layer=is_conv1d,
    )
    ours = adapted(base, alpha=7, use_rslora=rslora)
    with torch.no_grad():
        assert ours.lora_A.shape == theirs.lora_A["default"].weight.shape
        assert ours.lora_B.shape == theirs.lora_B["default"].weight.shape
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    x = torch.randn(2, 5, IN)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_formula_of_conv1d_is_that_of_the_transposed_linear():
    base = conv1d()
    twin = nn.Linear(IN, OUT)
    twin.load_state_dict({"weight": base.weight.T, "bias": base.bias})
    ours, its_twin = adapted(base), adapted(twin)
    its_twin.load_state_dict({"lora_A": ours.lora_A, "lora_B": ours.lora_B}, strict=False)
    assert ours.lora_A.shape == (RANK, IN) and ours.lora_B.shape == (OUT, RANK)
    x = torch.randn(5, IN)
    torch.testing.assert_close(ours(x), its_twin(x), rtol=1e-6, atol=1e-6)


def test_scaling_is_alpha_over_rank_or_over_its_root():
    assert LoRALinear(linear(), rank=4, alpha=32).scaling == 8
    assert LoRALinear(linear(), rank=4, alpha=32, use_rslora=True).scaling == 16
    ours = adapted(linear(), alpha=6)
    x = torch.randn(5, IN)
    base = F.linear(x, ours.weight, ours.bias)
    doubled = adapted(linear(), alpha=12)
    doubled.load_state_dict(ours.state_dict())
    torch.testing.assert_close(doubled(x) - base, 2 * (ours(x) - base), rtol=1e-5, atol=1e-5)


def test_A_starts_as_pefts_does():
    torch.manual_seed(3)
    ours = LoRALinear(linear_without_bias(), rank=RANK, alpha=1)
    torch.manual_seed(3)
    base = linear_without_bias()
    expected = torch.empty(RANK, IN)
    nn.init.kaiming_uniform_(expected, a=5**0.5)
    assert torch.equal(ours.lora_A, expected) and not ours.lora_B.any()
    assert torch.equal(ours.weight, base.weight)


def test_the_formula_has_one_definition(monkeypatch, captioner):
    """Changing `linear_parts` changes calls, both forms of cross-attention, and merging alike."""
    model = captioner.model.double()
    inject(model, ["attention", "feed_forward"], rank=2, dropout=0.0)
    for matrix in lora_parameters(model).values():
        nn.init.normal_(matrix, std=0.1)
    features, tokens = torch.randn(2, 17, 64).double(), torch.randint(20, 90, (2, 5))

    def logits() -> list[torch.Tensor]:
        outs = []
        for is_absorbed in (False, True):
            monkeypatch.setattr(cross_attention, "absorbs", lambda *_, **__: is_absorbed)
            outs.append(model.head(model.decode(tokens, features)))
        merge(model)
        outs.append(model.head(model.decode(tokens, features)))
        unmerge(model)
        return outs

    before = logits()
    for out in before[1:]:
        torch.testing.assert_close(out, before[0], rtol=1e-9, atol=1e-9)
    real = layer_module.linear_parts

    def magnified(layer: nn.Module, dtype: torch.dtype) -> LinearParts:
        """Give the rows of W + scaling * B A another magnitude, as DoRA does."""
        parts = real(layer, dtype)
        if parts.lora_B is None:
            return parts
        magnitude = torch.linspace(0.5, 1.5, len(parts.weight), dtype=dtype)[:, None]
        return parts._replace(weight=magnitude * parts.weight, lora_B=magnitude * parts.lora_B)

    monkeypatch.setattr(layer_module, "linear_parts", magnified)
    monkeypatch.setattr(cross_attention, "linear_parts", magnified)
    after = logits()
    assert not torch.allclose(after[0], before[0], rtol=0.01)
    for out in after[1:]:
        torch.testing.assert_close(out, after[0], rtol=1e-9, atol=1e-9)


# --- dropout --------------------------------------------------------------------------------


@every_kind
def test_low_rank_path_sees_exactly_the_dropped_input(make_base):
    base = make_base()
    layer = adapted(base, dropout=0.4)
    x = torch.randn(6, IN)
    torch.manual_seed(11)
    out = layer(x)
    torch.manual_seed(11)
    is_kept, share = dropout_mask(x, 0.4)
    assert 0.4 < is_kept.float().mean() < 0.8 and share == pytest.approx(0.6, abs=1e-5)
    dropped = torch.where(is_kept, x / share, 0.0)
    expected = base(x) + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)


def test_each_layer_draws_its_own_mask():
    layer = adapted(linear(), dropout=0.5)
    x = torch.randn(6, IN)
    assert not torch.equal(layer(x), layer(x))


def test_no_dropout_in_evaluation():
    layer = adapted(linear(), dropout=0.5)
    without = adapted(linear())
    without.load_state_dict(layer.state_dict())
    x = torch.randn(6, IN)
    assert torch.equal(layer.eval()(x), without(x))


# --- merging --------------------------------------------------------------------------------


@every_kind
def test_merged_equals_unmerged(make_base):
    layer = adapted(make_base())
    x = torch.randn(6, IN)
    before = layer(x)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_bits(make_base, dtype):
    layer = adapted(make_base().to(dtype))
    weight = layer.weight.clone()
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and not layer.merged


def test_merging_twice_adds_once_and_unmerging_twice_takes_away_once():
    layer = adapted(linear())
    weight, expected = layer.weight.clone(), layer.merged_weight()
    assert torch.equal(layer.weight, weight)
    layer.merge()
    merged = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged)
    assert torch.equal(merged, expected) and torch.equal(layer.merged_weight(), expected)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


@every_kind
def test_merging_into_bf16_rounds_once(make_base):
    layer = adapted(make_base().to(torch.bfloat16))
    update = layer.scaling * (layer.lora_B @ layer.lora_A)
    update = update.T if layer.weight_is_transposed else update
    expected = (layer.weight.float() + update).bfloat16()
    assert not torch.equal(expected, layer.weight + update.bfloat16())  # two roundings differ
    layer.merge()
    assert torch.equal(layer.weight, expected)


def test_merging_a_tree_and_back_leaves_counts_names_and_bits():
    tree = Tree()
    inject(tree, ["attention", "mlp"], rank=2)
    for parameter in lora_parameters(tree).values():
        nn.init.normal_(parameter)
    before = copy.deepcopy(tree.state_dict())
    counts = count_parameters(tree)
    merge(tree)
    assert all(layer.merged for _, layer in lora_layers(tree))
    assert count_parameters(tree) == counts and tree.state_dict().keys() == before.keys()
    unmerge(tree)
    after = tree.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("merged", [False, True])
def test_eval_and_train_never_change_weights(merged):
    layer = adapted(linear(), dropout=0.1)
    if merged:
        layer.merge()
    before = copy.deepcopy(layer.state_dict())
    for mode in (False, True, False):
        layer.train(mode)
        after = layer.state_dict()
        assert layer.merged == merged
        assert all(torch.equal(after[name], before[name]) for name in before)


# --- gradients ------------------------------------------------------------------------------


@every_kind
def test_gradients_equal_finite_differences(make_base):
    layer = adapted(make_base().double())
    assert layer.lora_A.dtype == torch.float64

    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    # gradcheck changes the matrices in place, so the layer sees every step.
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.lora_A, layer.lora_B))


def test_frozen_parameters_get_no_gradient():
    tree = Tree()
    inject(tree, ["attention", "mlp"], rank=2)
    x = torch.randn(3, 4)
    sum(layer(x).sum() for _, layer in lora_layers(tree)).backward()
    trainable = set(map(id, lora_parameters(tree).values()))
    for parameter in tree.parameters():
        assert parameter.requires_grad == (id(parameter) in trainable)
        assert (parameter.grad is not None) == (id(parameter) in trainable)


# --- precision ------------------------------------------------------------------------------


class CountCasts(TorchDispatchMode):
    """Counts dtype casts of the given tensors and their views."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.num_casts = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if function is torch.ops.aten._to_copy.default else args[1]
            self.num_casts += source.untyped_storage().data_ptr() in self.storages
        return function(*args, **(kwargs or {}))


@every_kind
def test_under_autocast_adapters_stay_fp32_and_frozen_weights_are_not_cast(make_base):
    layer = adapted(make_base(), dropout=0.1)
    cast_frozen(layer, torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    x = torch.randn(6, IN, requires_grad=True)
    frozen = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    with CountCasts(frozen) as frozen_casts, torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.float().square().mean().backward()
    assert frozen_casts.num_casts == 0
    assert out.dtype == torch.bfloat16 and x.grad is not None
    for matrix in (layer.lora_A, layer.lora_B):
        assert matrix.dtype == matrix.grad.dtype == torch.float32
        assert matrix.grad.any()


def test_without_cast_frozen_autocast_casts_the_weight_in_every_step():
    layer = adapted(linear())  # shows that CountCasts counts
    with CountCasts([layer.weight]) as casts, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(6, IN))
    assert casts.num_casts == 1


def test_a_step_of_a_whole_captioner_casts_no_frozen_matrix(captioner):
    model = captioner.model
    inject(model, ["attention", "feed_forward"], rank=2)
    embedding = model.get_parameter(model.tied_head[1])
    assert model.get_parameter(model.tied_head[0]) is embedding
    cast_frozen(model, torch.bfloat16)
    head = model.get_parameter(model.tied_head[0])
    assert head.dtype == torch.bfloat16
    assert model.get_parameter(model.tied_head[1]) is embedding
    assert embedding.dtype == torch.float32
    norms = [m.weight for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert all(weight.dtype == torch.float32 for weight in norms)

    products = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, LoRALinear))]
    frozen = [p for m in products for p in (m.weight, m.bias) if p is not None]
    assert len(frozen) > 40
    tokens = torch.randint(20, 100, (2, 5))
    with CountCasts(frozen) as casts, torch.autocast("cpu", torch.bfloat16):
        features = model.encode(torch.randn(2, 3, 64, 64))
        logits = model.head(model.decode(tokens, features))
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    assert casts.num_casts == 0
    for matrix in lora_parameters(model).values():
        assert matrix.dtype == matrix.grad.dtype == torch.float32


# --- matching -------------------------------------------------------------------------------


def test_targets_are_groups_names_paths_or_expressions():
    tree = Tree()
    attention = [f"body.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
    mlp = ["body.0.mlp.dense", "body.1.mlp.dense"]
    assert select(tree, ["attention"]) == attention
    assert select(tree, ["mlp"]) == mlp
    assert select(tree, ["query"]) == ["body.0.query", "body.1.query"]  # not body.0.subquery
    assert select(tree, ["body.1.value"]) == ["body.1.value"]
    assert select(tree, ["mlp.dense", "1.value"]) == ["body.0.mlp.dense", "body.1.value", mlp[1]]
    for prefix in ("", "re:"):
        assert select(tree, prefix + r"body\.0\.(query|value)") == attention[:2]
    assert select(tree, [r"re:.*\.1\..*query"]) == ["body.1.query", "body.1.subquery"]
    assert select(tree, ["query_norm"]) == ["body.0.query_norm", "body.1.query_norm"]
    assert select(tree, ["value", "query", "value"]) == attention  # once each, in tree order


def test_an_expression_must_match_the_whole_path():
    with pytest.raises(ValueError, match="matches no linear layer"):
        select(Tree(), r"body\.0\.que")


NAMES = ["query", "value", "dense", "out"]
paths = st.lists(st.sampled_from([*NAMES, "0", "layer", "mlp"]), min_size=0, max_size=3)


@settings(max_examples=60)
@given(
    tree_paths=st.lists(st.tuples(paths, st.sampled_from(NAMES)), min_size=1, max_size=6),
    targets=st.lists(
        st.sampled_from([*NAMES, "mlp.dense", "0.query", "layer.0.value", "ery", "layer.dense"]),
        min_size=1, max_size=3, unique=True,
    ),
    expression=st.sampled_from([r".*dense", r".*\.(query|out)", "query", r"layer\..*", r".*\.0\..*",
                                r"(.*\.)?value"]),
)
def test_selection_equals_pefts(tree_paths, targets, expression):
    tree = nn.Module()
    for parents, name in tree_paths:
        node = tree
        for parent in parents:
            if isinstance(getattr(node, parent, None), nn.Linear):
                break
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        else:
            if not hasattr(node, name):
                node.add_module(name, nn.Linear(1, 1, device="meta"))
    linears = [path for path, m in tree.named_modules() if isinstance(m, nn.Linear)]
    for target in (targets, expression):
        config = LoraConfig(target_modules=target)
        expected = [path for path in linears if check_target_module_exists(config, path)]
        ones = [target] if isinstance(target, str) else target
        for one in ones:  # ours is strict: each target must match something
            one_config = LoraConfig(target_modules=one if isinstance(target, str) else [one])
            if not any(check_target_module_exists(one_config, path) for path in linears):
                with pytest.raises(ValueError, match="matches no linear layer"):
                    select(tree, target)
                break
        else:
            assert select(tree, target) == expected


def test_rank_and_alpha_patterns_follow_pefts_rule():
    tree = Tree()
    plan = inject(
        tree, ["attention"], rank=2, alpha=8,
        rank_pattern={"body.0.query": 4, "value": 1}, alpha_pattern={r"body\.\d\.value": 3},
    )
    found = {module.path: (module.rank, module.scaling) for module in plan.modules}
    assert found == {
        "body.0.query": (4, 8 / 4), "body.0.value": (1, 3.0),
        "body.1.query": (2, 8 / 2), "body.1.value": (1, 3.0),
    }
    assert tree.body[0]["query"].lora_A.shape == (4, 4)
    assert tree.body[0]["value"].lora_B.shape == (6, 1)


def test_rslora_scaling_uses_each_layers_own_rank():
    tree = Tree()
    plan = inject(tree, ["query"], rank=4, alpha=8, use_rslora=True, rank_pattern={"0.query": 16})
    assert [module.scaling for module in plan.modules] == [8 / 4, 8 / 2]


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("targets, arguments, message", [
    (["qeury"], {},
     "'qeury' matches no linear layer; close matches: query.*groups: attention, mlp"),
    (["atention"], {}, "close matches: attention"),
    (["q_proj"], {}, r"'q_proj' matches .*; here use the group attention \(query, value\); groups"),
    (["up_proj"], {}, "linear layers: dense, query, query_norm"),  # no group feed_forward
    (["xxxxxxxx"], {}, "linear layers: dense, query, query_norm, subquery, value"),
    (["query", "norm"], {}, "'norm' matches no linear layer"),  # a module, but not a linear one
    (["body"], {}, "matches no linear layer"),
    (["encoder.query"], {}, "only modules that cannot be adapted.*encoder.query"),
    (["re:head.*"], {}, "only modules that cannot be adapted.*head.dense"),
    (["re:(query"], {}, r"'re:\(query': .* is not a regular expression"),
    (["re:a{99999999999}"], {}, "'re:a.99999999999.*repeats too often"),
    (["re:" + "(" * 5_000 + ")" * 5_000], {}, "is not a regular expression"),
    (["re:(.+)+!"], {}, "matches no linear layer"),  # at once
    (["query"], {"rank_pattern": {"(": 2}}, "is not a regular expression"),
    (["query"], {"alpha_pattern": {"x" * 10_001: 2}}, "has 10,001 characters"),
    ([], {}, "no LoRA targets"),
    (None, {}, "targets is None; expected names, or one regular expression"),
    (["query", 3], {}, "targets is .'query', 3.; expected names"),
    ("re:fc.", {}, "target 're:fc.' matches no linear layer"),
    ("fc.", {}, "target 're:fc.' matches no linear layer"),
    (["query"], {"rank_pattern": {"mlp": 4}},
     "'mlp' matches no adapted layer .*; their names are attention, query$"),
    (["query"], {"rank": 0}, "rank is 0"),
    (["query"], {"rank_pattern": {"1.query": 0}}, "'1.query' is 0; expected a whole number"),
    (["query"], {"dropout": 1.0}, "dropout is 1.0"),
    (["query"], {"dropout": -0.1}, "dropout is -0.1"),
])
def test_an_error_says_what_to_do_and_changes_nothing(targets, arguments, message):
    tree = Tree()
    modules = list(tree.modules())
    before = {name: p.clone() for name, p in tree.named_parameters()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        inject(tree, targets, **arguments)
    assert list(tree.modules()) == modules
    for name, parameter in tree.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, before[name])


@pytest.mark.parametrize("intercept", [
    lambda layer: layer.register_forward_hook(lambda *_: None),
    lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    lambda layer: setattr(layer, "forward", lambda x: x),
    lambda layer: layer.compile(),
], ids=["hook", "backward hook", "forward", "compiled"])
def test_a_layer_whose_call_was_changed_is_not_replaced(intercept):
    tree = Tree()
    intercept(tree.body[1]["query"])
    with pytest.raises(ValueError, match="body.1.query has hooks, a replaced forward"):
        inject(tree, ["query"], rank=2)
    assert not any(lora_layers(tree)) and tree.body[0]["query"].weight.requires_grad


def test_injecting_twice_is_an_error():
    tree = Tree()
    inject(tree, ["query"])
    parameters = dict(tree.named_parameters())
    with pytest.raises(ValueError, match="already has LoRA layers"):
        inject(tree, ["value"])
    assert {name: id(p) for name, p in tree.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }


# --- the plan -------------------------------------------------------------------------------


def test_plan_lists_every_module_and_the_totals():
    tree = Tree()
    num_all = sum(parameter.numel() for parameter in tree.parameters())
    plan = inject(tree, ["attention", "mlp"], rank=2, alpha=8)
    num_trainable = 2 * 2 * ((4 + 4) + (4 + 6) + (4 + 8))
    assert (plan.num_trainable, plan.num_frozen) == (num_trainable, num_all)
    assert count_parameters(tree) == (num_trainable, num_all)
    assert sum(module.num_parameters for module in plan.modules) == num_trainable
    lines = str(plan).splitlines()
    assert lines[0].split() == ["module", "in", "->", "out", "rank", "scaling", "parameters"]
    assert lines[3].split() == ["body.0.mlp.dense", "4", "->", "8", "2", "4", "24"]
    assert len(lines) == 1 + 6 + 1
    share = 100 * num_trainable / (num_trainable + num_all)
    assert lines[-1] == (
        f"LoRA on 6 modules: {num_trainable} trainable, {num_all} frozen parameters "
        f"({share:.2f} % trainable)"
    )


def test_grouped_plan_counts_layers_that_differ_only_in_their_number():
    plan = inject(Tree(), ["attention", "mlp"], rank=2, alpha=8, rank_pattern={"0.query": 1})
    rows = [line.split() for line in plan.grouped().splitlines()[1:-1]]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("1", "body.*.query", "8"), ("2", "body.*.value", "40"), ("2", "body.*.mlp.dense", "48"),
        ("1", "body.*.query", "16"),
    ]


def test_trainable_parameters_are_listed_A_before_B_in_tree_order():
    tree = Tree()
    inject(tree, ["value"], rank=2)
    assert list(lora_parameters(tree)) == [
        "body.0.value.lora_A", "body.0.value.lora_B", "body.1.value.lora_A", "body.1.value.lora_B",
    ]


def test_linear_subclasses_are_left_alone():
    """nn.MultiheadAttention reads its out_proj's weight directly: LoRA would have no effect."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="matches no linear layer"):
        inject(attention, ["out_proj"])


def test_casting_to_the_same_dtype_keeps_a_tied_head_tied(captioner):
    model = captioner.model
    before = sum(p.numel() for p in model.parameters())
    cast_frozen(model, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == before
