"""CUDA graphs change how a step's kernels are launched, and nothing of what they compute."""

from dataclasses import replace

import pytest
import torch
from pictures import json_lines, settings, write_pictures

from lora_engine.training.cuda_graphs import CudaGraphs
from lora_engine.training.loop import train

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here graphs can be recorded")
def test_where_nothing_can_be_recorded_functions_run_as_they_are_and_a_line_says_so(caplog):
    graphs = CudaGraphs(lambda: [])
    calls = []

    def double(x):
        calls.append(tuple(x.shape))
        return 2 * x

    for size in (3, 3, 4, 3, 4, 4):
        assert torch.equal(graphs(double, torch.ones(size)), torch.full((size,), 2.0))
    assert calls == [(3,), (3,), (4,), (3,), (4,), (4,)]
    (message,) = caplog.messages
    assert message.startswith("CUDA graphs do not work here (")
    assert message.endswith("training without them")


@pytest.mark.parametrize("run", [pytest.param(None, marks=needs_cuda)])
def test_a_replay_takes_new_inputs_and_recording_leaves_no_trace(run):
    device = torch.device("cuda")
    total = torch.zeros(3, device=device)
    graphs = CudaGraphs(lambda: [total])

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
