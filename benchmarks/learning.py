"""What helps LoRA to learn: variant, rank, targets, learning rate and schedule, on the demo.

    python -m benchmarks.learning --model blip
    python -m benchmarks.learning --model vit_gpt2

The demo's tiny captioner learns the captions of drawn scenes: the demo's own, and the hard set,
with rare words that it must spell (lora_engine/demo/scenes.py). In one table all rows have the same
number of steps, unless their name says otherwise. "full" trains all weights of the layers that LoRA
adapts: the ceiling.

Each row has a learning rate of its own, found on the hard set with one seed: the rate of RATES with
the best CIDEr-D, whose neighbors are worse. Rows of OTHERS differ from LoRA at its rate in the
settings given. Then all are repeated with several seeds, and on the other sets.

A run has a process of its own with one thread, two at a time, and a line in learning-MODEL.jsonl.
Runs that have a line are not repeated, so that the command can be stopped and continued.
"""

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import MODELS, RESULTS
from lora_engine.captioning.metrics import Scores
from lora_engine.config import TrainingConfig
from lora_engine.demo import demo_settings
from lora_engine.demo.scenes import Scene, cc3m_caption, hard_caption, write_scenes
from lora_engine.lora.injection import lora_layers
from lora_engine.stopping import Diverged
from lora_engine.training.loop import train
from lora_engine.training.loss import caption_loss
from lora_engine.training.run import open_run
from lora_engine.training.setup import prepare
from lora_engine.training.trainer import seed_generators
from lora_engine.training.tuning import VARIANTS
from recipes.finetune import SETTINGS

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
FIRST_RATE = 5e-3  # the demo's
SEARCHED: dict[str, dict[str, Any]] = {
    "full": {},
    **VARIANTS,
    "rank 2": {"lora_rank": 2, "lora_alpha": 8.0},  # alpha / rank stays
    "rank 32": {"lora_rank": 32, "lora_alpha": 128.0},
    "attention": {"lora_targets": ("attention",)},
    "feed-forward": {"lora_targets": ("feed_forward",)},
}
OTHERS: dict[str, dict[str, Any]] = {  # max_steps is a share
    "half the steps": {"max_steps": 0.5},
    "cosine": {"lr_schedule": "cosine"},
    "wsd": {"lr_schedule": "wsd"},
    "constant": {"lr_schedule": "constant"},
    "constant, EMA 0.98": {"lr_schedule": "constant", "ema_decay": 0.98},  # scores of the average
    "100 epochs": {"max_steps": None, "epochs": 100},
    "1e-5, 100 epochs": {"lr": 1e-5, "warmup_steps": 0, "max_steps": None, "epochs": 100},
}
LONG = ["100 epochs", "1e-5, 100 epochs"]  # the second one has the published settings
SHORT = [name for name in OTHERS if name not in LONG]


class Pairs(NamedTuple):
    """A set of pairs, and what is trained on it."""

    caption: Callable[[Scene], str]
    num_train: int
    num_steps: int
    rows: list[str]


SETS = {
    "hard": Pairs(hard_caption, 2_000, 160, [*SEARCHED, *SHORT]),
    "demo": Pairs(cc3m_caption, 2_000, 160, [*SEARCHED]),
    "hard, 200 pairs": Pairs(hard_caption, 200, 160, ["full", "lora", "eva", "pissa", *LONG]),
    "hard, 20,000 pairs": Pairs(hard_caption, 20_000, 640, ["full", "lora", "eva", "pissa"]),
}
NUM_VAL = 200
NUM_PROCESSES = 2


class Run(NamedTuple):
    """What identifies a run."""

    data: str
    name: str
    lr: float
    seed: int


