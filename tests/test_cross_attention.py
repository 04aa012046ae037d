"""Absorbed and projected cross-attention are equal: outputs and all gradients."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import hugging_face, hugging_face_logits, random_pixels
from flop_count import count_flops
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_engine.data.captions import IGNORED, collate_captions
from lora_engine.lora.dropout import dropout_mask
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.lora.layer import LoRALinear
from lora_engine.models import blip, cross_attention, vit_gpt2
from lora_engine.models.attention import KeyValueCache
from lora_engine.models.cross_attention import absorbs, low_rank_features
from lora_engine.models.pretrained import Captioner, load_captioner

EXACT = {"rtol": 1e-10, "atol": 1e-10}
NUM_IMAGES, NUM_TOKENS, WIDTH, NUM_HEADS = 2, 11, 16, 4


@pytest.fixture
def force(monkeypatch) -> Callable[[str], list[str]]:
    """Forces a form of cross-attention; the returned list records the forms that ran."""

    def force(form: str) -> list[str]:
        taken = []
        monkeypatch.setattr(cross_attention, "absorbs", lambda *_, **__: form == "absorbed")
        for name in ("absorbed", "_projected"):
            function = getattr(cross_attention, name)

            def spy(*args, name=name, function=function):
                taken.append(name.removeprefix("_"))
                return function(*args)

            monkeypatch.setattr(cross_attention, name, spy)
        return taken

    return force


# --- one layer ------------------------------------------------------------------------------


class Layer:
    """A cross-attention of one of the families, with adapters on some of its projections."""

    def __init__(
        self, family: str, adapted: Sequence[str], *, dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        self.features_width = 24 if family == "blip" else WIDTH
        if family == "blip":
            self.module: nn.Module = blip.Attention(
                WIDTH, self.features_width, NUM_HEADS, eps=1e-6,
                attention_dropout=attention_dropout, hidden_dropout=0.0,
            )
        else:
            self.module = vit_gpt2.Attention(
                WIDTH, NUM_HEADS, is_cross=True, scale=0.3, attention_dropout=attention_dropout,
                residual_dropout=0.0,
            )
        self.module.double().requires_grad_(False)
        if adapted:
            inject(
                self.module, adapted, rank=3, alpha=5, dropout=dropout,
                rank_pattern={adapted[-1]: 2}, alpha_pattern={adapted[0]: -4},
            )
        self.matrices = lora_parameters(self.module)
        for matrix in self.matrices.values():
            nn.init.normal_(matrix, std=0.5)

    def __call__(self, x: Tensor, features: Tensor) -> Tensor:
        """(N, T, D) and (B, P, E) -> (N, T, D), with the residual and norm where it has them."""
        (low_ranks,) = low_rank_features(features, [self.module.feature_layers])
        return self.module(x, features, low_ranks, None)

    def written_out(self, x: Tensor, features: Tensor, kept: Tensor | float = 1.0) -> Tensor:
        """The textbook formula; `kept` multiplies the attention probabilities (B, H, T, P)."""
        if isinstance(self.module, blip.Attention):
            q, k, v = (self.module.self[name] for name in ("query", "key", "value"))
            out, norm = self.module.output["dense"], self.module.output["LayerNorm"]
            queries, keys, values = written(q, x), written(k, features), written(v, features)
        else:
            out, queries = self.module.c_proj, written(self.module.q_attn, x)
            keys, values = written(self.module.c_attn, features).chunk(2, dim=-1)
        queries = queries.reshape(len(features), -1, NUM_HEADS, WIDTH // NUM_HEADS)
        keys, values = (y.unflatten(-1, (NUM_HEADS, -1)) for y in (keys, values))
        scores = torch.einsum("bthk,bphk->bhtp", queries, keys) * self.module.scale
        context = torch.einsum("bhtp,bphk->bthk", scores.softmax(-1) * kept, values)
        result = written(out, context.reshape(x.shape))
        return norm(x + result) if isinstance(self.module, blip.Attention) else result


def written(layer: nn.Module, x: Tensor) -> Tensor:
    out = F.linear(x, layer.weight, layer.bias)
    if isinstance(layer, LoRALinear):
        out = out + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    return out


def inputs(layer: Layer, *, rows_per_image: int = 1, length: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(NUM_IMAGES * rows_per_image, length, WIDTH, dtype=torch.float64)
    features = torch.randn(NUM_IMAGES, NUM_TOKENS, layer.features_width, dtype=torch.float64)
    return x.requires_grad_(), features


def output_and_gradients(layer: Layer, x: Tensor, call: Callable[[], Tensor]) -> list[Tensor]:
    out = call()
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return [out, *torch.autograd.grad(out, [x, *layer.matrices.values()], cotangent)]


PROJECTIONS = {
    "blip": ["self.query", "self.key", "self.value", "output.dense"],
    "vit_gpt2": ["q_attn", "c_attn", "c_proj"],
}
every_subset = pytest.mark.parametrize("family, adapted", [
    pytest.param(family, subset, id=f"{family}-{'+'.join(subset) or 'none'}")
    for family, names in PROJECTIONS.items()
    for count in range(len(names) + 1)
    for subset in itertools.combinations(names, count)
])
every_family = pytest.mark.parametrize("family", PROJECTIONS)


@every_subset
@pytest.mark.parametrize("rows_per_image", [1, 3])
def test_both_forms_equal_attention_as_written_out(force, family, adapted, rows_per_image):
    """With adapters on any subset of the projections."""
    layer = Layer(family, adapted)
    x, features = inputs(layer, rows_per_image=rows_per_image)
    expected = output_and_gradients(layer, x, lambda: layer.written_out(x, features))
    for form in ("absorbed", "projected"):
        taken = force(form)
        ours = output_and_gradients(layer, x, lambda: layer(x, features))
        torch.testing.assert_close(ours, expected, **EXACT)
        assert taken == [form]


@every_family
def test_gradients_of_the_absorbed_form_equal_finite_differences(force, family):
    force("absorbed")
    layer = Layer(family, PROJECTIONS[family])
    x, features = inputs(layer, length=2)
    features = features[:, :4]
    assert torch.autograd.gradcheck(
        lambda x, *_: layer(x, features), (x, *layer.matrices.values())
    )


@every_subset
@pytest.mark.parametrize("rows_per_image", [1, 3])
def test_dropped_probabilities_are_dropped_as_written_out(
    force, monkeypatch, family, adapted, rows_per_image
):
    """The probabilities of a query then no longer sum to 1, which affects the value bias."""
    taken = force("absorbed")
    layer = Layer(family, adapted, attention_dropout=0.4)
    x, features = inputs(layer, rows_per_image=rows_per_image)
    masks = []

    def dropout(probs: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        if p == 0 or not training:
            return probs
        masks.append((torch.rand_like(probs) < 1 - p) / (1 - p))
        return probs * masks[-1]

    monkeypatch.setattr(F, "dropout", dropout)
    ours = output_and_gradients(layer, x, lambda: layer(x, features))
    (mask,) = masks
    kept = mask.unflatten(1, (-1, NUM_HEADS)).transpose(1, 2)  # (B, T H, P) -> (B, H, T, P)
    expected = output_and_gradients(layer, x, lambda: layer.written_out(x, features, kept))
    torch.testing.assert_close(ours, expected, **EXACT)
    assert taken == ["absorbed"] and 0 < kept.count_nonzero() < kept.numel()
    with torch.no_grad():
        layer.module.eval()
        torch.testing.assert_close(layer(x, features), layer.written_out(x, features), **EXACT)


@every_family
@pytest.mark.parametrize("form", ["absorbed", "projected"])
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_key_bias_changes_nothing_and_a_value_bias_does(force, family, form, part):
    force(form)
    layer = Layer(family, PROJECTIONS[family])
    x, features = inputs(layer)
    before = layer(x, features)
    if family == "blip":
        bias = layer.module.self[part].bias.data
    else:
        bias = layer.module.c_attn.bias.data.chunk(2)[part == "value"]
    bias += torch.randn(WIDTH, dtype=torch.float64)
    after = layer(x, features)
    assert torch.allclose(after, before, rtol=0, atol=1e-12) == (part == "key")


@every_family
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str)
def test_less_precise_forms_stay_near_the_precise_one(force, family, dtype, limit):
    """Relative errors of outputs and gradients; in bf16 up to 4.6 % (absorbed) and 3.3 %.

    bf16 rounds a score of 10 by up to 0.03.
    """
    layer = Layer(family, PROJECTIONS[family])
    x, features = inputs(layer, rows_per_image=3)
    features = features.to(dtype)
    expected = output_and_gradients(layer, x, lambda: layer.written_out(x, features.double()))
    layer.module.float()
    x = x.detach().float().requires_grad_()
    for form in ("absorbed", "projected"):
        force(form)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            ours = output_and_gradients(layer, x, lambda: layer(x, features))
        for one, other in zip(ours, expected, strict=True):
            assert (one - other).norm() < limit * other.norm()


# --- layers that are called -----------------------------------------------------------------


class TwiceLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TwiceLoRA(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def by_subclass(layer: nn.Module) -> None:
    layer.__class__ = TwiceLoRA if isinstance(layer, LoRALinear) else TwiceLinear


def by_replaced_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def by_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda layer, inputs, out: 2 * out)


@every_family
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("double", [by_subclass, by_replaced_forward, by_hook])
def test_what_a_layer_of_the_features_does_in_its_call_is_not_bypassed(
    force, family, adapted, double
):
    """Doubling the output equals doubling weight, bias and B."""
    taken = force("absorbed")
    layer = Layer(family, PROJECTIONS[family] if adapted else [])
    x, features = inputs(layer)
    of_keys = layer.module.feature_layers[0]
    with torch.no_grad():
        of_keys.weight *= 2
        of_keys.bias *= 2
        if adapted:
            of_keys.lora_B *= 2
    expected = layer(x, features)
    with torch.no_grad():
        of_keys.weight /= 2
        of_keys.bias /= 2
        if adapted:
            of_keys.lora_B /= 2
    assert not torch.allclose(layer(x, features), expected)
    double(of_keys)
    torch.testing.assert_close(layer(x, features), expected, **EXACT)
    assert taken == ["absorbed", "absorbed", "projected"]


@every_family
def test_with_a_cache_such_a_layer_is_called_once(family):
    layer = Layer(family, PROJECTIONS[family])
    x, features = inputs(layer)
    calls = []
    layer.module.feature_layers[0].register_forward_hook(lambda *_: calls.append(1))
    expected = layer(x, features)[:, :1]
    cache = KeyValueCache(num_tokens=3)
    (low_ranks,) = low_rank_features(features, [layer.module.feature_layers], cache)
    calls.clear()
    for _ in range(2):
        out = layer.module(x[:, :1], features, low_ranks, cache[0])
        torch.testing.assert_close(out, expected, **EXACT)
    assert len(calls) == 1


# --- the adapters' part of the features -----------------------------------------------------


def test_the_features_of_all_adapters_are_dropped_by_one_mask():
    layers = [Layer("blip", PROJECTIONS["blip"][:number], dropout=0.3).module for number in (2, 3)]
    fused = Layer("vit_gpt2", ["c_attn"], dropout=0.3).module
    features = torch.randn(NUM_IMAGES, NUM_TOKENS, 24, dtype=torch.float64)
    torch.manual_seed(1)
    low_ranks = low_rank_features(features, [layer.feature_layers for layer in layers])
    torch.manual_seed(1)
    kept, share = dropout_mask(features, 0.3)
    dropped = torch.where(kept, features / share, 0.0)
    assert [[x is None for x in row] for row in low_ranks] == [[False, True], [False, False]]
    for layer, row in zip(layers, low_ranks):
        for projection, low_rank in zip(layer.feature_layers, row):
            if low_rank is not None:
                torch.testing.assert_close(low_rank, dropped @ projection.lora_A.T, **EXACT)
                assert low_rank.is_contiguous()
    (low_rank,), = low_rank_features(features[..., :WIDTH], [fused.eval().feature_layers])
    torch.testing.assert_close(low_rank, features[..., :WIDTH] @ fused.c_attn.lora_A.T, **EXACT)


def test_merged_and_frozen_projections_have_no_part_in_the_features():
    layer = Layer("blip", ["self.key"]).module
    layer.self["key"].merge()
    features = torch.randn(NUM_IMAGES, NUM_TOKENS, 24, dtype=torch.float64)
    assert low_rank_features(features, [layer.feature_layers]) == [[None, None]]


# --- whole captioners -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["blip", "blip, uneven", "vit_gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """Checkpoints without dropout, one with features wider than the decoder."""
    path = tmp_path_factory.mktemp("checkpoint")
    if request.param == "vit_gpt2":
        checkpoints.write_vit_gpt2(
            path, decoder={"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
        )
    elif request.param == "blip":
        checkpoints.write_blip(path)
    else:
        checkpoints.write_blip(path, vision={"hidden_size": 96, "num_attention_heads": 3})
    return path


def adapted_captioner(folder: Path, *, dropout: float = 0.0) -> Captioner:
    """A captioner in fp64 with random adapters on all linear layers of the decoder."""
    captioner = load_captioner(folder)
    captioner.model.double()
    inject(captioner.model, ["attention", "feed_forward"], rank=3, alpha=5, dropout=dropout)
    for matrix in lora_parameters(captioner.model).values():
        nn.init.normal_(matrix, std=0.1)
    return captioner


def caption_batch(captioner: Captioner, length: int) -> tuple[Tensor, Tensor]:
    """(input_ids, targets) of three captions of up to `length` tokens."""
    generator = torch.Generator().manual_seed(length)
    lengths = [length + 1, max(length - 3, 2), length // 2 + 2]
    rows = [torch.randint(20, 90, (n,), generator=generator).numpy() for n in lengths]
    return collate_captions(rows, prompt_length=1, pad_id=captioner.tokenizer.pad_id)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def peft_of(folder: Path, captioner: Captioner) -> nn.Module:
    """Hugging Face's model of the folder with the same adapters in PEFT."""
    matrices = lora_parameters(captioner.model)
    targets = [name.removesuffix(".lora_A") for name in matrices if name.endswith(".lora_A")]
    config = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.0, target_modules=targets,
        fan_in_fan_out=captioner.family != "blip",
    )
    model = inject_adapter_in_model(config, hugging_face(folder)).double()
    with torch.no_grad():
        for name, parameter in peft_parameters(model).items():
            parameter.copy_(matrices[name])
    return model


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trainable parameters under our names."""
    return {
        name.replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("length", [2, 20])
def test_both_forms_equal_hugging_face_and_peft(force, folder, length):
    captioner = adapted_captioner(folder)
    theirs = peft_of(folder, captioner)
    input_ids, targets = caption_batch(captioner, length)
    pixels = random_pixels(len(input_ids)).double()
    valid = targets != IGNORED
    expected_logits = hugging_face_logits(theirs, pixels, input_ids)
    expected_loss = loss_of(expected_logits, targets)
    expected_loss.backward()
    expected = {name: p.grad for name, p in peft_parameters(theirs).items()}

    model, matrices = captioner.model, lora_parameters(captioner.model)
    assert expected.keys() == matrices.keys()
    with torch.no_grad():
        features = model.encode(pixels)
    for form in ("absorbed", "projected"):
        taken = force(form)
        logits = model.head(model.decode(input_ids, features))
        loss = loss_of(logits, targets)
        gradients = torch.autograd.grad(loss, list(matrices.values()))
        assert set(taken) == {form}
        torch.testing.assert_close(logits[valid], expected_logits[valid], **EXACT)
        torch.testing.assert_close(loss, expected_loss, **EXACT)
        ours = dict(zip(matrices, gradients))
        assert min(float(gradient.abs().max()) for gradient in gradients) > 1e-6
        torch.testing.assert_close(ours, expected, **EXACT)


def test_lora_dropout_is_the_same_in_both_forms_of_a_captioner(force, folder):
    captioner = adapted_captioner(folder, dropout=0.3)
    model, matrices = captioner.model.train(), list(lora_parameters(captioner.model).values())
    input_ids, targets = caption_batch(captioner, 6)
    with torch.no_grad():
        features = model.encode(random_pixels(len(input_ids)).double())
    results = []
    for form, seed in [("absorbed", 1), ("projected", 1), ("projected", 2)]:
        force(form)
        torch.manual_seed(seed)
        loss = loss_of(model.head(model.decode(input_ids, features)), targets)
        results.append([loss, *torch.autograd.grad(loss, matrices)])
    torch.testing.assert_close(results[0], results[1], **EXACT)
    assert not torch.allclose(results[2][0], results[1][0], rtol=1e-4)  # dropout was active


# --- which form -----------------------------------------------------------------------------


def longest_absorbed(num_tokens: int, width: int, num_heads: int, *, with_backward: bool) -> int:
    """The largest number of queries for which the rule chooses the absorbed form."""
    rule = [
        absorbs((number, width), (num_tokens, width), num_heads, with_backward=with_backward)
        for number in range(1, 2000)
    ]
    assert rule == sorted(rule, reverse=True)
    return sum(rule)


def test_short_captions_absorb_and_long_ones_do_not():
    """At the published sizes, up to the measured break-even (benchmarks/LOG.md)."""
    assert longest_absorbed(577, 768, 12, with_backward=True) == pytest.approx(33, abs=3)
    assert longest_absorbed(197, 768, 12, with_backward=True) == pytest.approx(27, abs=3)
    for sizes in [(577, 768, 12), (197, 768, 12), (577, 1024, 16), (17, 64, 4)]:
        longest = longest_absorbed(*sizes, with_backward=True)
        assert 0 < longest < longest_absorbed(*sizes, with_backward=False) < 2000


@pytest.mark.parametrize("num_tokens", [17, 60])
def test_the_rule_counts_the_work_of_a_forward_pass(force, num_tokens):
    """On both sides of the crossover the chosen form takes fewer operations by torch's count."""
    layer = Layer("vit_gpt2", [])
    turn = longest_absorbed(num_tokens, WIDTH, NUM_HEADS, with_backward=False)
    features = torch.randn(NUM_IMAGES, num_tokens, WIDTH, dtype=torch.float64)
    for length, cheaper in [(turn, "absorbed"), (turn + 2, "projected")]:
        x = torch.randn(NUM_IMAGES, length, WIDTH, dtype=torch.float64)
        counts = {}
        for form in ("absorbed", "projected"):
            force(form)
            counter = count_flops()
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
                layer(x, features)
            counts[form] = counter.get_total_flops()
        assert min(counts, key=counts.get) == cheaper


@pytest.mark.parametrize("rows_per_image", [1, 4])
def test_a_layer_follows_the_rule_for_all_queries_of_an_image(force, monkeypatch, rows_per_image):
    layer = Layer("vit_gpt2", ["q_attn"])
    turn = longest_absorbed(NUM_TOKENS, WIDTH, NUM_HEADS, with_backward=False)
    taken = force("")
    monkeypatch.setattr(cross_attention, "absorbs", absorbs)
    for length in range(1, turn + 2):
        x, features = inputs(layer, rows_per_image=rows_per_image, length=length)
        with torch.no_grad():
            layer(x, features)
        assert taken.pop() == ("absorbed" if length * rows_per_image <= turn else "projected")
