"""The optimizer is AdamW as the paper writes it, and a step that is not finite is no step."""

import math
import operator
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_engine.lora.injection import cast_frozen
from lora_engine.lora.layer import LoRALinear
from lora_engine.training.optim import set_learning_rate
from lora_engine.training.trainer import Trainer

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
FINITE = torch.tensor(1.0)


def layers(**settings) -> list[LoRALinear]:
    """Matrices of sizes that are no multiples of anything."""
    made = [
        LoRALinear(nn.Linear(5, 7), rank=3, alpha=1, **settings),
        LoRALinear(nn.Linear(130, 2), rank=1, alpha=1, **settings),
    ]
    for layer in made:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return made


def matrices_of(layers) -> list[nn.Parameter]:
    """The trained ones."""
    return [p for layer in layers for p in layer.lora_parameters().values() if p.requires_grad]


def a_trainer(made=None, **settings) -> tuple[Trainer, list[nn.Parameter]]:
    made = made or layers()
    settings = {"dtype": torch.float32, "lr": 0.1, "weight_decay": 0.1} | settings
    return Trainer(nn.ModuleList(made), device=torch.device("cpu"), **settings), matrices_of(made)


def give_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad.copy_(scale * gradient)


def reference_adamw(weights, gradients, rates, *, ratios, decay, max_grad_norm):
    """Algorithm 2 of arXiv:1711.05101 with clipping before it, in fp64, a number at a time; the
    rate of each weight is `ratios` times that of the step."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    w = torch.cat([x.flatten() for x in weights]).double().tolist()
    ratio_of = [ratio for x, ratio in zip(weights, ratios) for _ in range(x.numel())]
    m, v = [0.0] * len(w), [0.0] * len(w)
    for step, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        g = torch.cat([x.flatten() for x in gradient]).double().tolist()
        norm = math.sqrt(sum(x * x for x in g))
        factor = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
        for i in range(len(w)):
            gi, rate_i = g[i] * factor, rate * ratio_of[i]
            w[i] -= rate_i * decay * w[i]
            m[i] = beta1 * m[i] + (1 - beta1) * gi
            v[i] = beta2 * v[i] + (1 - beta2) * gi * gi
            m_hat, v_hat = m[i] / (1 - beta1**step), v[i] / (1 - beta2**step)
            w[i] -= rate_i * m_hat / (math.sqrt(v_hat) + eps)
    return torch.tensor(w, dtype=torch.float64)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("ratio, use_lorafa", [(None, False), (4.0, False), (4.0, True)])
def test_steps_equal_adamw_written_by_hand(max_grad_norm, ratio, use_lorafa):
    """With LoRA+ the rate of B, and so its decay, is `ratio` times that of A."""
    made = layers(use_lorafa=use_lorafa)
    trainer, parameters = a_trainer(
        made, lr=123.0, max_grad_norm=max_grad_norm, loraplus_lr_ratio=ratio  # the steps' lr counts
    )
    ratios = [1.0 if any(p is layer.lora_A for layer in made) else ratio or 1.0 for p in parameters]
    start = [p.detach().clone() for p in parameters]
    rates = [0.01, 0.02, 0.015, 0.01, 0.005]
    gradients = []
    for step, rate in enumerate(rates):
        give_gradients(parameters, step, scale=0.3)
        gradients.append([p.grad.clone() for p in parameters])
        trainer.update(FINITE, lr=rate)
    expected = reference_adamw(
        start, gradients, rates, ratios=ratios, decay=0.1, max_grad_norm=max_grad_norm
    )
    ours = torch.cat([p.detach().flatten() for p in parameters]).double()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert (ours - torch.cat([x.flatten() for x in start])).abs().min() > 1e-5  # all have moved


def state_of(trainer):
    names = "exp_avg", "exp_avg_sq", "step"
    states = [trainer.optimizer.state[group] for group in trainer.lora.groups]
    return [trainer.lora.values.detach().clone(), *(s[n].clone() for s in states for n in names)]


def after(poisoned, ratio, where=(2, 4), num_steps=6):
    """Matrices and state after some steps, those of the numbers `where` poisoned or left out."""
    torch.manual_seed(0)
    trainer, parameters = a_trainer(loraplus_lr_ratio=ratio)
    for step in range(num_steps):
        give_gradients(parameters, step)
        loss = FINITE
        if step in where:
            if poisoned == "left out":
                continue
            before = state_of(trainer)
            if poisoned == "loss":
                loss = torch.tensor(float("nan"))
            else:
                parameters[1].grad[2, 0] = float(poisoned)
        norm = trainer.update(loss, lr=0.1)
        assert not any(p.grad.any() for p in parameters)
        if step in where:
            assert all(map(torch.equal, state_of(trainer), before))
            assert loss.isnan() or not norm.isfinite()
    return state_of(trainer)


@pytest.mark.parametrize("ratio", [None, 4.0])
@pytest.mark.parametrize("poisoned", ["loss", "nan", "inf", "-inf"])
def test_a_step_that_is_not_finite_changes_neither_matrices_nor_moments_nor_count(poisoned, ratio):
    """The run goes on as if the step had never been."""
    assert all(map(torch.equal, after(poisoned, ratio), after("left out", ratio)))


@pytest.mark.parametrize("ratio, where", [(None, 0), (4.0, 0), (4.0, 1)])
def test_with_a_grad_scaler_an_overflow_is_skipped_too(ratio, where):
    """Also in one of the two groups of LoRA+ alone."""
    trainer, parameters = a_trainer(loraplus_lr_ratio=ratio)
    trainer.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    twins = layers()
    reference = matrices_of(twins)
    for r, p in zip(reference, parameters):
        r.data.copy_(p)
    plain, _ = a_trainer(twins, loraplus_lr_ratio=ratio)
    for step in range(4):
        give_gradients(reference, step)
        for p, r in zip(parameters, reference):
            p.grad.copy_(r.grad * scaler.scale(torch.ones(())))
        if step == 2:
            parameters[where].grad[0, 0] = float("inf")
            before, scale = state_of(trainer), scaler.get_scale()
        norm = trainer.update(FINITE, lr=0.1)
        if step == 2:
            assert all(map(torch.equal, state_of(trainer), before))
            assert scaler.get_scale() == scale / 2 and not norm.isfinite()
            continue
        expected = plain.update(FINITE, lr=0.1)
        torch.testing.assert_close(norm, expected)
    for p, r in zip(parameters, reference):
        torch.testing.assert_close(p, r)


@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_the_norm_is_of_all_gradients_together_before_clipping(scale):
    trainer, parameters = a_trainer(weight_decay=0.0)
    give_gradients(parameters, 0, scale)
    expected = torch.cat([p.grad.flatten() for p in parameters]).norm()
    norm = trainer.update(FINITE, lr=0.1)
    torch.testing.assert_close(norm, expected)


def test_a_zero_gradient_is_finite_and_only_decays():
    trainer, parameters = a_trainer(layers(use_dora=True), weight_decay=0.5)
    assert len(parameters) == 6  # with DoRA's magnitudes
    start = [p.detach().clone() for p in parameters]
    for trainer.max_grad_norm in (0.0, 1.0):
        for p in parameters:
            p.grad.zero_()
        trainer.update(FINITE, lr=0.1)
    for p, before in zip(parameters, start):
        torch.testing.assert_close(p.detach(), before * 0.95**2)


def test_a_flat_matrix_is_the_layers_own_and_its_gradient_too():
    """Also after a step, and with the matrices' first values."""
    made = layers()
    before = [matrix.detach().clone() for matrix in matrices_of(made)]
    trainer, _ = a_trainer(made, weight_decay=0.0, max_grad_norm=0.0)
    flat = trainer.lora
    assert all(map(torch.equal, matrices_of(made), before))
    x = torch.randn(4, 5)
    made[0](x).square().sum().backward()
    one_gradient = made[0].lora_A.grad.clone()
    made[0](x).square().sum().backward()
    torch.testing.assert_close(made[0].lora_A.grad, 2 * one_gradient)
    torch.testing.assert_close(flat.values.grad[:15].view(3, 5), 2 * one_gradient)
    trainer.update(FINITE, lr=0.1)
    assert not torch.equal(made[0].lora_A, before[0])
    assert torch.equal(made[0].lora_A, flat.values[:15].view(3, 5))
    assert torch.equal(made[1].lora_A, before[2])  # had no gradient


