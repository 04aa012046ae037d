"""The peers of the benchmarks do the work that they claim: equal losses and gradients, in fp32."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")

from benchmarks import peers  # noqa: E402
from benchmarks.checkpoints import write_checkpoint  # noqa: E402
from benchmarks.rows import END_ID, START_ID, Rows  # noqa: E402
from lora_engine.data.pixels import PixelSettings  # noqa: E402

SETTINGS = PixelSettings((64, 64), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
DEVICE = torch.device("cpu")
NUM_ROWS = 5
NUM_ADAPTED = {"blip": 2 * 10, "vit_gpt2": 2 * 7}  # two layers
LOOPS = {
    "B2": peers.peft_loop,
    "B2, SDPA": lambda *args, **options: peers.peft_loop(*args, **options, sdpa=True),
    "B3": peers.feature_loop,
    "B4": lambda *args, **options: peers.compiled_loop(
        *args, **options, compile_options=None
    ),
}


@pytest.fixture(scope="module", params=["blip", "vit_gpt2"])
def case(request, tmp_path_factory):
    """A small checkpoint of each family with weights that matter, and rows for it."""
    model = request.param
    folder = tmp_path_factory.mktemp(model)
    write_checkpoint(model, folder, small=True, dropout=0.0)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() > 1:  # as drawn, they are so small that everything comes out alike
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model, folder, Rows(NUM_ROWS, (64, 64), model=model, seed=1, captions_per_image=2)


def build(kind, case, batch_size=NUM_ROWS, **options):
    """A peer whose B matrices are not zero, so that those of A have a gradient."""
    model, folder, rows = case
    peer = kind(
        folder, rows, SETTINGS, model=model, device=DEVICE, dtype=torch.float32,
        batch_size=batch_size, **options,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return peer


def loss_and_gradients(peer, indices):
    peer.model.zero_grad()
    loss = peer.loss_of(peer.batch_of(torch.tensor(indices)))
    loss.backward()
    gradients = {n: p.grad for n, p in peer.model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients


def expected_loss(peer, case, indices):
    """Caption by caption, without padding, through the whole model that PEFT wraps."""
    model, _, rows = case
    total = count = 0
    for i in indices:
        pixels = torch.from_numpy(rows.pixels[rows.image_of_row[i]])[None] / 255
        ids = torch.from_numpy(rows.captions[i])[None]
        with torch.no_grad():
            logits = peer.model(
                pixel_values=(pixels - 0.5) / 0.25, **{peers._IDS_NAME[model]: ids}
            ).logits
        log_probs = logits.log_softmax(-1)[0, :-1]
        total -= log_probs.gather(1, ids[0, 1:, None]).sum()
        count += len(log_probs)
    return total / count


@pytest.mark.parametrize("name", LOOPS)
def test_losses_are_those_of_single_captions_and_gradients_agree(case, name):
    reference = build(peers.peft_loop, case)
    peer = build(LOOPS[name], case)
    indices = [3, 0, 4]  # fewer than a batch, so that B4 fills it up
    loss, gradients = loss_and_gradients(peer, indices)
    reference_loss, reference_gradients = loss_and_gradients(reference, indices)

    assert len(gradients) == 2 * NUM_ADAPTED[case[0]]
    torch.testing.assert_close(loss, expected_loss(reference, case, indices))
    torch.testing.assert_close(loss, reference_loss)
    assert gradients.keys() == reference_gradients.keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, reference_gradients[key], rtol=1e-3, atol=1e-5, msg=key
        )


@pytest.mark.parametrize("name", LOOPS)
def test_an_epoch_trains(case, name):
    peer = build(LOOPS[name], case, batch_size=2)
    before = loss_and_gradients(peer, [0, 1])[0]
    assert peer(0) > 0 and peer(1) > 0
    assert loss_and_gradients(peer, [0, 1])[0] < before


class Waits(TorchDispatchMode):
    """Collects the operations after which a program would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"):
            self.found.append(name)
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_does_not_wait_for_the_device(case, name):
    peer = build(LOOPS[name], case)
    batch = peer.batch_of(torch.arange(3))
    with Waits() as waits:
        assert torch.ones(1).item() == 1  # one that is found
        peer.loss_of(batch).backward()
    assert waits.found == ["_local_scalar_dense"]


def test_sdpa_is_patched_into_every_layer_of_blips_encoder(case):
    model = case[0]
    peer = build(LOOPS["B2, SDPA"], case)
    encoder, _ = peers._halves(peer.model, model)
    num_patched = sum("forward" in vars(module) for module in encoder.modules())
    assert num_patched == (2 if model == "blip" else 0)
    # What the docstring says of the others.
    assert encoder.config._attn_implementation == ("eager" if model == "blip" else "sdpa")


