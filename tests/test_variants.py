"""Variants of LoRA: initial values, steps, saved adapters and merging are those of PEFT."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from adapters import adapter_folder
from checkpoints import hugging_face, hugging_face_logits, random_pixels
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_engine.captioning.generation import generate
from lora_engine.config import TrainingConfig
from lora_engine.data.batches import FeatureBatch, pad_targets
from lora_engine.lora import layer as layer_module
from lora_engine.lora.adapter import (
    adapter_files,
    load_adapter,
    read_adapter,
    restore_initial,
    save_adapter,
)
from lora_engine.lora.initialization import INITIALIZATIONS
from lora_engine.lora.injection import (
    cast_frozen,
    inject,
    lora_layers,
    lora_parameters,
    merge,
    select,
    unmerge,
)
from lora_engine.lora.layer import LoRALinear, project
from lora_engine.models import cross_attention
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.training.add_lora import add_lora
from lora_engine.training.eva import initialize_eva
from lora_engine.training.micro_batches import split
from lora_engine.training.optim import FlatLoRAParameters
from lora_engine.training.trainer import Trainer

# PEFT still looks up an old name in transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

NUM_STEPS = 20
LR = 5e-3
TARGETS = ["attention", "feed_forward"]
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {
        "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"feed_forward": 3}
    },
    "olora": {"init_lora_weights": "olora"},
    "dora_pissa": {"init_lora_weights": "pissa", "use_dora": True},
    "eva": {},
    "lorafa": {"use_lorafa": True},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "dora_loraplus": {"loraplus_lr_ratio": 4.0, "use_dora": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module", params=["blip", "vit_gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """Checkpoints of each family without dropouts of their own."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "blip":
        checkpoints.write_blip(path, vision={"patch_size": 16}, text={"num_attention_heads": 2})
    else:
        checkpoints.write_vit_gpt2(
            path, encoder={"patch_size": 16},
            decoder={"n_head": 2, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0},
        )
    return path


def adapted(folder: Path, *, loraplus_lr_ratio: float | None = None, **settings) -> Captioner:
    captioner = load_captioner(folder)
    torch.manual_seed(0)
    inject(captioner.model, TARGETS, **{"rank": 4, "alpha": 8, "dropout": 0.0} | settings)
    return captioner