Results = dict[Run, dict[str, Any]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="blip", help="the demo's captioner")
    parser.add_argument("--rounds", type=int, default=3, help="seeds; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="data, features")
    parser.add_argument("--quick", action="store_true", help="check that it runs; not recorded")
    arguments = parser.parse_args(argv)
    end_s = time.monotonic() + 60 * arguments.minutes
    sets = SETS
    path = RESULTS / f"learning-{arguments.model}.jsonl"
    if arguments.quick:
        sets = {"hard": SETS["hard"]._replace(num_train=32, num_steps=2, rows=["full", "lora"])}
        path = arguments.work / f"quick-{path.name}"
        path.unlink(missing_ok=True)
    paths = {
        name: write_scenes(
            arguments.work, num_train=pairs.num_train, num_val=NUM_VAL, seed=0,
            caption=pairs.caption,
        )
        for name, pairs in sets.items()
    }
    done = read_results(path)
    # Forked, so that a run need not import torch again.
    context = multiprocessing.get_context("fork")
    while (runs := runs_left(done, sets, arguments.rounds)) and time.monotonic() < end_s:
        print(f"{len(runs)} runs to do", flush=True)
        jobs = (
            (run, arguments.model, sets[run.data].num_steps, paths[run.data], arguments.work, end_s)
            for run in runs
        )
        with context.Pool(NUM_PROCESSES, maxtasksperchild=1) as pool:
            for run, result in pool.imap_unordered(measure, jobs):
                if result is None:
                    continue
                done[run] = result
                with path.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(run._asdict() | result) + "\n")
                print(*run, *result.values(), flush=True)
    text = tables(done)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def runs_left(done: Results, sets: dict[str, Pairs], num_seeds: int) -> list[Run]:
    """What is to be run next: rates of the search; when they are done, everything else."""
    searched = [name for name in SEARCHED if name in sets["hard"].rows]
    search = [
        Run("hard", name, lr, 0) for name in searched for lr in rates_beside(best_rate(done, name))
    ]
    if left := [run for run in search if run not in done]:
        return left
    repeated = [
        Run(data, name, rate_of(done, name), seed)
        for data, pairs in sets.items() for seed in range(num_seeds) for name in pairs.rows
    ]
    return [run for run in repeated if run not in done]


def rates_beside(lr: float) -> tuple[float, ...]:
    """The rate and its neighbors in RATES."""
    number = RATES.index(lr)
    return RATES[max(number - 1, 0) : number + 2]


def best_rate(done: Results, name: str) -> float:
    """The rate with the best CIDEr-D in the search so far."""
    scores = {
        run.lr: result["cider_d"] for run, result in done.items()
        if (run.data, run.name, run.seed) == ("hard", name, 0)
    }
    return max(scores, key=scores.__getitem__, default=FIRST_RATE)


def rate_of(done: Results, name: str) -> float:
    """The rate of a row."""
    if name in SEARCHED:
        return best_rate(done, name)
    return OTHERS[name].get("lr") or best_rate(done, "lora")