@pytest.mark.parametrize("use_lorafa", [False, True])
def test_layers_compute_with_one_cast_a_step_and_gradients_stay_fp32(use_lorafa):
    made = layers(use_lorafa=use_lorafa)
    trainer, _ = a_trainer(made, dtype=torch.bfloat16, max_grad_norm=0.0)
    trained = [*made[0].lora_parameters().values()][use_lorafa:]
    first_A = made[0].lora_A.detach().clone()
    cast_frozen(made[0], torch.bfloat16)
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    for _ in range(3):
        cast_A, cast_B = made[0].matrices(torch.bfloat16)
        assert cast_A.data_ptr() == made[0].cast_matrices[0].data_ptr()
        assert torch.equal(cast_A, made[0].lora_A.bfloat16())
        assert torch.equal(cast_B, made[0].lora_B.bfloat16())
        with trainer.lora.cast_gradients():  # the copies themselves take the gradients
            within = made[0].matrices(torch.bfloat16)
        assert all(map(operator.is_, within, made[0].cast_matrices))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made[0](x).float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)
        trainer.update(FINITE, lr=0.1)
    assert torch.equal(made[0].lora_A, first_A) == use_lorafa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poisoned", [None, "loss", "gradient", "gradient, with a scaler"])
def test_the_moving_average_is_that_of_tensorflow_over_the_steps_that_count(poisoned, dtype):
    trainer, parameters = a_trainer(dtype=dtype, ema_decay=0.3)
    plain, others = a_trainer(dtype=dtype)
    if poisoned == "gradient, with a scaler":
        trainer.scaler, plain.scaler = (torch.amp.GradScaler("cpu", init_scale=1.0) for _ in "ab")
        for one in (trainer, plain):
            one.scaler.scale(torch.ones(()))
    for mine, its in zip(parameters, others):
        its.data.copy_(mine)
    values = trainer.lora.values
    expected, count = values.detach().double(), 0
    for step in range(6):
        for one, matrices in ((trainer, parameters), (plain, others)):
            give_gradients(matrices, step)
            loss = FINITE
            if step in (0, 3) and poisoned == "loss":
                loss = torch.tensor(float("nan"))
            elif step in (0, 3) and poisoned:
                matrices[1].grad[2, 0] = float("inf")
            one.update(loss, lr=0.1)
        if not (step in (0, 3) and poisoned):
            count += 1
            decay = min(0.3, (1 + count) / (10 + count))
            expected = decay * expected + (1 - decay) * values.detach().double()
        torch.testing.assert_close(trainer.average.values.double(), expected)
    assert count == (4 if poisoned else 6) and torch.equal(values, plain.lora.values)


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_takes_the_place_of_the_parameters_and_gives_it_back(fails):
    made = layers()
    trainer, parameters = a_trainer(made, dtype=torch.bfloat16, ema_decay=0.9)
    give_gradients(parameters, 0)
    trainer.update(FINITE, lr=0.1)

    def state():
        return [made[0].lora_B.detach().clone(), made[0].matrices(torch.bfloat16)[1].clone()]

    before = state()
    with pytest.raises(OSError) if fails else nullcontext(), trainer.average.in_place():
        within = state()
        assert not torch.equal(within[0], before[0]) and not torch.equal(within[1], before[1])
        assert torch.equal(within[0].bfloat16(), within[1])
        assert torch.equal(trainer.average.values, trainer.lora.values)
        if fails:
            raise OSError
    assert all(map(torch.equal, state(), before))


def test_betas_reach_adamw():
    trainer, _ = a_trainer(betas=(0.5, 0.75))
    assert trainer.optimizer.param_groups[0]["betas"] == (0.5, 0.75)


def test_rates_on_a_gpu_are_set_in_place():
    trainer, _ = a_trainer(loraplus_lr_ratio=4.0)
    rates = [torch.zeros(()), torch.zeros(())]
    for group, rate in zip(trainer.optimizer.param_groups, rates):
        group["lr"] = rate
    set_learning_rate(trainer.optimizer, 0.5)
    assert rates == [0.5, 2.0]