PIXELS = random_pixels(4)
TOKENS = torch.randint(20, 90, (4, 7), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    return model.head(model.decode(TOKENS[:, :-1], model.encode(PIXELS)))


def a_batch(captioner: Captioner, tokens: Tensor = TOKENS) -> FeatureBatch:
    with torch.no_grad():
        features = captioner.model.encode(PIXELS[: len(tokens)])
    rows = [*range(len(tokens))]
    targets = tokens[:, 1:].flatten()
    return FeatureBatch(
        tokens[:, :-1], torch.arange(len(targets)), targets, len(targets), rows, rows, [], features
    )


def train(
    captioner: Captioner, loraplus_lr_ratio: float | None = None, **settings
) -> Iterator[float]:
    """The loss of each step by the engine's own parts."""
    trainer = Trainer(
        captioner.model.train(), device=torch.device("cpu"), dtype=torch.float32, lr=LR,
        max_grad_norm=0.0, loraplus_lr_ratio=loraplus_lr_ratio, weight_decay=0.0,
    )
    batch = a_batch(captioner)
    for step in range(NUM_STEPS):
        loss = trainer.accumulate([batch], step)
        trainer.update(loss, lr=LR)
        yield float(loss)


def in_peft(captioner: Captioner, folder: Path, settings: dict[str, Any]) -> PeftModel:
    """PEFT's model of a captioner with new adapters, which have the same values."""
    names = {"use_rslora", "use_dora"}
    layers = dict(lora_layers(captioner.model))
    model = get_peft_model(hugging_face(folder), LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(layers),
        rank_pattern={path: layer.rank for path, layer in layers.items()},
        fan_in_fan_out=captioner.family != "blip",
        **{name: value for name, value in settings.items() if name in names},
    )).eval()
    ours = lora_parameters(captioner.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                short = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(ours[short.removesuffix(".weight")])
                parameter.requires_grad_(ours[short.removesuffix(".weight")].requires_grad)
        for path, layer in layers.items():
            weight = model.base_model.model.get_submodule(path).base_layer.weight
            weight.copy_(layer.weight if captioner.family == "blip" else layer.weight.T)
    return model


def train_in_peft(model: PeftModel, loraplus_lr_ratio: float | None = None) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if loraplus_lr_ratio is None:
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    else:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=loraplus_lr_ratio
        )
    losses = []
    for _ in range(NUM_STEPS):
        out = hugging_face_logits(model, PIXELS, TOKENS[:, :-1])
        loss = F.cross_entropy(out.flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_variant
def test_steps_and_adapters_are_those_of_peft(folder, tmp_path, variant):
    settings = VARIANTS[variant]
    captioner = adapted(folder, **settings)
    if variant == "eva":
        initialize_eva(captioner.model, [a_batch(captioner)], device=torch.device("cpu"))
    base = logits(load_captioner(folder).model)
    torch.testing.assert_close(logits(captioner.model), base, rtol=1e-4, atol=1e-4)
    theirs = in_peft(captioner, folder, settings)
    losses = list(train(captioner, **settings))
    expected = train_in_peft(theirs, settings.get("loraplus_lr_ratio"))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]

    trained = logits(captioner.model)
    assert (trained - base).abs().max() > 0.05
    merge(captioner.model)
    torch.testing.assert_close(logits(captioner.model), trained, rtol=1e-5, atol=1e-5)
    unmerge(captioner.model)
    assert torch.equal(logits(captioner.model), trained)

    save_adapter(captioner.model, tmp_path / "ours", base_model=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing keys
        loaded = PeftModel.from_pretrained(hugging_face(folder), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        found = hugging_face_logits(loaded, PIXELS, TOKENS[:, :-1])
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)

    loaded.save_pretrained(str(tmp_path / "theirs"))
    again = load_captioner(folder)
    load_adapter(again.model, tmp_path / "theirs")
    torch.testing.assert_close(logits(again.model), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["pissa", "olora", "dora_pissa"])
def test_a_run_that_changed_the_frozen_weights_is_restored_to_the_bit(folder, tmp_path, variant):
    settings = VARIANTS[variant]
    captioner = adapted(folder, **settings)
    list(train(captioner))
    save_adapter(captioner.model, tmp_path / "adapter", base_model=str(folder))
    again = adapted(folder, **settings | {"init_lora_weights": "default"})
    restore_initial(again.model, read_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(again.model), logits(captioner.model))
    for name, parameter in lora_parameters(captioner.model).items():
        assert torch.equal(parameter, lora_parameters(again.model)[name]), name


def test_a_base_in_half_precision_is_restored_and_merged_to_the_bit(tmp_path):
    first, again = (nn.Sequential(linear().bfloat16()) for _ in range(2))
    base = first[0].weight.detach()
    inject(first, ["0"], rank=4, use_dora=True, init_lora_weights="pissa")
    inject(again, ["0"], rank=4, use_dora=True)
    with torch.no_grad():
        first[0].lora_B += 0.1
    save_adapter(first, tmp_path / "adapter")
    restore_initial(again, read_adapter(tmp_path / "adapter"))
    assert first[0].weight.dtype == again[0].weight.dtype == torch.bfloat16
    assert not torch.equal(first[0].weight, base)
    assert torch.equal(first[0].weight, again[0].weight)
    assert torch.equal(first[0].merged_weight(), again[0].merged_weight())
    assert adapter_files(first) == adapter_files(again)


def gradient(folder: Path, dtype: torch.dtype = torch.float32, **settings) -> Tensor:
    """The flat gradient of a first step, with dropout."""
    captioner = adapted(folder, **{"dropout": 0.3} | VARIANTS["dora_pissa"])
    batch = a_batch(captioner)
    cast_frozen(captioner.model, dtype)
    captioner.model.decoder.gradient_checkpointing = settings.pop("checkpointing", False)
    trainer = Trainer(
        captioner.model.train(), device=torch.device("cpu"), dtype=dtype, lr=LR, **settings
    )
    trainer.accumulate([batch._replace(features=batch.features.to(dtype))], 0)
    return trainer.lora.gradient.clone()


def test_checkpointing_gives_the_same_gradient_and_bf16_nearly_so(folder):
    expected = gradient(folder)
    torch.testing.assert_close(gradient(folder, checkpointing=True), expected)
    half = gradient(folder, torch.bfloat16)
    assert torch.cosine_similarity(half, expected, dim=0) > 0.99


# --- EVA -----------------------------------------------------------------------------------


def test_eva_finds_pefts_components(folder):
    captioner = load_captioner(folder)
    inject(captioner.model, ["attention"], rank=3, dropout=0.0)
    initialize_eva(captioner.model, [a_batch(captioner)], device=torch.device("cpu"))
    layers = dict(lora_layers(captioner.model))
    theirs = get_peft_model(hugging_face(folder), LoraConfig(
        r=3, target_modules=list(layers), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0),
        fan_in_fan_out=captioner.family != "blip",
    ))
    name = "input_ids" if captioner.family == "blip" else "decoder_input_ids"
    inputs = {"pixel_values": PIXELS, name: TOKENS[:, :-1]}
    found = get_eva_state_dict(
        theirs, [inputs] * 2, show_progress_bar=False,
        forward_fn=lambda model, inputs: model(**inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, -2),
    )
    assert len(found) == len(layers)
    with torch.no_grad():
        features = captioner.model.encode(PIXELS).flatten(0, 1)
    features -= features.mean(dim=0)
    for key, components in found.items():
        path = key.removeprefix("base_model.model.").partition(".lora_A")[0]
        ours = layers[path].lora_A.detach()
        if re.search(r"cross.*\.(key|value|c_attn)", path):
            # PEFT's method is too approximate for features of which no direction stands out.
            best = torch.linalg.svdvals(features)[:3].square().sum()
            assert (features @ ours.T).square().sum() > 0.999 * best
        else:
            similarity = (ours @ components.float().T).abs()
            torch.testing.assert_close(similarity, torch.eye(3), rtol=0, atol=0.02, msg=path)


