"""Every benchmark runs on small models, and what their figures rest on is right."""

import dataclasses
import importlib
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from flop_count import count_flops
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("peft")

from benchmarks import all as all_benchmarks  # noqa: E402
from benchmarks import (  # noqa: E402
    contenders,
    data,
    flops,
    generate,
    gpu_budget,
    learning,
    measure,
    memory,
    ours,
    peers,
    ranks,
    rows,
    scaling,
    throughput,
    wall,
)
from benchmarks.cross_attention import crossing, longest_absorbed  # noqa: E402
from lora_engine.data import image_identity, pair_index  # noqa: E402
from lora_engine.lora.adapter import read_adapter  # noqa: E402
from lora_engine.lora.injection import inject, lora_parameters
from lora_engine.models import cross_attention  # noqa: E402
from lora_engine.models.pretrained import load_model  # noqa: E402
from lora_engine.training.loss import caption_loss  # noqa: E402

MODELS = ("blip", "vit_gpt2")
RUNS = {  # flags beyond those of all, number of results
    "throughput": (["--peers", "B3"], 2),
    "throughput, photos": (["--phase", "first", "--captions_per_image", "2", "--peers"], 1),
    "throughput, wall": (["--phase", "wall", "--peers", "B2"], 1),
    "memory": (["--peers", "B3"], 1),
    "cross_attention": ([], 1),
    "lora_linear": ([], 1),
    "generate": (["--encoder_precision", "int8"], 1),
    "features": ([], 1),
    "checkpointing": ([], 1),
}


def call_here(function, **arguments):
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("run, model", [
    # With one family or the other: each takes seconds.
    (run, MODELS[number % 2]) for number, run in enumerate(RUNS)
])
def test_it_runs(run, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for module in (memory, wall):
        monkeypatch.setattr(module, "in_fresh_process", call_here)
    # As if this were a card whose roofline is known.
    monkeypatch.setattr(throughput, "card_of", lambda device, dtype: gpu_budget.CARDS["T4"])
    name = run.split(",")[0]
    main = importlib.import_module(f"benchmarks.{name}").main
    # Whether it runs, not how fast.
    monkeypatch.setattr(generate, "MAX_NEW_TOKENS", 5)
    monkeypatch.setitem(throughput.MATRIX_SIZE, "cpu", 256)
    monkeypatch.setitem(measure.seconds_a_call.__kwdefaults__, "least_s", 0.01)
    flags, num_results = RUNS[run]
    main(["--quick", "--device", "cpu", "--model", model, "--tag", "try", *flags])

    printed = capsys.readouterr().out.splitlines()
    paths = sorted(tmp_path.glob("*.json"))
    assert len(paths) == num_results
    for path in paths:
        assert path.name.startswith(name)
        assert path.name.endswith(f"-{model}-cpu-try-quick.json")
        assert path.with_suffix(".png").stat().st_size > 5000
        result = json.loads(path.read_text())
        assert {"commit", "machine", "torch", "transformers", "peft", "device"} <= result.keys()
        assert all(map(math.isfinite, numbers_in(result)))
        assert result["headline"] in printed
        if name == "throughput" and "wall" not in run:
            assert result["roofline"]["captions_per_s"] > 0
            assert result["headline"].endswith(" x the roofline")
        if name == "generate":  # which compares tokens
            same = [search["num_the_same"]["ours"] for search in result["searches"].values()]
            assert same == [result["num_images"]] * 2
    assert printed[-1] == result["headline"]  # the line that benchmarks.all shows


@pytest.mark.parametrize("model", MODELS)
def test_large_data_sets_are_measured(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "in_fresh_process", call_here)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(image_identity, "_CLOCK_TICK_NS", -(10**9))
    monkeypatch.setattr(pair_index, "MIN_ROWS_ON_DISK", 0)  # an index, although there are few rows
    data.main(["--quick", "--model", model])
    (path,) = tmp_path.glob("*.json")
    assert path.name == f"data-{model}-quick.json"
    result = json.loads(path.read_text())
    assert all(map(math.isfinite, numbers_in(result)))
    assert result["num_rows"] == 2_000 and result["num_batches"] == 63
    assert result["tokens_per_caption"] > 9 and result["index_bytes_per_row"] > 60
    assert f"{result['index_bytes_per_row']:.1f}" in capsys.readouterr().out


def made_up_result(job):
    run = job[0]
    loss = 10 * abs(run.lr - 1e-3) + 0.1 * run.seed
    over_lora = 0.25 if run.name == "eva" and run.seed else 0.0
    return run, {
        "loss": loss, "cider_d": 9 - loss + over_lora, "cpu_s": 1.0, "peak_mb": 500,
        "num_trained": 5,
    }


def test_learning_searches_the_rates_repeats_the_best_and_continues_where_it_was_stopped(
    tmp_path, monkeypatch, capsys
):
    pairs = learning.SETS["hard"]._replace(num_train=4, rows=["lora", "eva", "cosine"])
    long = pairs._replace(rows=["lora", "1e-5, 100 epochs"])
    monkeypatch.setattr(learning, "SETS", {"hard": pairs, "long": long})
    monkeypatch.setattr(learning, "NUM_VAL", 2)
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "measure", made_up_result)
    path = tmp_path / "learning-vit_gpt2.jsonl"
    flags = ["--work", str(tmp_path), "--model", "vit_gpt2", "--rounds", "2"]
    learning.main(flags)
    lines = path.read_text().splitlines()
    runs = list(learning.read_results(path))
    searched = {run.lr for run in runs if run.name == "eva"}
    assert searched == {5e-4, 1e-3, 2e-3, 5e-3, 1e-2}, "down from 5e-3 until it gets worse"
    assert len(runs) == len(lines) == 2 * 5 + 3 + 1 + 2 * 2
    assert {run.lr for run in runs if run.seed or run.data == "long"} == {1e-3, 1e-5}
    table = path.with_suffix(".md").read_text()
    assert "| lora | 0.001 | 2 | 0.050 | 8.95 (8.90 to 9.00) |  | 1 | 500 | 5 |" in table
    assert "| 9.07 (9.00 to 9.15) | +0.12 (+0.00 to +0.25) |" in table
    assert "| eva | 9.00 | 8.99 |" not in table and "| eva | 8.99 | 9.00 | 8.99 | 8.96 |" in table
    assert table in capsys.readouterr().out

    path.write_text("\n".join(lines[:-2]) + "\n")
    learning.main(flags)
    assert sorted(path.read_text().splitlines()) == sorted(lines)


