"""What helps LoRA to learn: variant, rank, targets, learning rate and schedule, on the demo.

    python -m benchmarks.learning

The demo's two tiny captioners learn the captions of drawn scenes: the demo's own, and the hard set,
with rare words that they must spell (lora_engine/demo/scenes.py). All runs but one row have
the same number of steps. Every variant first runs at several rates, on the hard set with one seed;
its best one, by the validation loss at the end, is then repeated with more seeds, and on the demo's
set. Every other row differs from LoRA at its best rate in one setting. "full" trains all weights of
the layers that LoRA adapts: the ceiling.

A run has a process of its own with one thread, two at a time, and a line in learning.jsonl. Runs
that have a line are not repeated, so that the command can be stopped and continued.
"""

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import RESULTS
from lora_engine.captioning.metrics import Scores
from lora_engine.config import TrainingConfig
from lora_engine.demo import demo_settings
from lora_engine.demo.scenes import cc3m_caption, hard_caption, write_scenes
from lora_engine.lora.injection import lora_layers
from lora_engine.training.loop import train
from lora_engine.training.loss import caption_loss
from lora_engine.training.run import open_run
from lora_engine.training.setup import prepare
from lora_engine.training.trainer import seed_generators
from lora_engine.training.tuning import VARIANTS
from recipes.finetune import SETTINGS

FAMILIES = ("blip", "vit_gpt2")
SETS = {"hard": hard_caption, "demo": cc3m_caption}
SEEDS = (0, 1, 2)
RATES = dict.fromkeys(["full", *VARIANTS], (5e-3, 1e-2)) | {
    "full": (5e-4, 1e-3, 3e-3),
    "lora": (2e-3, 5e-3, 1e-2),
    "rslora": (1e-3, 2e-3, 5e-3),  # its updates are scaled by sqrt(8) times as much
    "lorafa": (1e-2, 2e-2),
    "loraplus": (1e-3, 2e-3, 5e-3),  # of A; B's is 8 times as high
    "pissa": (2e-3, 5e-3, 1e-2),
    "olora": (1e-3, 2e-3, 5e-3),
}
OTHERS: dict[str, dict[str, Any]] = {  # how they differ from LoRA; max_steps is a share
    "rank 2": {"lora_rank": 2, "lora_alpha": 8.0},  # alpha / rank stays
    "rank 32": {"lora_rank": 32, "lora_alpha": 128.0},
    "attention": {"lora_targets": ("attention",)},
    "feed-forward": {"lora_targets": ("feed_forward",)},
    "cosine": {"lr_schedule": "cosine"},
    "wsd": {"lr_schedule": "wsd"},
    "EMA 0.98": {"ema_decay": 0.98},
    # In LoRA's time: DoRA's steps take 1.1 times as long, those of the other variants as long.
    "DoRA, 0.9 of the steps": {"use_dora": True, "max_steps": 0.9},
    "rate 1e-5": {"lr": 1e-5, "warmup_steps": 0},  # as published
}
NUM_PROCESSES = 2
SIZE = {"num_train": 2000, "num_val": 200}
NUM_STEPS = 160


class Run(NamedTuple):
    """What identifies a run."""

    data: str
    family: str
    name: str
    lr: float
    seed: int


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="data, features")
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS)
    parser.add_argument("--num_train", type=int, default=SIZE["num_train"], help="200 to 20,000")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "learning.jsonl",
        help="give another one with another --num_steps or --num_train; default: %(default)s",
    )
    parser.add_argument(
        "--minutes", type=float, default=45, help="begin no run later; default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    end_s = time.monotonic() + 60 * arguments.minutes
    sizes = SIZE | {"num_train": arguments.num_train}
    paths = {
        name: write_scenes(arguments.work, **sizes, seed=0, caption=caption)
        for name, caption in SETS.items()
    }
    done = read_results(arguments.results)
    # Forked, so that a run need not import torch again.
    context = multiprocessing.get_context("fork")
    for stage in range(num_stages := 1 + 2 * len(SEEDS)):
        left = [run for run in runs_of(stage, done) if run not in done]
        print(f"stage {stage + 1} of {num_stages}: {len(left)} runs to do", flush=True)
        jobs = ((run, paths[run.data], arguments.num_steps, arguments.work, end_s) for run in left)
        with context.Pool(NUM_PROCESSES, maxtasksperchild=1) as pool:
            for run, result in pool.imap_unordered(measure, jobs):
                if result is None:
                    continue
                done[run] = result
                with arguments.results.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(run._asdict() | result) + "\n")
                print(*run, *result.values(), flush=True)
        if time.monotonic() > end_s:
            break
    text = tables(done)
    arguments.results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def runs_of(stage: int, done: dict[Run, dict]) -> Iterator[Run]:
    """All rates of the variants; then every row at its best one, seed after seed, the hard set
    before the demo's."""
    if stage == 0:
        for family in FAMILIES:
            for name, rates in RATES.items():
                yield from (Run("hard", family, name, lr, SEEDS[0]) for lr in rates)
        return
    data, seed = [(data, seed) for data in SETS for seed in SEEDS][stage - 1]
    for family in FAMILIES:
        for name in [*RATES, *OTHERS]:
            yield Run(data, family, name, rate_of(done, family, name), seed)


