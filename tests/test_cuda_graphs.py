"""CUDA graphs change how a step's kernels are launched, and nothing of what they compute.

Where there is no GPU, real trainers run on a stand-in (fake_cuda.py), also where recording fails.
"""

import logging
from dataclasses import replace

import pytest
import torch
from fake_cuda import NOT_PERMITTED, FakeCuda, record_steps
from pictures import json_lines, settings, write_pictures

from lora_engine.data.batches import FeatureBatch, bucket_targets, pad_targets
from lora_engine.lora.injection import inject
from lora_engine.models.pretrained import load_captioner
from lora_engine.stopping import TrainingStopped
from lora_engine.training import trainer as trainer_module
from lora_engine.training.cuda_graphs import CudaGraphs
from lora_engine.training.loop import train
from lora_engine.training.setup import place_model
from lora_engine.training.trainer import Trainer

CPU = torch.device("cpu")
LR = 0.01

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture(autouse=True)
def _all_lines(caplog):
    caplog.set_level(logging.INFO, logger="lora_engine")


def make_trainer(folder, *, graphs: bool, dtype=torch.float32) -> Trainer:
    torch.manual_seed(0)
    model = load_captioner(folder).model
    inject(model, ["attention"], rank=4, alpha=8, dropout=0.1)
    trainer = Trainer(
        place_model(model, CPU, dtype), device=CPU, dtype=dtype, lr=LR, num_micro_batches=2,
        ema_decay=0.9, loraplus_lr_ratio=4.0,
    )
    # As on a GPU, where a graph reads the rate of each step.
    for group in trainer.optimizer.param_groups:
        group["lr"] = torch.tensor(LR)
    if graphs:
        record_steps(trainer)
    return trainer