def test_full_fine_tuning_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    paths = learning.write_scenes(tmp_path, num_train=32, num_val=4, seed=0)
    losses = []
    for name in ("full", "lora"):
        run = learning.Run("demo", name, 1e-2, 0)
        _, result = learning.measure((run, "vit_gpt2", 4, paths, tmp_path, math.inf))
        losses.append(result["loss"])
    assert result["num_trained"] == 70_656
    assert result["peak_mb"] > 100
    assert losses[0] < losses[1] - 0.5
    logging.disable(logging.NOTSET)


def test_a_function_runs_in_a_fresh_process():
    assert measure.in_fresh_process("benchmarks.measure:spread", values=[3, 1, 2]) == {
        "median": 2, "min": 1, "max": 3,
    }


def test_rounds_that_warm_up_do_not_count_and_ratios_are_formed_within_rounds():
    calls = {"a": [], "b": []}
    figures = measure.interleave(
        {name: lambda number, name=name: calls[name].append(number) or 10.0**number
         for name in calls},
        num_rounds=2, num_warm_ups=2,
    )
    assert calls == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}
    assert figures == {"a": [100, 1000], "b": [100, 1000]}
    assert measure.ratios(figures["a"], [10, 1000]) == {"median": 5.5, "min": 1, "max": 10}


def test_the_peak_of_memory_is_found():
    before = measure.start_peak(torch.device("cpu"))
    ballast = np.ones(25_000_000, dtype=np.uint8)
    del ballast
    assert 24e6 < measure.peak_bytes(torch.device("cpu")) - before < 40e6


def test_a_failure_and_the_last_line_are_seen():
    last = all_benchmarks.run([sys.executable, "-c", "print('one'); print('two'); print()"])
    assert last == (False, "two")
    assert all_benchmarks.run([sys.executable, "-c", "raise SystemExit(3)"]) == (True, "")