def measure(
    job: tuple[Run, str, int, tuple[Path, Path], Path, float]
) -> tuple[Run, dict[str, Any] | None]:
    """Train -> loss and CIDEr-D after the last step, and what they cost; None if it is too late.

    The time is that of the processor: another program does not count. The memory is the largest
    resident set of the process.
    """
    run, family, num_steps, (train_path, val_path), work, end_s = job
    if time.monotonic() > end_s:
        return run, None
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    begin_s = time.process_time()
    settings = {"max_steps": 1.0, "lr": run.lr} | SEARCHED.get(run.name, {})
    settings |= OTHERS.get(run.name, {})
    if settings["max_steps"]:
        settings["max_steps"] = round(settings["max_steps"] * num_steps)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = dataclasses.replace(
            demo_settings(SETTINGS, family),
            train_data_path=str(train_path), val_data_path=str(val_path),
            output_path=f"{folder}/run", cache="disk", cache_dir=str(work / "cache"), seed=run.seed,
            eval_every=10**6, patience=None, **settings,  # validates at the end only
        )
        try:
            loss, scores, num_trained = (train_fully if run.name == "full" else train_lora)(config)
        except Diverged:
            loss, scores, num_trained = math.nan, None, 0
    return run, {
        "loss": round(loss, 5), "cider_d": round(scores.cider_d, 4) if scores else 0.0,
        "cpu_s": round(time.process_time() - begin_s, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "num_trained": num_trained,
    }


def train_lora(config: TrainingConfig) -> tuple[float, Scores | None, int]:
    """-> loss and scores at the end, of the average if there is one; number of parameters."""
    summary = train(config)
    last = max(summary.losses)
    result = summary.average or (last, summary.losses[last], summary.scores[last])
    facts = json.loads((summary.path / "environment.json").read_text())
    return result[1], result[2], facts["num_trainable"]


def train_fully(config: TrainingConfig) -> tuple[float, Scores | None, int]:
    """Train weights and biases of the decoder's linear layers that LoRA would adapt, by PyTorch's
    AdamW -> loss and scores at the end, number of parameters."""
    with open_run(prepare(config)) as run:
        run.validate()
        model = run.trainer.model
        parameters: list[nn.Parameter] = []
        for path, layer in list(lora_layers(model)):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.load_state_dict({
                name: value for name, value in layer.state_dict().items() if "lora" not in name
            })
            model.set_submodule(path, linear)
            parameters += linear.parameters()
        optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay)
        with closing(run.steps()) as steps:
            for agreed in steps:
                seed_generators(config.seed, agreed.number)
                optimizer.param_groups[0]["lr"] = run.schedule.learning_rate(agreed.number)
                (batch,) = agreed.batches
                loss = caption_loss(model, *batch.tensors(run.trainer.device))
                (loss / batch.num_targets).backward()
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        return *run.validation.measure(agreed.number), sum(p.numel() for p in parameters)


# --- results ----------------------------------------------------------------------------------


def read_results(path: Path) -> Results:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = map(json.loads, lines)
    return {Run(*(line.pop(field) for field in Run._fields)): line for line in results}


def tables(done: Results) -> str:
    """CIDEr-D by rate, and a table for each set: means over seeds, with the range of CIDEr-D."""
    head = ["", *(f"{lr:g}" for lr in RATES)]
    text = "CIDEr-D by learning rate, hard set, seed 0\n\n" + table_row(head) + rule(len(head))
    for name in SEARCHED:
        results = [done.get(Run("hard", name, lr, 0)) for lr in RATES]
        if any(results):
            text += table_row([name, *(f"{one['cider_d']:.2f}" if one else "" for one in results)])
    for data, pairs in SETS.items():
        found = {
            name: {
                run.seed: result for run, result in done.items()
                if run[:3] == (data, name, rate_of(done, name))
            }
            for name in pairs.rows
        }
        if not any(found.values()):
            continue
        head = ["", "rate", "seeds", "loss", "CIDEr-D", "over LoRA", "CPU s", "MB", "trained"]
        text += f"\n{data}: {pairs.num_train:,} pairs, {pairs.num_steps} steps\n\n"
        text += table_row(head) + rule(len(head))
        for name, by_seed in found.items():
            if by_seed:
                cells = cells_of(by_seed, beside=found["lora"])
                text += table_row([name, f"{rate_of(done, name):g}", *cells])
    return text


def cells_of(
    results: dict[int, dict[str, Any]], *, beside: dict[int, dict[str, Any]]
) -> list[str]:
    """The results of a row by seed, beside LoRA's with the same seeds, which have the same batches.

    The time is the shortest, the memory the lowest: the first runs also encode the images.
    """
    score = {seed: result["cider_d"] for seed, result in results.items()}
    over = [score[seed] - beside[seed]["cider_d"] for seed in score if seed in beside]
    return [
        str(len(results)),
        f"{statistics.mean(result['loss'] for result in results.values()):.3f}",
        mean_and_range(list(score.values()), ".2f"),
        mean_and_range(over, "+.2f") if over and results is not beside else "",
        f"{min(result['cpu_s'] for result in results.values()):.0f}",
        f"{min(result['peak_mb'] for result in results.values())}",
        f"{max(result['num_trained'] for result in results.values()):,}",
    ]


def mean_and_range(values: list[float], form: str) -> str:
    return (
        f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    )


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def rule(num_columns: int) -> str:
    return "|" + "---|" * num_columns + "\n"


if __name__ == "__main__":
    main()
