"""A GPU's step keeps within its budget, and what it computes otherwise than a CPU is the same."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_budget
from benchmarks.gpu_budget import (
    CARDS,
    Budget,
    Kernel,
    card_of,
    expected_captions_per_s,
    is_aligned,
    meta_trainer,
    step_budget,
)
from benchmarks.measure import MODELS
from lora_engine.data.captions import IGNORED
from lora_engine.lora import matmul
from lora_engine.lora.dropout import add_kept_part, kept_part
from lora_engine.lora.injection import cast_frozen, inject, lora_parameters
from lora_engine.lora.layer import LoRALinear, project
from lora_engine.models.cross_attention import FeatureProjection, absorbed, absorbs, attend
from lora_engine.models.pretrained import load_captioner
from lora_engine.training.loss import caption_loss
from lora_engine.training.optim import FlatLoRAParameters

META = torch.device("meta")
HALF = torch.empty(336, dtype=torch.float16)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> Callable[[], None]:
    """From its call on, a CPU's tensors are computed with as a GPU's."""
    return lambda: monkeypatch.setattr(matmul, "_CPU", "none")


@cache
def full_size(model: str, num_tokens: int) -> Budget:
    return step_budget(meta_trainer(model), 32, num_tokens)


def counted(function: Callable[[], object]) -> Budget:
    budget = Budget(1, 0)
    with gpu_budget._Counting(budget):
        function()
    return budget


def kinds(function: Callable[[], object]) -> dict[str, int]:
    return dict(counted(function).by_kind())


# --- the budget of a step at the published sizes ------------------------------------------------


@pytest.mark.parametrize("model, num_kernels, num_gigabytes", [
    ("blip", 1_510, 11.5), ("vit_gpt2", 1_500, 8.3),
])
def test_a_step_keeps_within_its_budget(model, num_kernels, num_gigabytes):
    """At batch 32 and 16 tokens; before scalings, casts and sums were merged some 3,000 kernels."""
    budget = full_size(model, 16)
    assert 1_000 < budget.num_kernels <= num_kernels
    assert budget.num_bytes <= num_gigabytes * 1e9
    assert budget.flops > 400e9
    assert budget.unaligned_share == 0
    assert budget.waits == []
    kinds = budget.by_kind()
    assert kinds["where"] == kinds["clone"] == kinds["scalar_tensor"] == 0
    assert kinds["cat"] < 40 and kinds["add_"] < 10 and kinds["mul_"] < 10


@pytest.mark.parametrize("model", MODELS)
def test_graphs_of_all_lengths_take_little_more_memory_than_the_largest(model):
    """Although each keeps its inputs."""
    lengths = gpu_budget.caption_buckets(model)
    assert lengths == [8, 12, 16, 20, 24, 28, 32]
    budgets = [full_size(model, 16)] * 6 + [full_size(model, 32)]
    memory = gpu_budget.graph_memory(budgets)
    assert memory["sharing activations"] <= 1.2 * memory["of the largest alone"]
    assert memory["sharing nothing"] > 4 * memory["of the largest alone"]


def test_the_benchmark_prints_a_line_for_each_batch_and_a_note(capsys):
    gpu_budget.main(["--quick", "--model", "blip", "--batch_sizes", "2", "--lengths", "4", "5",
                     "--kinds"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("blip  ")] == [
        ["blip", "2", "4"], ["blip", "2", "5"]
    ]
    assert sum("mm, " in line for line in lines) == 2  # kernels by kind
    assert "MB sharing activations" in lines[-1]


# --- counting -----------------------------------------------------------------------------------


def test_views_and_allocations_are_no_kernels_and_everything_else_is_one():
    x = torch.empty(6, 8, device=META)
    assert kinds(lambda: (x.T.view(2, 4, 6)[0], x.split(2), torch.empty_like(x), x.detach())) == {}
    assert kinds(lambda: x + 1) == {"add": 1}
    assert kinds(lambda: torch.where(x > 0, x, 0.0)) == {"gt": 1, "where": 1, "scalar_tensor": 1}
    assert kinds(lambda: torch.cat([x] * 129)) == {"cat": 2}


def test_bytes_and_flops_are_those_of_operands_and_results():
    x, y = (torch.empty(shape, device=META, dtype=torch.bfloat16) for shape in ((8, 16), (16, 32)))
    budget = counted(lambda: x @ y)
    assert budget.num_bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert budget.flops == 2 * 8 * 16 * 32
    attention = counted(lambda: gpu_budget._flash_attention(*[x.view(1, 2, 4, 16)] * 3))
    assert attention.flops == 4 * 2 * 4 * 4 * 16
    assert attention.num_kernels == 1


def test_a_wait_of_the_host_is_counted():
    x = torch.ones(3)
    assert counted(lambda: x.sum().item()).waits == ["_local_scalar_dense"]
    assert counted(lambda: x.nonzero()).waits == ["nonzero"]


@pytest.mark.parametrize("matrix, expected", [
    (HALF[:80].view(5, 16), True),
    (HALF[:80].view(5, 16).T, True),  # transposed: its columns are contiguous
    (HALF[:80].view(16, 5), False),
    (HALF[:80].view(16, 5).T, False),
    (HALF[:120].view(5, 24)[:, :8], True),
    (HALF[:120].view(5, 24)[:, 4:12], False),  # begins elsewhere
    (HALF[:100].view(5, 20)[:, :16], False),  # rows begin elsewhere
    (HALF[:100].view(5, 20).float()[:, :16], True),
    (HALF[:336].view(3, 7, 16), True),
    (HALF[:336].view(3, 16, 7), False),
])
def test_matrices_are_aligned_in_steps_of_16_bytes(matrix, expected):
    assert is_aligned(matrix) is expected


def test_a_kernel_takes_the_longest_of_launch_bytes_and_flops():
    card = gpu_budget.Card(tflops=100, bandwidth_gb_s=1000)
    assert Kernel("a", 1, 0, 0, True).seconds(card) == 2e-6
    assert Kernel("a", 1, 10**9, 0, True).seconds(card) == pytest.approx(1 / 800)
    assert Kernel("a", 1, 0, 10**12, True).seconds(card) == pytest.approx(1 / 60)
    assert Kernel("a", 1, 0, 10**12, False).seconds(card) == pytest.approx(4 / 60)


@pytest.mark.parametrize("name, card", [
    ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200"), ("Tesla T4", "T4"),
    ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None), ("NVIDIA GeForce RTX 4090 D", None),
])
def test_a_card_is_known_by_its_name(name, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda", 0)
    assert card_of(gpu, torch.bfloat16) == CARDS.get(card)
    assert card_of(gpu, torch.float32) is None
    assert card_of(torch.device("cpu"), torch.bfloat16) is None


def test_the_speed_to_expect_of_an_epoch_is_that_of_its_batches():
    """Padded; the last one is shorter. A first epoch adds the images, in the encoder's batches."""
    trainer, card = meta_trainer("blip", small=True), CARDS["T4"]
    lengths = np.array([9, 8, 17, 14, 17])
    seconds = [step_budget(trainer, *shape).seconds(card) for shape in ((2, 8), (2, 16), (1, 16))]
    expected = expected_captions_per_s(trainer, card, lengths, batch_size=2)
    assert expected == pytest.approx(5 / sum(seconds))
    encoding = gpu_budget.encoder_budget(trainer, 64)
    assert encoding.num_kernels > 20 and encoding.unaligned_share == 0
    with_images = expected_captions_per_s(trainer, card, lengths, batch_size=2, num_images=65)
    assert with_images == pytest.approx(5 / (sum(seconds) + 2 * encoding.seconds(card)))