def test_eva_ignores_padding(folder):
    captioner = load_captioner(folder)
    inject(captioner.model, TARGETS, rank=4, dropout=0.0)
    padded = a_batch(captioner)
    valid = torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20])  # 3 of 6 tokens in a row
    positions, ids = pad_targets(valid, padded.target_ids[valid], 15)  # as on a GPU
    padded = padded._replace(target_positions=positions, target_ids=ids, num_targets=len(valid))
    short = a_batch(captioner, TOKENS[:, :4])
    found = []
    for batch in (padded, short):
        torch.manual_seed(0)
        initialize_eva(captioner.model, [batch], device=torch.device("cpu"))
        found.append({name: p.clone() for name, p in lora_parameters(captioner.model).items()})
    for name, matrix in found[0].items():
        torch.testing.assert_close(matrix.abs(), found[1][name].abs(), rtol=1e-3, atol=1e-3)
    assert not any(layer._forward_pre_hooks for _, layer in lora_layers(captioner.model))


@pytest.mark.parametrize("rank, num_tokens, num_found", [(4, 1, 1), (66, 15, 15), (66, 90, 64)])
def test_rows_of_a_beyond_evas_components_stay_as_drawn(folder, rank, num_tokens, num_found):
    captioner = load_captioner(folder)
    inject(captioner.model, ["re:.*0.*(attention.self.query|[.]attn.c_attn)"], rank=rank)
    (_, made), *_ = lora_layers(captioner.model)
    before = made.lora_A.detach().clone()
    tokens = torch.randint(5, 30, (1, num_tokens + 1)) if num_tokens > 5 else TOKENS[:1, :2]
    initialize_eva(captioner.model, [a_batch(captioner, tokens)], device=torch.device("cpu"))
    assert made.in_features == 64
    assert torch.equal(made.lora_A[num_found:], before[num_found:])
    found = made.lora_A[:num_found]
    torch.testing.assert_close(found @ found.T, torch.eye(num_found), rtol=0, atol=1e-4)