def test_b4_pads_to_few_shapes(case):
    rows = case[2]
    lengths = torch.from_numpy(rows.lengths)
    limit = int(lengths.min()) - 1
    peer = build(LOOPS["B4"], case, batch_size=2, buckets=(limit, 40))
    for indices in lengths.argsort().split(2):
        batch = peer.batch_of(indices)
        num_tokens = limit if lengths[indices].max() - 1 == limit else 40
        assert batch.input_ids.shape == batch.labels.shape == (2, num_tokens)
        assert len(batch.images) == 2
        assert (batch.labels != -100).sum() == (lengths[indices] - 1).sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vit_gpt2"], indirect=True)  # tracing takes seconds
def test_b4_compiles_to_the_same(case):
    # "aot_eager" traces forward and backward as "inductor" does, and generates no code.
    options = {"dynamic": False, "fullgraph": True, "backend": "aot_eager"}
    compiled = build(peers.compiled_loop, case, compile_options=options, buckets=(32,))
    plain = build(peers.compiled_loop, case, compile_options=None, buckets=(32,))
    loss, gradients = loss_and_gradients(compiled, [1, 2])
    plain_loss, plain_gradients = loss_and_gradients(plain, [1, 2])
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-3, atol=1e-5)


def test_b1_takes_the_steps_of_b2(case, capfd):
    pytest.importorskip("accelerate")
    trainer = build(peers.trainer, case, num_workers=1)
    plain = build(peers.peft_loop, case)
    everything = range(NUM_ROWS)
    torch.testing.assert_close(
        loss_and_gradients(trainer, everything), loss_and_gradients(plain, everything),
        rtol=1e-3, atol=1e-5,
    )
    trainer.model.zero_grad()
    for number in range(2):  # an epoch is one batch; the second goes on with the same moments
        assert trainer(number) > 0
        plain(number)
    after = loss_and_gradients(trainer, everything)[0]
    torch.testing.assert_close(after, loss_and_gradients(plain, everything)[0], rtol=1e-4, atol=0)
    assert "train_loss" not in capfd.readouterr().out


def test_b0_counts_pads_and_shifts_blips_labels_twice(case):
    model, folder, rows = case
    rows = Rows(2, (64, 64), model=model, seed=1)
    case = model, folder, rows
    peer = build(peers.published_loop, case, batch_size=1)
    num_positions, pad_id = (512, 0) if model == "blip" else (1024, 50256)
    ids = torch.full((1, num_positions), pad_id)
    caption = torch.from_numpy(rows.captions[1])
    caption = caption if model == "blip" else caption[1:-1]
    ids[0, : len(caption)] = caption
    batch = peer.batch_of(torch.tensor([1]))
    with torch.no_grad():
        loss = peer.loss_of(batch)
        pixels = (batch.images / 255 - 0.5) / 0.25
        logits = peer.model(pixel_values=pixels, **{peers._IDS_NAME[model]: ids}).logits[0]
    ahead = 2 if model == "blip" else 1
    expected = F.cross_entropy(logits[:-ahead], ids[0, ahead:])
    torch.testing.assert_close(loss, expected)
    careful = build(peers.peft_loop, case)
    assert abs(loss - loss_and_gradients(careful, [1])[0]) > 0.1
    trainable = next(p for p in peer.model.parameters() if p.requires_grad)
    before = trainable.detach().clone()
    assert peer(0) > 0 and not torch.equal(trainable, before)


def test_batches_gathered_ahead_keep_their_order():
    order = [torch.tensor([i]) for i in range(10)]
    assert list(peers._ahead(lambda indices: indices, order)) == order


def test_rows_have_lengths_of_real_captions_and_share_images():
    rows = Rows(2000, (4, 4), model="blip", captions_per_image=5)
    again = Rows(2000, (4, 4), model="blip", captions_per_image=5)
    assert np.array_equal(rows.pixels, again.pixels)
    assert all(map(np.array_equal, rows.captions, again.captions))
    assert rows.pixels.shape == (400, 3, 4, 4) and rows.pixels.dtype == np.uint8
    assert np.array_equal(np.bincount(rows.image_of_row), np.full(400, 5))
    assert all(c[0] == START_ID and c[-1] == END_ID for c in rows.captions)
    assert rows.lengths.min() == 7 and rows.lengths.max() == 33
    assert abs(rows.lengths.mean() - 12.71) < 0.3


def test_gpt2_dropout_is_written_as_asked(tmp_path):
    for dropout in (0.1, 0.0):
        write_checkpoint("vit_gpt2", tmp_path, small=True, dropout=dropout)
        config = Path(tmp_path / "config.json").read_text()
        written = re.findall(r'"(?:attn|embd|resid)_pdrop": ([0-9.]+)', config)
        assert list(map(float, written)) == [dropout] * 3