def rate_of(done: dict[Run, dict], family: str, name: str) -> float:
    """The rate of a row: that of its variant, by default LoRA, with the lowest loss of those tried.
    """
    settings = OTHERS.get(name, {})
    if "lr" in settings:
        return settings["lr"]
    variant = name if name in RATES else "dora" if settings.get("use_dora") else "lora"
    losses = {
        run.lr: result["loss"] for run, result in done.items()
        if (run.data, run.family, run.name, run.seed) == ("hard", family, variant, SEEDS[0])
    }
    return min(losses, key=losses.__getitem__, default=math.nan)


def measure(
    job: tuple[Run, tuple[Path, Path], int, Path, float]
) -> tuple[Run, dict[str, Any] | None]:
    """Train -> loss and CIDEr-D after the last step, and what they cost; None if it is too late.

    The time is that of the processor: another program does not count.
    """
    run, (train_path, val_path), num_steps, work, end_s = job
    if time.monotonic() > end_s:
        return run, None
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    begin_s = time.process_time()
    settings = VARIANTS.get(run.name) or OTHERS.get(run.name, {})
    num_steps = round(num_steps * settings.get("max_steps", 1))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = dataclasses.replace(
            demo_settings(SETTINGS, run.family),
            train_data_path=str(train_path), val_data_path=str(val_path),
            output_path=f"{folder}/run", cache="disk", cache_dir=str(work / "cache"), seed=run.seed,
            **settings | {"lr": run.lr, "max_steps": num_steps, "eval_every": num_steps},
        )
        if run.name == "full":
            loss, scores, num_trained = train_fully(config)
        else:
            summary = train(config)
            loss, scores = summary.losses[num_steps], summary.scores[num_steps]
            if summary.average is not None:
                _, loss, scores = summary.average
            facts = json.loads((summary.path / "environment.json").read_text())
            num_trained = facts["num_trainable"]
    assert scores is not None
    return run, {
        "loss": round(loss, 5), "cider_d": round(scores.cider_d, 4),
        "cpu_s": round(time.process_time() - begin_s, 2), "num_trained": num_trained,
    }


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


def read_results(path: Path) -> dict[Run, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = map(json.loads, lines)
    return {Run(*(line.pop(field) for field in Run._fields)): line for line in results}


def tables(done: dict[Run, dict]) -> str:
    """A table for each set and family: means over seeds, with the range of CIDEr-D.

    The time is the shortest: the first runs also encode the images.
    """
    text = ""
    for data in SETS:
        for family in FAMILIES:
            if not any(run[:2] == (data, family) for run in done):
                continue
            text += (
                f"\n{family}, {data} set\n\n"
                "| | rate | seeds | loss | CIDEr-D (range) | CPU s | trained |\n"
                "|---|---|---|---|---|---|---|\n"
            )
            for name in [*RATES, *OTHERS]:
                lr = rate_of(done, family, name)
                found = [
                    result for run, result in done.items()
                    if run[:4] == (data, family, name, lr)
                ]
                if found:
                    loss, cider_d, cpu_s, num_trained = (
                        [result[key] for result in found]
                        for key in ("loss", "cider_d", "cpu_s", "num_trained")
                    )
                    text += (
                        f"| {name} | {lr:g} | {len(found)} | {statistics.mean(loss):.3f} "
                        f"| {statistics.mean(cider_d):.2f} ({min(cider_d):.2f}-{max(cider_d):.2f}) "
                        f"| {min(cpu_s):.0f} | {num_trained[0]:,} |\n"
                    )
    return text.lstrip("\n")


if __name__ == "__main__":
    main()