def test_eva_takes_all_batches_together_and_serves_layers_of_several_ranks(folder):
    captioner = load_captioner(folder)
    names = ("0.crossattention.c_attn", "1.crossattention.c_attn")  # both read the features
    if captioner.family == "blip":
        names = ("layer.0.attention.self.query", "layer.0.attention.self.key")
    inject(captioner.model, TARGETS, rank=4, dropout=0.0, rank_pattern={names[0]: 2})
    first, second = (
        next(x for path, x in lora_layers(captioner.model) if path.endswith(name)) for name in names
    )
    modes = []
    first.register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    whole, found = a_batch(captioner), []
    half, other = split(whole, 2)
    for batches in ([whole], [half, half._replace(rows=[]), other]):
        torch.manual_seed(0)
        initialize_eva(captioner.model.train(), batches, device=torch.device("cpu"))
        found.append([p.detach().abs() for p in lora_parameters(captioner.model).values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(first.lora_A, second.lora_A[:2]), "one input, one computation"
    assert first.training and modes == [False] * 3


def test_a_large_mean_of_the_inputs_costs_eva_no_digits(folder):
    captioner = load_captioner(folder)
    inject(captioner.model, ["re:.*crossattention.*(key|c_attn)"], rank=2, dropout=0.0)
    first = next(layer for _, layer in lora_layers(captioner.model))
    found = []
    for shift in (0.0, 1000.0):
        batch = a_batch(captioner)
        torch.manual_seed(0)
        initialize_eva(
            captioner.model, split(batch._replace(features=batch.features + shift), 2),
            device=torch.device("cpu"),
        )
        found.append(first.lora_A.detach().abs())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=5e-3)


def test_layers_compute_with_the_components_in_half_precision_too(folder):
    for use_lorafa in (False, True):
        captioner = adapted(folder, use_lorafa=use_lorafa)
        layers = [made for _, made in lora_layers(captioner.model)]
        FlatLoRAParameters(layers, torch.bfloat16)
        initialize_eva(captioner.model, [a_batch(captioner)], device=torch.device("cpu"))
        for made in layers:
            assert torch.equal(made.matrices(torch.bfloat16)[0], made.lora_A.bfloat16())


# --- one layer ------------------------------------------------------------------------------


def linear(num_in: int = 12, num_out: int = 10, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(num_in, num_out, bias=bias).double()


def layer(base: nn.Module, **settings) -> LoRALinear:
    made = LoRALinear(base, rank=4, alpha=6, **settings)
    with torch.no_grad():
        for parameter in made.lora_parameters().values():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_initial_values_are_those_of_peft(how, use_rslora):
    base = linear().float()
    expected = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=how, use_rslora=use_rslora
    )).base_model.model[0]
    ours = LoRALinear(base, rank=4, alpha=6, init_lora_weights=how, use_rslora=use_rslora)
    torch.testing.assert_close(ours.lora_A, expected.lora_A["default"].weight)
    torch.testing.assert_close(ours.lora_B, expected.lora_B["default"].weight)
    torch.testing.assert_close(ours.weight, expected.base_layer.weight)
    assert torch.equal(base.weight, linear().float().weight), "the base keeps its weight"