def test_the_crossing_lies_on_a_straight_line_between_two_lengths():
    ratios = {8: 0.5, 16: 0.75, 24: 1.25, 32: 2.0}
    assert crossing({length: {"median": ratio} for length, ratio in ratios.items()}) == 20
    assert crossing({8: {"median": 2.0}, 16: {"median": 3.0}}) is None


def test_the_rule_is_that_of_the_device():
    rules = [
        longest_absorbed((577, 768), 12, with_backward=True, device=torch.device(device))
        for device in ("cpu", "cuda")
    ]
    assert rules[0] > 20 and rules[1] == 0


# --- many processes -------------------------------------------------------------------------


def simulated(is_first=False, **settings):
    settings = {"variation": 0.0, "link_latency_s": 0.0, "link_bytes_per_s": 1e18, **settings}
    return scaling.simulate(scaling.Setup(**settings), is_first=is_first)


def test_a_simulated_process_takes_the_time_of_its_parts():
    parts = {"batch_size": 10, "caption_s": 0.02, "micro_batch_s": 0.1, "update_s": 0.05}
    kept = simulated(**parts, micro_batches=2, memory_share=1.0)
    assert kept.images_per_s == pytest.approx(20 / (2 * (0.1 + 0.2) + 0.05))
    encoded = simulated(
        **parts, is_first=True, encode_s=0.03, captions_per_image=5, num_loaders=4,
        decode_s=1e-6, disk_bytes_per_s=1e12,
    )
    assert encoded.images_per_s == pytest.approx(10 / (0.1 + 0.2 + 0.05 + 2 * 0.03))


def test_two_simulated_processes_are_twice_as_fast_unless_they_share_what_is_slow():
    on_gpus = {"memory_share": 1.0}
    one = simulated(**on_gpus).images_per_s
    assert simulated(**on_gpus, num_processes=2).images_per_s == pytest.approx(2 * one)
    assert simulated(**on_gpus, num_machines=2, network_bytes_per_s=1e18, network_latency_s=0,
                     ).images_per_s == pytest.approx(2 * one)
    on_cores = {"on_cores": True, "memory_share": 1.0, "num_cores": 2}
    one = simulated(**on_cores).images_per_s
    assert simulated(**on_cores, num_processes=2).images_per_s == pytest.approx(2 * one)
    assert simulated(**on_cores, num_processes=4).images_per_s == pytest.approx(2 * one)

    slow_disk = {"disk_bytes_per_s": 1e9, "feature_bytes": 1e6}
    for num_processes in (1, 2):
        outcome = simulated(**slow_disk, num_processes=num_processes)
        assert outcome.images_per_s == pytest.approx(1000, rel=0.02)
        assert outcome.limits.startswith("disk")
    assert simulated(**slow_disk, num_machines=2).images_per_s == pytest.approx(2000, rel=0.02)


def test_simulated_processes_read_while_they_compute_only_if_they_read_ahead():
    parts = {"disk_bytes_per_s": 1e9, "feature_bytes": 1e6, "feature_s": 0.0, "batch_size": 10,
             "micro_batch_s": 0.02, "caption_s": 0.0, "update_s": 0.0}
    assert simulated(**parts, features_ahead=0).images_per_s == pytest.approx(10 / 0.03)
    assert simulated(**parts, features_ahead=2).images_per_s == pytest.approx(10 / 0.02)


def test_the_exchange_takes_longer_with_more_parts_and_between_machines():
    def exchange_s(**settings):
        setup = scaling.Setup(link_latency_s=0, network_latency_s=0, gradient_bytes=8e6, **settings)
        return setup.exchange_s

    assert exchange_s() == 0
    assert exchange_s(num_processes=4, link_bytes_per_s=1e9) == pytest.approx(2 * 0.006)
    assert exchange_s(num_processes=4, link_bytes_per_s=1e9, micro_batches=3) == pytest.approx(
        4 * 0.006
    )
    # Each of 4 processes sends a half of its part to the other machine; the ring passes once.
    between = exchange_s(num_machines=2, num_processes=4, network_bytes_per_s=1e9)
    assert between == pytest.approx(4 * 0.004 + 0.007)


