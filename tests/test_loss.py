"""The loss equals torch's own, without all logits at once; and it falls as a plain loop's does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import hugging_face, hugging_face_logits
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lora_engine.data.batches import Collate, Example, FeatureBatch, PixelBatch
from lora_engine.data.captions import IGNORED
from lora_engine.features.encoder import encode_pixels
from lora_engine.lora.injection import cast_frozen, inject, lora_parameters
from lora_engine.models import cross_attention
from lora_engine.models.pretrained import Captioner, load_captioner
from lora_engine.training import loss as loss_module
from lora_engine.training.loss import _FrozenHeadLoss, caption_loss
from lora_engine.training.trainer import Trainer

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
VOCAB, WIDTH = 90, 16


# --- the head's loss ------------------------------------------------------------------------


@dataclass
class Head:
    """A linear head, what comes in, and what should come out."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    smoothing: float = 0.0

    def loss(self) -> Tensor:
        return _FrozenHeadLoss.apply(
            self.hidden, self.weight, self.bias, self.targets, self.smoothing
        )

    def torchs(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient by torch, in fp64."""
        hidden = self.hidden.detach().double().requires_grad_()
        bias = None if self.bias is None else self.bias.double()
        loss = F.cross_entropy(
            F.linear(hidden, self.weight.double(), bias), self.targets, reduction="sum",
            ignore_index=IGNORED, label_smoothing=self.smoothing,
        )
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def head(
    num_rows: int = 7,
    *,
    dtype: torch.dtype = torch.float64,
    has_bias: bool = True,
    num_ignored: int = 0,
    smoothing: float = 0.0,
) -> Head:
    targets = torch.randint(VOCAB, (num_rows,))
    targets[torch.randperm(num_rows)[:num_ignored]] = IGNORED
    return Head(
        torch.randn(num_rows, WIDTH, dtype=dtype, requires_grad=True),
        torch.randn(VOCAB, WIDTH, dtype=dtype) * WIDTH**-0.5,
        torch.randn(VOCAB, dtype=dtype) if has_bias else None,
        targets,
        smoothing,
    )


@pytest.fixture
def allow(monkeypatch):
    """Sets how many rows' logits may exist at once."""
    return lambda rows: monkeypatch.setattr(loss_module, "_MAX_LOGITS", rows * VOCAB)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int]]:
    """(rows, columns) of every product that the loss forms."""
    shapes = []
    frozen_linear = loss_module.frozen_linear

    def spy(x, frozen, bias=None):
        shapes.append((len(x), len(frozen)))
        return frozen_linear(x, frozen, bias)

    monkeypatch.setattr(loss_module, "frozen_linear", spy)
    return shapes


