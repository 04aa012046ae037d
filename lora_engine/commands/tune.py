"""python -m lora_engine tune: choose learning rate, rank and variant by successive halving."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lora_engine import cli
from lora_engine.commands.recipe import normalized, with_scenes
from lora_engine.config import NEWEST, Range, TrainingConfig, check_ranges
from lora_engine.demo import demo_settings
from lora_engine.report.page import write_report
from lora_engine.terminal import printable
from lora_engine.training import tuning
from lora_engine.training.python_run import FINE_TUNING
from lora_engine.training.tuning import Result

NUM_COMPARED = 6
PROG = "python -m lora_engine tune"
Variant = Literal["lora", "rslora", "dora", "lorafa", "loraplus", "pissa", "olora", "eva"]


@dataclass(frozen=True)
class TuneConfig:
    """Flags of `tune` beside those of `train`."""

    minutes: Annotated[float, Range(gt=0)] = 10.0
    """Time to take, about. More minutes try more settings."""
    lrs: tuple[float, ...] = ()
    """Learning rates to try. Default: --lr, and a quarter, a half, twice and four times it."""
    ranks: tuple[int, ...] = ()
    """Ranks to try; alpha / rank stays the same. Default: --lora_rank."""
    variants: tuple[Variant, ...] = ("eva", "lora", "dora", "loraplus")
    """Variants of LoRA to try; LoRA+ with a ratio of 8."""


def tune(args: list[str]) -> int:
    """Search, print the results and the winner's command, and return the exit status."""
    own, rest = _split(args)
    flags = cli.parse(
        TuneConfig, own, prog=PROG,
        description="Choose learning rate, rank and variant by successive halving: many settings "
        "for a few steps, the best third of them for three times as many, and so on. Two runs are "
        "full ones: the first, of the settings as they are, and the last, of the best of the "
        "others. All flags of train, such as --train_data_path and --model, are settings of every "
        "run; without data, the embedded demo is tuned. Results are in --output_path; the same "
        "command with --resume continues a search, also with other --lrs, --ranks or --variants.",
    )
    check_ranges(flags)
    config = _training_config(normalized(rest))
    folder = Path(config.output_path or "runs/tune")
    candidates = tuning.candidates_of(
        config,
        flags.lrs or [config.lr * factor for factor in (0.25, 0.5, 1, 2, 4)],
        flags.ranks or [config.lora_rank],
        flags.variants,
    )
    results = tuning.tune(config, candidates, minutes=flags.minutes, folder=folder)
    num_steps = max(result.num_steps for result in results)
    winner = min((r for r in results if r.num_steps == num_steps), key=lambda r: r.order)
    text = _text(winner, config)
    # The winner first; of the earlier rungs the best few.
    compared = sorted(results, key=lambda r: (r is not winner, -r.num_steps, r.order))
    write_report([r.path for r in compared[:NUM_COMPARED]], folder / "report.html", note=text)
    print(printable(f"\n{text}\nreport    {folder / 'report.html'}"))
    return 0


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `tune`, with their values, and the others."""
    names = {field.name for field in dataclasses.fields(TuneConfig)} | {"help"}
    own: list[str] = []
    rest: list[str] = []
    target = rest
    for arg in args:
        if re.match(r"-(?!\.?\d)", arg):  # no negative number
            name = arg.partition("=")[0].lstrip("-").replace("-", "_")
            target = own if name in names or arg == "-h" else rest
        target.append(arg)
    return own, rest


def _training_config(args: Sequence[str]) -> TrainingConfig:
    parsed = cli.parse(TrainingConfig, args, prog=PROG, description="", default=FINE_TUNING)
    parsed.check()
    if parsed.resume not in (None, NEWEST):
        raise ValueError(f"--resume {parsed.resume}: tune continues each run by itself; give it "
                         f"without a value")
    if parsed.init_adapter is not None:
        raise ValueError("tune chooses rank and variant of new adapters: leave --init_adapter out")
    if parsed.train_data_path is not None:
        return parsed
    given = {name: getattr(parsed, name) for name in cli.given_fields(TrainingConfig, args)}
    return with_scenes(dataclasses.replace(demo_settings(FINE_TUNING, "blip"), **given))


def _text(winner: Result, config: TrainingConfig) -> str:
    """What the search has found."""
    if winner.loss == math.inf:
        return "All full runs diverged: give a lower --lr and another --output_path."
    figures = f"validation loss {winner.loss:.4f}"
    if winner.cider_d is not None:
        figures += f", CIDEr-D {winner.cider_d:.4f}"
    found = dataclasses.replace(
        config, **winner.candidate.settings(config), output_path=None, resume=None
    )
    remarks = []
    if not winner.is_improvement:
        remarks = ["No full run was better than the captioner before training: give other --lrs."]
    return "\n".join([
        *remarks,
        f"best      {winner.candidate}: {figures}",
        f"adapter   {Path(winner.path, 'adapter')}",
        f"to train  {cli.this_program()} train {cli.quoted(*_flags(found))}",
    ])


def _flags(config: TrainingConfig) -> list[str]:
    """The flags of `train` that give these settings."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(FINE_TUNING, field.name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name}", *map(str, values)]
    return flags
