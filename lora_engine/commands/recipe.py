"""What a recipe does: settings from its file, its flags and, with --resume, from the run."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_engine.cli import parse
from lora_engine.config import NEWEST, REACHES_OUTSIDE, TrainingConfig
from lora_engine.files import read_limited
from lora_engine.terminal import printable

MAX_CONFIG_BYTES = 2**20


def run_recipe(
    args: Sequence[str],
    *,
    name: str,
    description: str,
    family: str,
    published: TrainingConfig,
    demo: TrainingConfig,
) -> int:
    """Train as a recipe says and the flags change it; without data paths, the embedded demo.

    With --resume, settings that no flag gives are the run's, but for those in `REACHES_OUTSIDE`.
    """
    _check_single_process()
    args = _with_newest(args)

    def parse_onto(defaults: TrainingConfig) -> TrainingConfig:
        return parse(
            TrainingConfig, args, prog=f"python -m recipes.{name}", description=description,
            default=defaults,
        )

    config = parse_onto(published)
    if config.resume is not None and config.output_path is not None:
        before = Path(config.output_path, "config.json")
        if before.exists():
            config = _within_reach(
                parse_onto(_settings(before)), (config, parse_onto(demo)), source=before
            )
    is_demo = config.train_data_path is None
    if is_demo:
        if config.val_data_path is not None:
            raise ValueError("--val_data_path needs a --train_data_path beside it")
        config = parse_onto(demo)
    if config.print_config:
        print(json.dumps(config.as_dict(), indent=2))
        return 0
    config.check()
    if is_demo:
        from lora_engine.report.run_folder import RunFolder

        RunFolder.check_free(config.output_path, take_up=config.resume is not None)
        config = _with_scenes(config)
    from lora_engine.training.loop import train

    train(config, family=family)
    return 0


def _check_single_process() -> None:
    """Raises ValueError in each process of a distributed launch: all would train the same run."""
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdecimal() or int(size) < 2:
        return
    if os.environ.get("RANK", "0") != "0":
        raise ValueError("one of several processes: process 0 says why none of them trains")
    raise ValueError(
        f"WORLD_SIZE is {size}: torchrun or accelerate has started {size} processes, but a run "
        f"trains in one process, on one GPU, and each of them would train the whole run. Start "
        f"the same command with plain python, and unset WORLD_SIZE if it is set for another reason"
    )


def _with_newest(args: Sequence[str]) -> list[str]:
    """A bare --resume means the newest checkpoint; tyro wants flags to have values, or never."""
    followers = [*args[1:], "--"]
    return [
        f"--resume={NEWEST}" if arg == "--resume" and follower.startswith("--") else arg
        for arg, follower in zip(args, followers)
    ]


def _settings(path: Path) -> TrainingConfig:
    """Those of a run's config.json; raises ValueError where they cannot be read."""
    try:
        return TrainingConfig.from_dict(json.loads(read_limited(path, MAX_CONFIG_BYTES)))
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run ({error}); give all flags anew and remove "
            f"it"
        ) from None


def _within_reach(
    config: TrainingConfig, given: Sequence[TrainingConfig], *, source: Path
) -> TrainingConfig:
    """`config` without what only `source`, a run's config.json, says of `REACHES_OUTSIDE`.

    `given` are the settings of the command line on the recipe's and on the demo's defaults. Raises
    ValueError for another model: without it the run cannot continue.
    """
    ours: dict[str, Any] = {}
    for name in REACHES_OUTSIDE:
        value = getattr(config, name)
        if value not in [getattr(settings, name) for settings in given]:
            ours[name] = getattr(given[0], name)
    flags = shlex.join(word for name in ours for word in (f"--{name}", str(getattr(config, name))))
    if "model" in ours or "revision" in ours:
        raise ValueError(
            f"{source} names another model than this command line, and a run folder is not trusted "
            f"to choose it; if it is the right one, add {flags}"
        )
    if ours:
        print(
            printable(f"ignored in {source}; add to this command line to use: {flags}"),
            file=sys.stderr,
        )
    return dataclasses.replace(config, **ours)


def _with_scenes(config: TrainingConfig) -> TrainingConfig:
    """The demo's data: drawn once into a folder, then read like anybody's."""
    from lora_engine.demo.scenes import write_scenes

    train_path, val_path = write_scenes(
        Path("runs") / "demo_scenes", num_train=2000, num_val=200, seed=0
    )
    print(
        f"no --train_data_path: running the demo on scenes drawn into {train_path.parent}\n"
        f"demo settings: --epochs {config.epochs} --batch_size {config.batch_size} "
        f"--lr {config.lr:g} --warmup_steps {config.warmup_steps} (others: --print_config)"
    )
    return dataclasses.replace(config, train_data_path=str(train_path), val_data_path=str(val_path))