# --- few kernels --------------------------------------------------------------------------------


def test_a_mask_is_one_kernel_and_adding_what_it_keeps_too():
    x, kept = torch.empty(4, 8, device=META), torch.empty(4, 8, device=META, dtype=torch.bool)
    assert kinds(lambda: kept_part(x, kept)) == {"mul": 1}
    assert kinds(lambda: add_kept_part(x, x, kept)) == {"addcmul_": 1}


def test_scalings_and_sums_are_part_of_the_products():
    """One layer, and three that share an input; nothing is copied for a single one."""
    x = torch.empty(16, 64, device=META, requires_grad=True)
    for number, joins in ((1, {}), (3, {"cat": 1})):
        with META:
            layers = [
                LoRALinear(nn.Linear(64, 64), rank=8, alpha=32) for _ in range(number)
            ]
        matrices = [m for layer in layers for m in (layer.lora_A, layer.lora_B)]
        with gpu_budget._as_on_a_gpu(torch.float32):
            forward = kinds(lambda: project(x, *layers))
            outs = project(x, *layers)
        assert forward == {"addmm": number, "mm": 1, "addmm_": number} | joins
        # For each layer G, dB and a term of dX, which G A adds to; and dA.
        backward = kinds(lambda: torch.autograd.grad(outs, [x, *matrices], outs))
        assert backward == {"mm": 2, "addmm_": 3 * number} | joins


def test_cross_attention_projects_on_a_gpu():
    shapes = (4, 768), (577, 768), 12
    assert absorbs(*shapes, with_backward=True)
    assert not absorbs(*shapes, with_backward=True, on_cpu=False)


def test_the_softmax_of_the_absorbed_form_is_one_kernel():
    """Of bf16 scores; with a result in fp32 they would be cast first, and the result cast back."""
    weights = torch.empty(2, 16, 16, device=META, dtype=torch.bfloat16)
    key, value = (FeatureProjection(weight, None) for weight in weights)
    query = torch.empty(2, 3, 16, device=META, dtype=torch.bfloat16)
    with gpu_budget._as_on_a_gpu(torch.bfloat16):
        found = kinds(lambda: absorbed(query, query, key, value, 2, 0.0))
    assert found.keys() == {"bmm", "clone", "_softmax"} and found["_softmax"] == 1


