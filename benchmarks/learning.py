"""What helps LoRA to learn: variant, rank, targets, learning rate and schedule, on the demo.

    python -m benchmarks.learning

The demo's two tiny captioners learn the captions of drawn scenes: the demo's own, and the hard set,
with rare words that they must spell (lora_engine/demo/scenes.py). All runs have the same number of
steps and see the same images. Every variant first runs at several rates, on the hard set with one
seed; its best one, by the validation loss at the end, is then repeated with more seeds, and on the
demo's set. Every other row differs from LoRA at its best rate in one setting. "full" trains all
weights of the layers that LoRA adapts: the ceiling.

A run has a process of its own with one thread, two at a time, and a line in learning.jsonl. Runs
that have a line are not repeated, so that the command can be stopped and continued.
"""

import argparse
import dataclasses
import json
import logging
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
    "full": (5e-4, 1e-3),
    "lora": (2e-3, 5e-3, 1e-2),
    "rslora": (1e-3, 2e-3, 5e-3),  # its updates are scaled by sqrt(8) times as much
    "lorafa": (1e-2, 2e-2),
    "loraplus": (2e-3, 5e-3),  # of A; B's is 8 times as high
}
OTHERS: dict[str, dict[str, Any]] = {  # how they differ from LoRA at its best rate
    "rank 2": {"lora_rank": 2, "lora_alpha": 8.0},  # alpha / rank stays
    "rank 32": {"lora_rank": 32, "lora_alpha": 128.0},
    "attention": {"lora_targets": ("attention",)},
    "feed-forward": {"lora_targets": ("feed_forward",)},
    "cosine": {"lr_schedule": "cosine"},
    "wsd": {"lr_schedule": "wsd"},
    "EMA 0.98": {"ema_decay": 0.98},
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
    parser.add_argument("--results", type=Path, default=RESULTS / "learning.jsonl")
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
        todo = [run for run in runs_of(stage, done) if run not in done]
        print(f"stage {stage + 1} of {num_stages}: {len(todo)} runs to do", flush=True)
        jobs = ((run, paths[run.data], arguments.num_steps, arguments.work, end_s) for run in todo)
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
    """LoRA's rates; all rows of the first seed, the variants at all of their rates; then the best
    of these, seed after seed, the hard set before the demo's."""
    sets = [(data, seed) for data in SETS for seed in SEEDS]
    data, seed = sets[max(stage - 1, 0)]
    for family in FAMILIES:
        for name in ["lora"] if stage == 0 else [*RATES, *OTHERS]:
            for lr in RATES.get(name, ()) if stage < 2 else ():
                yield Run(data, family, name, lr, seed)
            if stage >= 2 or name in OTHERS:
                best = best_rate(done, family, name)
                yield Run(data, family, name, OTHERS.get(name, {}).get("lr", best), seed)


def best_rate(done: dict[Run, dict], family: str, name: str) -> float | None:
    """The rate with the lowest loss of those tried; for a row of OTHERS that of LoRA."""
    name = name if name in RATES else "lora"
    losses = {
        run.lr: result["loss"] for run, result in done.items()
        if (run.data, run.family, run.name, run.seed) == ("hard", family, name, SEEDS[0])
    }
    return min(losses, key=losses.__getitem__, default=None)


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
    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = dataclasses.replace(
            demo_settings(SETTINGS, run.family),
            train_data_path=str(train_path), val_data_path=str(val_path),
            output_path=f"{folder}/run", cache="disk", cache_dir=str(work / "cache"),
            lr=run.lr, seed=run.seed, max_steps=num_steps, eval_every=num_steps,
        )
        if run.name == "full":
            loss, scores, num_trained = train_fully(config)
        else:
            how = VARIANTS.get(run.name) or OTHERS.get(run.name, {})
            summary = train(dataclasses.replace(config, **how))
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
    """A table for each set and family: means over seeds, with the range of CIDEr-D."""
    text = ""
    for data in SETS:
        for family in FAMILIES:
            text += (
                f"\n{family}, {data} set\n\n"
                "| | rate | seeds | loss | CIDEr-D (range) | CPU s | trained |\n"
                "|---|---|---|---|---|---|---|\n"
            )
            for name in [*RATES, *OTHERS]:
                lr = OTHERS.get(name, {}).get("lr") or best_rate(done, family, name)
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
                        f"| {statistics.mean(cpu_s):.0f} | {num_trained[0]:,} |\n"
                    )
    return text.lstrip("\n")


if __name__ == "__main__":
    main()