@pytest.mark.parametrize("num_ignored", [0, 3, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradient_equal_torchs(
    allow, dtype, close, chunk, has_bias, smoothing, num_ignored
):
    allow(chunk)
    case = head(dtype=dtype, has_bias=has_bias, smoothing=smoothing, num_ignored=num_ignored)
    expected_loss, expected = case.torchs()
    loss = case.loss()
    loss.backward()
    assert loss.shape == () and loss.dtype == case.hidden.grad.dtype == dtype
    tolerance = {"rtol": close, "atol": close, "check_dtype": False}
    torch.testing.assert_close(loss.detach(), expected_loss, **tolerance)
    torch.testing.assert_close(case.hidden.grad, expected, **tolerance)
    assert not case.hidden.grad[case.targets == IGNORED].any()


@pytest.mark.parametrize("num_rows", [0, 1])
def test_one_row_is_enough_and_none_is_a_loss_of_0(num_rows):
    case = head(num_rows)
    expected_loss, expected = case.torchs()
    loss = case.loss()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(case.hidden.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_equals_finite_differences(allow):
    allow(2)
    case = head(5, smoothing=0.1, num_ignored=1)

    def loss(hidden: Tensor) -> Tensor:
        return Head(hidden, case.weight, case.bias, case.targets, case.smoothing).loss()

    assert torch.autograd.gradcheck(loss, case.hidden)


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str)
def test_in_half_precision_the_loss_is_added_up_in_fp32(allow, dtype, close):
    """Summed in bf16, a loss of thousands would not notice the next row."""
    allow(2)
    case = head(1000, dtype=dtype)
    expected_loss, expected = case.torchs()
    loss = case.loss()
    loss.backward()
    loss = loss.detach()
    assert loss.dtype == torch.float32 and case.hidden.grad.dtype == dtype
    assert float(loss) == pytest.approx(float(expected_loss), rel=0.1 * close)
    assert (case.hidden.grad - expected).norm() < close * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_gradient_follows_a_factor_behind_the_loss_which_fp16_could_not_hold(dtype):
    """A GradScaler's first factor is 2^16, beyond fp16."""
    case = head(dtype=dtype)
    case.hidden.data *= 0.01
    case.weight *= 0.1
    factor = torch.tensor(2.0**16, dtype=torch.promote_types(dtype, torch.float32))
    (plain,) = torch.autograd.grad(case.loss(), case.hidden)
    (scaled,) = torch.autograd.grad(factor * case.loss(), case.hidden)
    assert scaled.isfinite().all() and scaled.any()
    assert torch.equal(scaled.double(), 2.0**16 * plain.double())


# --- no more than is needed -----------------------------------------------------------------


@pytest.mark.parametrize("chunk, sizes", [
    (3, [3, 3, 1]), (7, [7]), (6.9, [6, 1]), (0.5, [1] * 7),
])
def test_no_more_logits_exist_at_once_than_allowed(monkeypatch, products, chunk, sizes):
    """But those of one row, where not even they are."""
    limit = int(chunk * VOCAB)
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", limit)
    head().loss()
    assert [rows for rows, columns in products if columns == VOCAB] == sizes
    assert max(rows * columns for rows, columns in products) <= max(limit, VOCAB)


def test_a_gradient_is_formed_only_where_one_is_needed(allow, products):
    allow(3)
    case = head()
    case.loss().backward()
    assert products == [(3, VOCAB), (3, WIDTH), (3, VOCAB), (3, WIDTH), (1, VOCAB), (1, WIDTH)]
    products.clear()
    with torch.no_grad():
        case.hidden = case.hidden.detach()
        assert not case.loss().requires_grad
    assert products == [(3, VOCAB), (3, VOCAB), (1, VOCAB)]


def test_only_the_gradient_is_kept_for_the_backward_pass():
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        head().loss()
    assert kept == [(7, WIDTH)]


def test_only_positions_with_targets_go_through_the_head(captioner, products):
    (batch,) = batches(captioner, [6])
    assert len(batch.target_ids) < batch.input_ids.numel()
    caption_loss(captioner.model, *batch.tensors(CPU))
    vocab_size = len(captioner.model.vocabulary.weight)
    assert (len(batch.target_ids), vocab_size) in products
    assert sum(rows for rows, columns in products if columns == vocab_size) == batch.num_targets


# --- the loss of a run ----------------------------------------------------------------------


NUM_STEPS, LR, MAX_GRAD_NORM = 50, 5e-3, 1.0
NUM_STEPS_WITH_DROPOUT = 10
TARGETS = ["attention", "feed_forward"]


def pixel_batches(captioner: Captioner, sizes: list[int]) -> list[PixelBatch]:
    """Pictures of noise with captions of many lengths."""
    lengths = sorted(1 + 5 * i % 19 for i in range(sum(sizes)))  # alike within a batch, as ever
    texts = [" ".join(checkpoints.WORDS[i : i + length]) for i, length in enumerate(lengths)]
    tokens = captioner.tokenizer.encode(texts)
    height, width = captioner.pixels.size
    generator = np.random.default_rng(0)
    examples = [
        Example(i, i, tokens[i], pixels=generator.integers(0, 256, (3, height, width), np.uint8))
        for i in range(len(texts))
    ]
    collate = Collate(
        image_size=(height, width), prompt_length=1, pad_id=captioner.tokenizer.pad_id
    )
    return [collate(examples[end - n : end]) for n, end in zip(sizes, np.cumsum(sizes))]


def batches(captioner: Captioner, sizes: list[int]) -> list[FeatureBatch]:
    """The same batches with their features."""
    return [
        batch.with_features(encode_pixels(captioner.model, batch.pixels, captioner.pixels))
        for batch in pixel_batches(captioner, sizes)
    ]


def step_batches(
    captioner: Captioner, make: Callable[[Captioner, list[int]], list] = batches
) -> Iterator[list]:
    """Two micro-batches per step, over and over."""
    made = make(captioner, [5, 3, 6, 2])
    for step in range(NUM_STEPS):
        yield made[:2] if step % 2 else made[2:]


@pytest.fixture(scope="module", params=["blip", "vit_gpt2"])
def folder(request, tmp_path_factory) -> Path:
    """Checkpoints of each family without dropouts of their own."""
    path = tmp_path_factory.mktemp(request.param)
    # 65 image tokens, so that cross-attention takes either form, by the captions' lengths.
    if request.param == "blip":
        checkpoints.write_blip(
            path, vision={"patch_size": 8}, text={"num_attention_heads": 2}
        )
    else:
        checkpoints.write_vit_gpt2(
            path, encoder={"patch_size": 8},
            decoder={"n_head": 2, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0},
        )
    return path


def new_captioner(folder: Path, *, dropout: float = 0.0) -> Captioner:
    captioner = load_captioner(folder)
    torch.manual_seed(0)
    inject(captioner.model, TARGETS, rank=4, alpha=8, dropout=dropout)
    captioner.model.train()
    return captioner


@pytest.fixture(scope="module")
def plain_losses(folder) -> list[float]:
    """A loop as one would write it: Hugging Face's model in PEFT, torch's AdamW, all of it."""
    captioner = new_captioner(folder)
    matrices = lora_parameters(captioner.model)
    targets = [name.removesuffix(".lora_A") for name in matrices if name.endswith(".lora_A")]
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets,
        fan_in_fan_out=captioner.family != "blip",
    )
    model = inject_adapter_in_model(config, hugging_face(folder)).train()
    trained = {
        name.replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert trained.keys() == matrices.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(matrices[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.01, foreach=False)
    settings = captioner.pixels
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (settings.mean, settings.std))
    losses = []
    for step in step_batches(captioner, pixel_batches):
        total = sum(batch.num_targets for batch in step)
        loss_of_step = 0.0
        for batch in step:
            pixels = (batch.pixels / 255 - mean) / std
            logits = hugging_face_logits(model, pixels, batch.input_ids)
            labels = torch.full((batch.input_ids.numel(),), IGNORED)
            labels[batch.target_positions] = batch.target_ids
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / total
            loss.backward()
            loss_of_step += loss.item()
        nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    return losses


def run(captioner: Captioner, num_steps: int = NUM_STEPS) -> list[float]:
    """The losses of the same steps by the engine's own parts."""
    trainer = Trainer(
        captioner.model, device=CPU, dtype=torch.float32, lr=LR, max_grad_norm=MAX_GRAD_NORM
    )
    losses = []
    for number, batches in enumerate(islice(step_batches(captioner), num_steps)):
        loss = trainer.accumulate(batches, number)
        trainer.update(loss, lr=LR)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("is_chosen", [True, False])
def test_the_loss_falls_as_a_plain_loops_does(folder, plain_losses, monkeypatch, is_chosen):
    """Measured: at most 1e-6 apart (BLIP), and 4e-6."""
    captioner = new_captioner(folder)
    forced = "projected" if captioner.family == "blip" else "absorbed"
    form = "chosen" if is_chosen else forced
    choose, taken = cross_attention.absorbs, []

    def absorbs(*args, **settings):
        taken.append(choose(*args, **settings) if form == "chosen" else form == "absorbed")
        return taken[-1]

    monkeypatch.setattr(cross_attention, "absorbs", absorbs)
    losses = run(captioner)
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert max(losses[-2:]) < 0.8 * min(losses[:2])  # the two kinds of steps take turns
    assert set(taken) == {"chosen": {True, False}, "absorbed": {True}, "projected": {False}}[form]


@pytest.fixture(scope="module")
def losses_with_dropout(folder) -> list[float]:
    return run(new_captioner(folder, dropout=0.1), NUM_STEPS_WITH_DROPOUT)


def test_checkpointing_leaves_the_losses_with_dropout_too(folder, losses_with_dropout):
    captioner = new_captioner(folder, dropout=0.1)
    captioner.model.decoder.gradient_checkpointing = True
    assert run(captioner, NUM_STEPS_WITH_DROPOUT) == pytest.approx(losses_with_dropout, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["blip"], indirect=True)
def test_compiling_leaves_the_losses_with_dropout_and_checkpointing_too(
    folder, losses_with_dropout, monkeypatch
):
    """One layer, traced as for the compiler, but run by torch's usual kernels.

    Tracing takes long: one family is traced. A layer of the other is compiled in test_training.py.
    """
    monkeypatch.setattr(cross_attention, "absorbs", lambda *_, **__: True)  # a graph less
    torch._dynamo.reset()
    # As constants: else dynamic tracing takes numbers such as scalings for inputs, and begins anew.
    with torch._dynamo.config.patch(specialize_float=True):
        captioner = new_captioner(folder, dropout=0.1)
        decoder = captioner.model.decoder
        decoder.layers[-1].compile(dynamic=True, fullgraph=True, backend="aot_eager")
        decoder.gradient_checkpointing = True
        losses = run(captioner, NUM_STEPS_WITH_DROPOUT)
    assert losses == pytest.approx(losses_with_dropout, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_head_that_is_not_the_plain_layer_is_called(folder, smoothing):
    """With a hook that changes nothing, loss and gradients are the same; the hook runs."""
    captioner = new_captioner(folder)
    (batch,) = batches(captioner, [6])
    matrices = list(lora_parameters(captioner.model).values())
    calls, found = [], []
    for is_hooked in (False, True):
        if is_hooked:
            captioner.model.vocabulary.register_forward_hook(lambda *args: calls.append(1))
        loss = caption_loss(captioner.model, *batch.tensors(CPU), label_smoothing=smoothing)
        found.append([loss, *torch.autograd.grad(loss, matrices)])
    assert calls == [1]
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# --- half precision -------------------------------------------------------------------------


def test_bf16_gradients_of_micro_batches_are_added_up_in_fp32(folder):
    """With cast weights and cast matrices: exactly the sum of those of each by itself."""
    captioner = new_captioner(folder)
    model, step = captioner.model, batches(captioner, [5, 3, 6])
    for matrix in lora_parameters(model).values():
        nn.init.normal_(matrix, std=0.1)
    cast_frozen(model, torch.bfloat16)
    trainer = Trainer(model, device=CPU, dtype=torch.bfloat16, lr=LR)
    flat = trainer.lora

    alone = []
    for batch in step:
        with torch.autocast("cpu", torch.bfloat16):
            loss = caption_loss(model, *batch.tensors(CPU))
        loss.backward(torch.tensor(1 / sum(batch.num_targets for batch in step)))
        alone.append(flat.gradient.clone())
        flat.gradient.zero_()
    trainer.accumulate(step, 1)
    assert flat.gradient.dtype == torch.float32
    assert all(gradient.any() for gradient in alone)
    assert torch.equal(flat.gradient, sum(alone[1:], alone[0]))
    assert all(matrix.grad.any() for matrix in lora_parameters(model).values())
    in_bf16 = sum((gradient.bfloat16() for gradient in alone[1:]), alone[0].bfloat16())
    assert not torch.equal(in_bf16.float(), flat.gradient)  # what would have been lost