def test_keys_and_values_are_two_kernels_each():
    with META:
        query, features = torch.empty(2, 5, 16), torch.empty(2, 9, 16)
        keys, values = (
            FeatureProjection(
                torch.empty(16, 16), torch.empty(16), torch.empty(2, 9, 8).requires_grad_(),
                torch.empty(16, 8).requires_grad_(), 2.0,
            ) for _ in range(2)
        )
    with gpu_budget._as_on_a_gpu(torch.float32):
        found = kinds(lambda: attend(query, features, keys, values, num_heads=2, scale=0.5))
    assert found == {
        "mm": 1, "addmm": 1, "addmm_": 2, "_scaled_dot_product_flash_attention": 1
    }


def test_gradients_of_all_matrices_are_added_at_once():
    """The number of casts and sums does not depend on the number of layers."""
    found = []
    for number in (2, 6):
        with META:
            layers = [LoRALinear(nn.Linear(64, 64), rank=8, alpha=32) for _ in range(number)]
        flat = FlatLoRAParameters(layers, torch.bfloat16)
        for layer in layers:
            cast_frozen(layer, torch.bfloat16)
        x = torch.empty(16, 64, device=META, dtype=torch.bfloat16)

        def step() -> None:
            with flat.cast_gradients():
                y = x
                for layer in layers:
                    y = layer(y)
                y.backward(y.detach())

        with gpu_budget._as_on_a_gpu(torch.bfloat16):
            found.append(kinds(step))
    few, many = ({k: n for k, n in kind.items() if "mm" not in k} for kind in found)
    assert few == many == {"cat": 1, "add_": 1}


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_a_cpu(captioner, smoothing, as_on_a_gpu):
    """So few tokens that a CPU absorbs; with LoRA dropout, an ignored target and a padded head."""
    model = captioner.model.double()
    for module in model.decoder.modules():  # the two forms draw other masks of probabilities
        vars(module).update({name: 0.0 for name in vars(module) if name.endswith("_dropout")})
    torch.manual_seed(0)
    inject(model, ["attention", "feed_forward"], rank=3, alpha=6.0, dropout=0.1)
    for matrix in lora_parameters(model).values():
        nn.init.normal_(matrix, std=0.1)
    model.vocabulary.weight = nn.Parameter(  # no copy of the embedding
        model.vocabulary.weight.detach().clone(), requires_grad=False
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    input_ids = torch.randint(50, (2, 4))
    targets = torch.tensor([3, IGNORED, 5, 6, 7, 8])
    features = torch.randn(2, model.encoder.num_tokens, 64, dtype=torch.float64)

    def loss_and_gradients() -> list[Tensor]:
        torch.manual_seed(1)
        model.train()
        loss = caption_loss(
            model, input_ids, torch.arange(6), targets, features, label_smoothing=smoothing
        )
        return [loss, *torch.autograd.grad(loss, list(lora_parameters(model).values()))]

    expected = loss_and_gradients()
    as_on_a_gpu()
    for _ in range(2):
        for ours, theirs in zip(loss_and_gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    head = model.vocabulary
    assert head.padded_weight.shape == (-(-head.out_features // 64) * 64, 64)
    assert head.padded_weight.data_ptr() == head.weight.data_ptr()  # one copy
    assert head.out_features % 64 and not head.padded_weight[head.out_features :].any()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_a_head_that_has_moved_is_padded_again(as_on_a_gpu, blip_folder):
    model = load_captioner(blip_folder).model
    as_on_a_gpu()
    arguments = (
        torch.zeros(1, 2, dtype=torch.long), torch.arange(2), torch.tensor([3, 4]),
        torch.randn(1, model.encoder.num_tokens, 64),
    )
    first = caption_loss(model, *arguments)
    model.vocabulary.weight = nn.Parameter(
        2 * model.vocabulary.weight.detach(), requires_grad=False
    )
    second = caption_loss(model, *arguments)
    assert not torch.equal(first, second)
    assert model.vocabulary.padded_weight.data_ptr() == model.vocabulary.weight.data_ptr()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_added_at_once_are_those_added_one_by_one(checkpointing):
    """To the bit; matrices of odd sizes, one without a gradient, and one micro-batch that fails."""
    torch.manual_seed(0)
    layers = [LoRALinear(nn.Linear(5, 5), rank=3, alpha=1.0) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        cast_frozen(layer, torch.bfloat16)
    flat = FlatLoRAParameters(layers, torch.bfloat16)
    batches = torch.randn(3, 4, 5, dtype=torch.bfloat16)

    def block(x: Tensor) -> Tensor:
        return layers[1](layers[0](x))

    def backward(x: Tensor) -> None:
        x.requires_grad_()
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if (
            checkpointing
        ) else block(x)
        y.float().square().sum().backward()

    for batch in batches:
        backward(batch)
    expected = flat.gradient.clone()
    flat.gradient.zero_()
    with pytest.raises(torch.OutOfMemoryError), flat.cast_gradients():
        backward(batches[0])
        raise torch.OutOfMemoryError
    assert not flat.gradient.any()
    for batch in batches:
        with flat.cast_gradients():
            backward(batch)
    assert expected.any() and torch.equal(flat.gradient, expected)
    assert torch.equal(layers[0].lora_A.grad.flatten(), expected[:15])
    assert not any(cast.requires_grad for layer in layers for cast in layer.cast_matrices)