def test_a_conv1d_is_decomposed_like_the_transposed_linear():
    base = Conv1D(10, 12)
    twin = nn.Linear(12, 10)
    twin.load_state_dict({"weight": base.weight.T, "bias": base.bias})
    for how in ("pissa", "olora"):
        ours, its_twin = (
            LoRALinear(x, rank=4, alpha=6, init_lora_weights=how, use_dora=True)
            for x in (base, twin)
        )
        assert ours.weight.shape == base.weight.shape
        torch.testing.assert_close(ours.lora_A, its_twin.lora_A)
        torch.testing.assert_close(ours.weight, its_twin.weight.T)
        x = torch.randn(5, 12)
        torch.testing.assert_close(ours(x), base(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", INITIALIZATIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_layer_computes_what_its_base_computed(how, use_dora):
    base, x = linear(), torch.randn(5, 12).double()
    expected = base(x)
    made = LoRALinear(base, rank=4, alpha=6, init_lora_weights=how, use_dora=use_dora)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_norms_are_those_of_the_adapted_weight():
    base = linear()
    base.weight.data[0] *= 1e-4
    made = layer(base, use_dora=True)
    made.lora_B.data[0] = 0
    adapted_weight = made.weight + made.scaling * made.lora_B @ made.lora_A
    torch.testing.assert_close(made.adapted_norms(), adapted_weight.detach().norm(dim=1))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_dora_equal_finite_differences(dropout, bias):
    """Of several layers at once, one of them without an adapter, where the norm is constant."""
    layers = [
        layer(linear(bias=bias), dropout=dropout, use_dora=True),
        linear().requires_grad_(False),
        layer(linear(num_out=7), dropout=dropout),
        layer(linear(num_out=5), dropout=dropout, use_dora=True, use_lorafa=True),
    ]
    with torch.no_grad():
        norms = {x: x.adapted_norms() for x in layers[::3]}
    for x in norms:  # the gradient is that of a constant norm (section 4.3 of the paper)
        x.adapted_norms = lambda weight, x=x: norms[x]
    trained = [
        p for x in layers if isinstance(x, LoRALinear)
        for p in x.lora_parameters().values() if p.requires_grad
    ]
    assert len(trained) == 3 + 2 + 2

    def outs(rows: Tensor, *_) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return project(rows, *layers)

    rows = torch.randn(6, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(outs, (rows, *trained))


def test_a_frozen_A_keeps_its_value_and_saves_no_input():
    made = layer(linear(), use_lorafa=True)
    rows = torch.randn(6, 12).double().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        made(rows).sum().backward()
    assert made.lora_A.grad is None and made.lora_B.grad is not None
    assert all(x.data_ptr() != rows.data_ptr() for x in saved)
    torch.testing.assert_close(rows.grad, made.merged_weight().sum(dim=0).expand(6, -1))


def test_a_step_leaves_the_initial_matrices_alone():
    made = LoRALinear(linear(), rank=4, alpha=6, init_lora_weights="pissa")
    before = [parameter.detach().clone() for parameter in (made.lora_A, made.lora_B)]
    with torch.no_grad():
        made.lora_A += 1
        made.lora_B += 1
    assert made.initial_matrices is not None
    assert all(map(torch.equal, made.initial_matrices, before))


def test_dora_trains_an_output_whose_weights_are_zero():
    base, rows = linear(), torch.randn(6, 12).double()
    base.weight.data[3] = 0
    expected = base(rows)
    made = LoRALinear(base, rank=4, alpha=6, use_dora=True)
    torch.testing.assert_close(made(rows), expected)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        (made(rows) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (made(rows)[:, 3] - expected[:, 3]).abs().max() > 1e-3


def test_generation_computes_the_norms_of_dora_once(captioner, monkeypatch):
    inject(captioner.model, TARGETS, rank=2, use_dora=True)
    captioner.model.eval()
    norms, calls = LoRALinear.adapted_norms, []
    monkeypatch.setattr(
        LoRALinear, "adapted_norms", lambda self, weight: calls.append(self) or norms(self, weight)
    )
    features = torch.randn(2, 5, captioner.model.encoder.width)

    generate(captioner.model, features, prompt_ids=[1], end_id=2, pad_id=0, max_new_tokens=8)
    made = [layer for _, layer in lora_layers(captioner.model)]
    assert len(calls) == len(set(calls)) == len(made)
    rows = torch.randn(3, made[0].in_features)
    before = made[0](rows)
    with torch.no_grad():
        made[0].lora_magnitude_vector.mul_(2)
    bias = 0 if made[0].bias is None else made[0].bias
    torch.testing.assert_close(made[0](rows) - bias, 2 * (before - bias))


def test_the_groups_of_loraplus_are_views_of_one_tensor():
    layers = [layer(linear().float(), use_dora=is_dora) for is_dora in (True, False)]
    flat = FlatLoRAParameters(layers, torch.bfloat16, lr_ratio=16.0)
    assert flat.rates == [1.0, 16.0]
    assert sum(map(len, flat.groups)) == len(flat.values)
    with torch.no_grad():
        flat.groups[0].fill_(1.0)
        flat.groups[1].fill_(2.0)
    flat.refresh()
    for made in layers:
        assert (made.lora_A == 1).all() and (made.lora_B == 2).all()
        assert (made.matrices(torch.bfloat16)[1] == 2).all()
    flat.gradient.fill_(3.0)
    assert all((group.grad == 3).all() for group in flat.groups)


def test_both_forms_of_cross_attention_call_for_the_same_scaled_outputs(folder, monkeypatch):
    captioner = load_captioner(folder)
    model = captioner.model.double()
    inject(model, TARGETS, rank=2, dropout=0.0, use_dora=True)
    for parameter in lora_parameters(model).values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    outs, gradients = [], []
    for form in ("absorbed", "projected", "called"):
        monkeypatch.setattr(cross_attention, "absorbs", lambda *_, **__: form == "absorbed")
        if form == "called":  # one by one, as with hooks
            for module in (cross_attention, layer_module):
                monkeypatch.setattr(module, "is_plain", lambda layer: False)
        out = model.head(model.decode(TOKENS, model.encode(PIXELS.double())))
        parameters = lora_parameters(model)
        gradients.append(torch.autograd.grad(out.square().mean(), [*parameters.values()]))
        outs.append(out)
    for other, its_gradients in zip(outs[1:], gradients[1:]):
        torch.testing.assert_close(other, outs[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(its_gradients, gradients[0], rtol=1e-7, atol=1e-10)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"init_lora_weights": "pizza"}, "init_lora_weights is 'pizza'; expected default, gaussian"),
    ({"init_lora_weights": "eva"}, "eva is computed from training data"),
    ({"init_lora_weights": False}, "B other than zero is not supported"),
    ({"init_lora_weights": "orthogonal", "rank": 3}, "orthogonal needs an even rank, not 3"),
    ({"init_lora_weights": "pissa", "rank": 65}, "pissa takes at most 64 singular vectors"),
    ({"init_lora_weights": "pissa", "alpha_pattern": {"attention": -1}}, "alpha above 0, not -1"),
    ({"rank_pattern": {"querry": 2}}, "rank_pattern: 'querry' matches no adapted layer"),
    ({"alpha_pattern": {"0.none": 2}}, "alpha_pattern: '0.none' matches no adapted layer"),
    ({"rank_pattern": {"attention": 0}}, "'attention' is 0; expected a whole number above 0"),
    ({"alpha_pattern": {"attention": "x"}}, "'attention' is 'x'; expected a number"),
    ({"rank_pattern": "attention=2"}, "rank_pattern is 'attention=2'; expected a dictionary"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
    ({"layers_to_transform": [0, 2]}, "there is no layer 2 to adapt; the targets are in .* 0, 1"),
    ({"layers_to_transform": 2}, "there is no layer 2 to adapt"),
    ({"layers_to_transform": []}, r"layers_to_transform is \[\]; expected the number of a layer"),
    ({"layers_to_transform": True}, "layers_to_transform is True; expected the number"),
    ({"layers_to_transform": "01"}, "layers_to_transform is '01'; expected the number"),
    ({"init_lora_weights": None}, "init_lora_weights is None; expected default, gaussian"),
    ({"rank": 2.5}, "rank is 2.5; expected a whole number from 1 to "),
    ({"rank": True}, "rank is True; expected a whole number"),
    ({"rank": "4"}, "rank is '4'; expected a whole number"),
    ({"rank": 10**8}, r"rank is 100000000; expected a whole number from 1 to [\d,]+, 10 times"),
    ({"rank_pattern": {"key|c_attn": 10**8}}, "rank is 100000000; expected a whole number from 1"),
    ({"rank_pattern": {3: 3}}, r"rank_pattern is \{3: 3\}; expected a dictionary"),
    ({"alpha": "3"}, "alpha is '3'; expected a finite number"),
    ({"alpha": math.nan}, "alpha is nan; expected a finite number"),
    ({"alpha": 10**400}, "alpha is 1000.*; expected a finite number"),
    ({"dropout": "x"}, "dropout is 'x'; expected a number that is at least 0 and below 1"),
    ({"dropout": None}, "dropout is None; expected a number"),
    ({"use_dora": "yes"}, "use_dora is 'yes'; expected True or False"),
    ({"use_rslora": 1}, "use_rslora is 1; expected True or False"),
    ({"use_lorafa": None}, "use_lorafa is None; expected True or False"),
])
def test_what_cannot_be_is_refused_before_anything_changes(folder, settings, message):
    model = load_captioner(folder).model.requires_grad_()
    with pytest.raises(ValueError, match=message):
        inject(model, TARGETS, **settings)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("settings, message", [
    ({"rank": 2.5}, "rank is 2.5; expected a whole number from 1 to 70, 10 times the .*5 -> 7"),
    ({"alpha": "3"}, "alpha is '3'; expected a finite number"),
    ({"use_dora": "yes"}, "use_dora is 'yes'; expected True or False"),
    ({"init_lora_weights": None}, "init_lora_weights is None; expected default"),
])
def test_a_layer_refuses_the_same_before_its_base_is_frozen(settings, message):
    base = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=message):
        LoRALinear(base, **{"rank": 2, "alpha": 4} | settings)
    assert base.weight.requires_grad


@pytest.mark.parametrize("given", [0, 1, [0], (0, 1), range(2)])
def test_layers_are_one_number_or_several(given):
    model = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(5, 7)}) for _ in range(3))
    numbers = [given] if isinstance(given, int) else given
    assert select(model, ["fc"], given) == [f"{number}.fc" for number in numbers]


