"""Run a recipe: combine the settings of its file, the command line and a resumed run, and train."""

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.cli import given_fields, parse, quoted, this_program
from lora_engine.config import NEWEST, REACHES_OUTSIDE, TrainingConfig, one_warmup
from lora_engine.files import read_limited
from lora_engine.ranks import open_ranks

MAX_CONFIG_BYTES = 2**20

logger = logging.getLogger(__name__)


def run_recipe(
    args: Sequence[str],
    *,
    name: str,
    description: str,
    settings: TrainingConfig,
    demo: TrainingConfig,
    family: str | None = None,
) -> int:
    """Train with a recipe's `settings`, or with its `demo` settings if there is no training data
    (and it was not started by the verb train, which then raises ValueError).

    With --resume, the settings of the run come before those of the recipe (but see
    `REACHES_OUTSIDE`); the flags on the command line come before both. `family` is the model type
    that the recipe is for, None for all.
    """
    with open_ranks() as ranks:
        args = normalized(args)
        verb = sys.argv[1] if sys.argv[1:2] in (["train"], ["demo"]) else None
        prog = f"python -m recipes.{name}" if verb is None else f"python -m lora_engine {verb}"
        parsed = parse(
            TrainingConfig, args, prog=prog, description=description, default=settings
        )
        given = one_warmup(
            {field: getattr(parsed, field) for field in given_fields(TrainingConfig, args)}
        )
        output_path = parsed.output_path
        if ranks.num_restarts:  # by torchrun, after a failure
            output_path = output_path or ranks.remembered()
            if output_path is not None:  # otherwise it failed before it had a folder
                given = {"resume": NEWEST, "output_path": output_path} | given
        stored = {}
        if given.get("resume", parsed.resume) is not None and output_path is not None:
            stored = _stored_settings(Path(output_path), given, defaults=(settings, demo))
        config = dataclasses.replace(settings, **{**stored, **given})
        has_data = config.train_data_path is not None
        is_demo = not has_data and verb != "train"
        if config.val_data_path is not None and not has_data:
            raise ValueError("--val_data_path needs a --train_data_path, too")
        if is_demo:
            config = dataclasses.replace(demo, **{**stored, **given})
        if config.print_config:
            print(json.dumps(config.as_dict(), indent=2))
            return 0
        config.check()
        if verb == "train" and not has_data:
            raise ValueError(
                f"no data to train on: give it with --train_data_path (docs/data.md lists the "
                f"formats), or try the embedded demo: {this_program()} demo"
            )
        if is_demo:
            from lora_engine.report.run_folder import RunFolder

            if ranks.is_main:
                RunFolder.check_free(config.output_path, resume=config.resume is not None)
            with ranks.machine_first():
                config = with_scenes(config)
        from lora_engine.training.loop import train

        train(config, family=family, ranks=ranks)
        return 0


def normalized(args: Sequence[str]) -> list[str]:
    """The command line with --license for its older spelling and a value for a bare --resume.

    Raises ValueError for a fraction of an epoch.
    """
    args = [re.sub(r"^--licence(?==|$)", "--license", arg) for arg in args]
    part = re.search(r"(?:^|\n)--epochs[=\n](\d*\.\d+)(?:\n|$)", "\n".join(args))
    if part is not None:
        raise ValueError(
            f"--epochs is {part[1]}; it must be a whole number: --max_steps ends a run within an "
            f"epoch (a step is --batch_size captions)"
        )
    return [
        f"--resume={NEWEST}" if arg == "--resume" and following.startswith("--") else arg
        for arg, following in zip(args, [*args[1:], "--"])
    ]


def _stored_settings(
    folder: Path, given: Mapping[str, Any], *, defaults: Sequence[TrainingConfig]
) -> dict[str, Any]:
    """The settings in a run folder's config.json; none if there is no such file.

    Without those in `REACHES_OUTSIDE` that neither the command line nor any of the `defaults`
    confirms. Raises ValueError if the file cannot be read, and for an unconfirmed model, without
    which the run cannot continue.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(read_limited(path, MAX_CONFIG_BYTES))
        stored = TrainingConfig.from_dict(content).as_dict()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run ({error}); remove it and give all flags "
            f"again"
        ) from None
    stored["output_path"] = str(folder)  # the folder may have been moved
    ignored = {
        name: stored.pop(name) for name in REACHES_OUTSIDE
        if name not in given
        and stored[name] not in [getattr(settings, name) for settings in defaults]
    }
    flags = quoted(*(
        part for name, value in ignored.items() for part in (f"--{name}", str(value))
    ))
    if "model" in ignored or "revision" in ignored:
        raise ValueError(
            f"{path} names another model than this command line, and a run folder is not trusted "
            f"to choose it; if it is the right one, add {flags}"
        )
    if ignored:
        logger.warning(f"ignored in {path}; to use them, add to this command line: {flags}")
    return stored


def with_scenes(config: TrainingConfig) -> TrainingConfig:
    """Draw the demo's data into a folder, from which it is read like any other."""
    from lora_engine.demo.scenes import write_scenes

    train_path, val_path = write_scenes(
        Path("runs") / "demo_scenes", num_train=2000, num_val=200, seed=0
    )
    logger.info(
        f"no --train_data_path: running the demo on scenes drawn into {train_path.parent}\n"
        f"demo settings: --epochs {config.epochs} --batch_size {config.batch_size} "
        f"--lr {config.lr:g} --warmup_steps {config.warmup_steps} (others: --print_config)"
    )
    return dataclasses.replace(config, train_data_path=str(train_path), val_data_path=str(val_path))