def test_plans_are_shown(capsys):
    scaling.main(["--num_processes", "2", "--disk_bytes_per_s", "1e8"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("1 x 2, as given") and line.endswith("disk 100%")


def test_micro_batches_are_dealt_evenly():
    lengths = rows.Rows(10_000, (1, 1), model="blip").lengths
    balance = ranks.balance(lengths)
    assert balance["dealt"] > 0.97 and 0.5 < balance["sorted"] < 0.7
    assert ranks.evenness([[3, 4], [1, 2]]) == 0.75


# --- ours -----------------------------------------------------------------------------------


@pytest.fixture(params=MODELS)
def case(request):
    """Five captions of three images, for a small checkpoint of each family."""
    with contenders.checkpoint(request.param, small=True) as folder:
        settings = contenders.pixel_settings(folder)
        rows = contenders.Rows(5, settings.size, model=request.param, captions_per_image=2)
        yield contenders.Case(
            folder, request.param, rows, settings, torch.device("cpu"), torch.float32, 2
        )


def test_ours_adapts_what_the_peers_adapt_with_the_same_settings(case):
    trainer = case.ours()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    theirs = case.peer("B3").model
    assert trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for name in ("RANK", "ALPHA", "LEARNING_RATE", "WEIGHT_DECAY", "MAX_GRAD_NORM"):
        assert getattr(ours, name) == getattr(peers, name)


def test_ours_encodes_each_image_once_in_the_first_epoch_and_none_later(case):
    trainer = case.ours()
    assert trainer.first_epoch(0) > 0
    source = trainer.source
    assert source.encoder.num_encoded == 3
    assert trainer.later_epoch(1) > 0 and trainer.later_epoch(2) > 0
    assert trainer.source is source and source.encoder.num_encoded == 3
    assert trainer.num_steps == 9

    other = case.ours()
    other.encode()
    assert other.source.encoder.num_encoded == 3 and other.num_steps == 0


def test_an_epoch_of_ours_lands_where_a_peer_does(case):
    """From the same adapters, with all rows in one batch, so that the order does not matter."""
    case = dataclasses.replace(case, batch_size=5)
    peer, trainer = case.peer("B3"), case.ours()
    peer.model.save_pretrained(case.folder / "adapter")
    matrices = lora_parameters(trainer.model)
    for name, matrix in read_adapter(case.folder / "adapter").matrices.items():
        matrices[name].data.copy_(matrix)
    before = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    for epoch in range(3):
        trainer.later_epoch(epoch)
        peer(epoch)
    peer.model.save_pretrained(case.folder / "adapter")
    after = read_adapter(case.folder / "adapter").matrices
    update = torch.cat([(matrices[name] - before[name]).flatten() for name in after])
    theirs = torch.cat([(after[name] - before[name]).flatten() for name in after])
    assert theirs.abs().max() > 1e-4  # the learning rate
    assert (update - theirs).norm() < 0.01 * theirs.norm()


# --- the work -------------------------------------------------------------------------------


def measured_flops(function):
    with sdpa_kernel(SDPBackend.MATH), count_flops() as counter:  # torch cannot count fused ones
        function()
    return counter.get_total_flops()


def test_the_work_is_that_of_the_engine(case):
    """In fp64, whose products all go through operators that torch counts."""
    model = load_model(case.folder).double()
    inject(model, ["attention", "feed_forward"], dropout=0.0)
    for name, matrix in model.named_parameters():
        if name.endswith("lora_B"):
            matrix.data.normal_()
    pixels = torch.randn(1, 3, *case.settings.size, dtype=torch.float64)
    features = model.encode(pixels).detach()
    with torch.no_grad():
        assert measured_flops(lambda: model.encode(pixels)) == flops.encoder_flops(model)
    num_layers, width = len(model.decoder.layers), model.encoder.width
    for num_tokens in (2, 12):
        ids = torch.arange(num_tokens) + 5
        measured = measured_flops(
            lambda: caption_loss(model, ids[None], ids - 5, ids, features).backward()
        )
        # Without a fused kernel attention computes what the causal mask then hides.
        hidden = num_layers * 6 * num_tokens * (num_tokens - 1) * width
        if cross_attention.absorbs((num_tokens, width), features.shape[1:], 4, with_backward=True):
            assert num_tokens == 2
            assert flops.decoder_flops(model, num_tokens) == measured - hidden
        else:  # adapters of projected keys and values take more than they have to
            assert num_tokens == 12
            assert flops.decoder_flops(model, num_tokens) < measured - hidden