def test_layers_and_groups_choose_what_is_adapted(folder):
    model = load_captioner(folder).model
    plan = inject(
        model, TARGETS, rank=4, layers_to_transform=[1], rank_pattern={"feed_forward": 2},
        alpha_pattern={"feed_forward": 5},
    )
    assert all(".1." in module.path for module in plan.modules)
    kinds = {module.rank: module.scaling for module in plan.modules}
    assert kinds == {4: 8.0, 2: 2.5}


@pytest.mark.parametrize("changes, message", [
    ({"init_lora_weights": "pissa"}, "--init_lora_weights is for new adapters"),
    ({"rank_pattern": ("query=4",)}, "--rank_pattern is for new adapters"),
    ({"lora_layers": (1,)}, "--lora_layers is for new adapters"),
    ({"use_dora": True}, "--use_dora: the adapter in .* was trained without it"),
    ({"use_rslora": True}, "--use_rslora: the adapter in .* was trained without it"),
])
def test_an_adapter_that_is_continued_keeps_its_variant(folder, tmp_path, changes, message):
    path = adapter_folder(folder, tmp_path / "adapter")
    config = TrainingConfig(str(folder), init_adapter=str(path), **changes)
    with pytest.raises(ValueError, match=message):
        config.check()
        add_lora(load_captioner(folder), config, None)