def a_batch(model, num_rows: int, num_tokens: int, seed: int) -> FeatureBatch:
    """Captions of nearly `num_tokens` tokens; the targets are padded as on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 50, (num_rows, num_tokens), generator=generator)
    targets = torch.randint(3, 50, (num_rows * num_tokens,), generator=generator)
    positions = (torch.arange(len(targets)) % 10 != 3).nonzero().flatten()
    features = torch.randn(num_rows, model.encoder.num_tokens, 64, generator=generator)
    features = features.to(next(model.encoder.parameters()).dtype)
    padded = pad_targets(
        positions, targets[positions], bucket_targets(len(positions), len(targets))
    )
    rows = [*range(num_rows)]
    return FeatureBatch(input_ids, *padded, len(positions), rows, rows, [], features)


SHAPES = [(4, 8), (4, 8), (4, 8), (4, 12), (4, 8), (4, 12), (2, 8), (4, 12), (4, 8)]


def run_steps(trainer: Trainer, shapes=SHAPES, first: int = 0) -> list[torch.Tensor]:
    """Losses, norms, and what the steps leave: matrices, gradient, loss, average and moments."""
    results = []
    for step, shape in enumerate(shapes, first):
        batches = [a_batch(trainer.model, *shape, seed=10 * step + part) for part in range(2)]
        loss = trainer.accumulate(batches, step)
        results += [loss, trainer.update(loss, lr=LR / (1 + step))]
    changed = [*trainer._changed_by_a_step(), trainer.average.values]
    return [*results, *(tensor.detach().clone() for tensor in changed)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def plain_run(folder, **given) -> list[torch.Tensor]:
    return run_steps(make_trainer(folder, graphs=False, **given))


# --- nothing fails --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_with_graphs_are_those_without_bit_for_bit(captioner_folder, cuda, caplog, dtype):
    trainer = make_trainer(captioner_folder, graphs=True, dtype=dtype)
    assert_same(run_steps(trainer), plain_run(captioner_folder, dtype=dtype))
    assert cuda.num_replays > 20 and not caplog.messages
    assert cuda.current is cuda.default


def test_all_graphs_are_recorded_on_one_stream_and_on_the_trainers_device(blip_folder, cuda):
    run_steps(make_trainer(blip_folder, graphs=True))
    assert len(cuda.captures) > 3 and len(cuda.streams) == 1
    assert {stream for _, stream in cuda.captures} == set(cuda.streams)
    assert cuda.devices == {CPU}


def test_a_larger_shape_discards_the_others_which_then_share_its_pool_and_its_inputs(
    blip_folder, cuda
):
    trainer = make_trainer(blip_folder, graphs=True)
    run_steps(trainer)
    micro_steps = [
        recorded for key, recorded in trainer.graphs._recorded.items() if key[0] == "micro_step"
    ]
    # (4, 8) and the step, and again from (4, 12) on, with (2, 8).
    assert len(micro_steps) == 3 and [pool for pool, _ in cuda.captures] == [1, 1, 2, 2, 2, 2]
    for inputs in zip(*(recorded.inputs for recorded in micro_steps)):
        assert len({tensor.data_ptr() for tensor in inputs}) == 1


def test_an_input_that_outgrows_its_memory_leaves_earlier_graphs_theirs(cuda):
    graphs = CudaGraphs(lambda: [], device=CPU, dtype=torch.float32)

    def total(x, y):
        return x.sum() + 2 * y.sum()

    shapes = [(3, 50), (3, 50), (20, 4), (20, 4), (3, 50), (20, 4), (2, 2), (2, 2), (2, 2)]
    for seed, (x, y) in enumerate(shapes):
        x, y = torch.arange(float(x)) + seed, torch.arange(float(y)) * seed
        assert torch.equal(graphs(total, x, y), total(x, y))
    assert len(graphs._recorded) == 3


# --- recording fails ------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["create", "middle"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_cannot_be_recorded_runs_as_it_is_and_a_line_says_so(
    blip_folder, cuda, caplog, failure, number
):
    cuda.failures[number] = failure
    assert_same(run_steps(make_trainer(blip_folder, graphs=True)), plain_run(blip_folder))
    (message,) = caplog.messages
    assert message.startswith("CUDA graphs do not work here (")
    assert message.endswith("training without them")
    assert cuda.num_begun == number + 1 and cuda.current is cuda.default


@pytest.mark.parametrize("failure", ["begin", "invalid", "end"])
@pytest.mark.parametrize("number", [0, 1])  # a micro-step, a step
def test_a_capture_that_cannot_be_begun_or_ended_stops_the_run_in_its_last_state(
    blip_folder, cuda, failure, number
):
    cuda.failures[number] = failure
    trainer, plain = (make_trainer(blip_folder, graphs=graphs) for graphs in (True, False))
    with pytest.raises(TrainingStopped, match="--no_cuda_graphs"):
        run_steps(trainer)
    assert cuda.current is cuda.default
    random_state = torch.get_rng_state()
    # The second micro-step is recorded first, and then the second step.
    plain.graphs = _Stopping(after=1 if number == 0 else 5)
    with pytest.raises(InterruptedError):
        run_steps(plain)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(*([one.lora.gradient_and_loss, *one._changed_by_a_step()]
                  for one in (trainer, plain)))


class _Stopping:
    """Calls functions until it is called for the n-th time."""

    def __init__(self, after: int) -> None:
        self.num_left = after

    def __call__(self, function, *inputs, or_plainly=False):
        if self.num_left == 0:
            raise InterruptedError
        self.num_left -= 1
        return function(*inputs)


@pytest.mark.parametrize("failure", ["memory", "upload"])
def test_memory_that_runs_out_while_recording_halves_the_micro_batch(
    captioner_folder, cuda, caplog, failure
):
    cuda.failures[0] = failure
    trainer = make_trainer(captioner_folder, graphs=True)
    ours = run_steps(trainer)
    (message,) = caplog.messages
    assert "continuing with 2" in message and trainer.splitter.num_rows == 2
    assert cuda.num_replays > 20  # graphs are used again
    plain = make_trainer(captioner_folder, graphs=False)
    micro_step, calls = plain.micro_step, []

    def fails_once(*inputs):
        calls.append(1)
        if len(calls) == 2:  # when the first shape came for the second time
            raise torch.OutOfMemoryError
        return micro_step(*inputs)

    plain.micro_step = fails_once
    assert_same(ours, run_steps(plain))


def test_memory_that_runs_out_when_a_step_is_recorded_leaves_that_one_without_a_graph(
    blip_folder, cuda, caplog
):
    cuda.failures[1] = "memory"
    trainer = make_trainer(blip_folder, graphs=True)
    assert_same(run_steps(trainer), plain_run(blip_folder))
    assert {key[0] for key in trainer.graphs._recorded} == {"micro_step"}
    assert trainer.splitter.num_rows is None and not caplog.messages


def test_graphs_that_are_cleared_are_recorded_again(blip_folder, cuda, caplog):
    cuda.failures[0] = "middle"
    trainer = make_trainer(blip_folder, graphs=True)
    run_steps(trainer, SHAPES[:2])
    assert cuda.num_begun == 1 and len(caplog.messages) == 1
    trainer.graphs.clear()
    run_steps(trainer, SHAPES[:2], first=2)
    assert cuda.num_begun > 1 and cuda.num_replays > 2 and len(caplog.messages) == 1


def test_a_graph_that_computes_something_else_is_found_out_once_and_not_used(
    captioner_folder, cuda, caplog
):
    cuda.loses_writes = True
    trainer = make_trainer(captioner_folder, graphs=True)
    assert_same(run_steps(trainer), plain_run(captioner_folder))
    (message,) = caplog.messages
    assert message.startswith("a CUDA graph of micro_step does not compute what its function does")
    assert "python -m lora_engine doctor --device cuda" in message
    assert cuda.num_replays == 1
    trainer.graphs.clear()  # memory ran out: that makes a wrong graph no better
    run_steps(trainer, SHAPES[:2], first=len(SHAPES))
    assert cuda.num_replays == 1 and len(caplog.messages) == 1


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_what_a_function_returns_is_compared_and_what_it_changes(cuda, caplog, wrong):
    cuda.loses_writes = True
    total = torch.ones(3)
    graphs = CudaGraphs(lambda: [total], device=CPU, dtype=torch.float32)

    def function(x):
        if wrong == "output":
            return torch.zeros_like(x).add_(x).sum()
        total.add_(x)
        return x.sum()

    for _ in range(3):
        graphs(function, torch.ones(3))
    assert cuda.num_replays == 1 and len(caplog.messages) == 1


@pytest.mark.parametrize("is_wrong", [False, True])
def test_where_a_step_overflows_the_rest_is_compared(cuda, caplog, is_wrong):
    cuda.loses_writes = is_wrong
    total = torch.ones(3)
    graphs = CudaGraphs(lambda: [total], device=CPU, dtype=torch.float16)

    def add(x):
        total.add_(x)
        return total.sum()

    for _ in range(3):
        graphs(add, torch.tensor([1.0, float("inf"), float("nan")]))
    assert cuda.num_replays == (1 if is_wrong else 3) and len(caplog.messages) == is_wrong


@pytest.mark.parametrize("kind", ["waits for the device", "is an error of its own"])
def test_an_error_in_a_function_is_the_functions_own(cuda, caplog, kind):
    graphs = CudaGraphs(lambda: [], device=CPU, dtype=torch.float32)

    def function(x):
        if kind == "waits for the device":
            return x * x.max().item()
        if not x.isfinite().all():
            raise ValueError("not finite")
        return x

    for x in (torch.ones(2), torch.full((2,), 3.0)):
        assert torch.equal(graphs(function, x), function(x))
    (message,) = caplog.messages
    assert NOT_PERMITTED in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="here graphs can be recorded")
def test_where_nothing_can_be_recorded_functions_run_as_they_are_and_a_line_says_so(caplog):
    graphs = CudaGraphs(lambda: [], device=torch.device("cuda", 0), dtype=torch.float32)
    calls = []

    def double(x):
        calls.append(tuple(x.shape))
        return 2 * x

    for size in (3, 3, 4, 3, 4, 4):
        assert torch.equal(graphs(double, torch.ones(size)), torch.full((size,), 2.0))
    assert calls == [(3,), (3,), (4,), (3,), (4,), (4,)]
    (message,) = caplog.messages
    assert message.startswith("CUDA graphs do not work here (")


# --- whole runs -----------------------------------------------------------------------------


@pytest.fixture
def with_graphs(monkeypatch) -> None:
    """On the CPU, too, a run uses graphs, unless it is told not to."""
    init, build = Trainer.__init__, trainer_module.build_optimizer

    def initialize(trainer, model, *, cuda_graphs=True, **given):
        init(trainer, model, cuda_graphs=cuda_graphs, **given)
        if cuda_graphs:
            record_steps(trainer)

    def build_optimizer(*args, **given):
        optimizer = build(*args, **given)
        (group,) = optimizer.param_groups
        group["lr"] = torch.tensor(group["lr"])
        return optimizer

    monkeypatch.setattr(Trainer, "__init__", initialize)
    monkeypatch.setattr(trainer_module, "build_optimizer", build_optimizer)


def test_a_run_that_a_capture_stopped_continues_without_graphs_as_if_nothing_had_been(
    blip_folder, data, tmp_path, cuda, with_graphs
):
    config = settings(blip_folder, data, tmp_path / "plain", num_samples=0, cuda_graphs=False)
    train(config)
    cuda.failures = {0: "end"}
    stopped = replace(config, output_path=str(tmp_path / "run"), cuda_graphs=True)
    with pytest.raises(TrainingStopped, match="--no_cuda_graphs, and with --resume") as caught:
        train(stopped)
    assert "--resume" in "".join(caught.value.__notes__)
    train(replace(stopped, resume="newest", cuda_graphs=False))
    run, plain = (tmp_path / name / "adapter" / "adapter_model.safetensors"
                  for name in ("run", "plain"))
    assert run.read_bytes() == plain.read_bytes() and cuda.num_begun == 1
    losses = [
        [line["loss"] for line in json_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "plain")
    ]
    assert losses[0] == losses[1]


# --- on a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [pytest.param(None, marks=needs_cuda)])
def test_a_replay_takes_new_inputs_and_recording_leaves_no_trace(run):
    device = torch.device("cuda", 0)
    total = torch.zeros(3, device=device)
    graphs = CudaGraphs(lambda: [total], device=device, dtype=torch.float32)

    def add(x):
        total.add_(x)
        return total.sum()

    expected = torch.zeros(3)
    for step in range(5):
        expected += step
        out = graphs(add, torch.full((3,), float(step), device=device))
        assert torch.equal(total.cpu(), expected) and float(out) == float(expected.sum())
    assert len(graphs._recorded) == 1


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=needs_cuda) for name in ("blip", "vit_gpt2")
])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_with_graphs_equals_one_without(request, tmp_path, family, precision):
    """Dropout, accumulation, a short last batch and captions of several lengths among it."""
    folder = request.getfixturevalue(f"{family}_folder")
    write_pictures(tmp_path, num_images=20)
    write_pictures(tmp_path, num_images=6, name="val.json")
    config = settings(
        folder, tmp_path, tmp_path / "graphs", device="cuda", precision=precision, epochs=4,
        grad_accum_steps=2, lora_dropout=0.1, num_samples=0,
    )
    graphed = train(config)
    eager = train(replace(config, output_path=str(tmp_path / "eager"), cuda_graphs=False))
    one, other = (json_lines(run.path / "metrics.jsonl") for run in (graphed, eager))
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