def test_an_adapter_is_continued_with_its_A_frozen(folder, tmp_path):
    path = adapter_folder(folder, tmp_path / "adapter")
    captioner = load_captioner(folder)
    add_lora(captioner, TrainingConfig(str(folder), init_adapter=str(path), use_lorafa=True), None)
    for name, parameter in lora_parameters(captioner.model).items():
        assert parameter.requires_grad == name.endswith("lora_B")


@pytest.mark.parametrize("given, message", [
    ("query", "--rank_pattern is 'query'; expected NAME=NUMBER, such as attention=16"),
    ("=4", "--rank_pattern is '=4'; expected NAME=NUMBER"),
    ("query=x", "--rank_pattern query=x: 'x' is not a whole number above 0"),
    ("query=0", "--rank_pattern query=0: '0' is not a whole number above 0"),
    ("query=2 key=4 query=3", "--rank_pattern has query twice; give it once"),
])
def test_malformed_patterns_are_answered(given, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig("m", rank_pattern=tuple(given.split())).check()


def test_no_name_or_layer_is_given_twice():
    for name, values, told in [
        ("lora_layers", (1, 0, 1), "1"), ("lora_targets", ("query", "query"), "query"),
        ("alpha_pattern", ("a=1", "a=2.5"), "a"),
    ]:
        with pytest.raises(ValueError, match=f"--{name} has {told} twice; give it once"):
            TrainingConfig("m", **{name: values}).check()
