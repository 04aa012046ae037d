"""Command lines: flags from a dataclass, and people's mistakes as messages, not tracebacks.

What is slow to import, torch above all, is imported within `run`: Ctrl-C is no mistake then either.
"""

import dataclasses
import difflib
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lora_engine.config import NEWEST, REACHES_OUTSIDE, TrainingConfig
from lora_engine.stopping import SIGNALS, Interrupted, LoadingStopped, TrainingStopped
from lora_engine.terminal import printable

USAGE_ERROR = 2
STOPPED = 3
INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended
TERMINATED = 143  # and one that SIGTERM did
PIPE_CLOSED = 141  # and one whose reader has gone
MAX_CONFIG_BYTES = 2**20

T = TypeVar("T")


def run(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line -> exit status; errors go to stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    # By way of an exception, so that loading processes end and temporary files are removed.
    before = {
        number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
        for number in SIGNALS
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        return PIPE_CLOSED
    except (ValueError, OSError) as error:
        _print_error("error:", error)
        return USAGE_ERROR
    except (TrainingStopped, LoadingStopped) as error:
        _print_error("stopped:", error)
        return STOPPED
    except Interrupted as error:
        _print_error("stopped by", error)
        return error.status
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is slow to import
            raise
        error.args = (
            f"{str(error).splitlines()[0]}\nTry a smaller --batch_size (with --grad_accum_steps "
            f"for the same steps), or --gradient_checkpointing",
        )
        _print_error("stopped:", error)
        return STOPPED
    except KeyboardInterrupt as error:
        _print_error("interrupted", error)
        return INTERRUPTED
    finally:
        _drop_unwritable_output()
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_error(kind: str, error: BaseException) -> None:
    notes = getattr(error, "__notes__", [])
    with suppress(OSError):  # a terminal that has gone must not change the exit status
        print(printable("\n".join([f"{kind} {error}".rstrip(), *notes])), file=sys.stderr)


def _drop_unwritable_output() -> None:
    """Else Python tries once more at exit, fails, and changes the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(settings: type[T], args: Sequence[str], *, prog: str, description: str, **more: Any) -> T:
    """Fill a dataclass from flags, which may be spelled with underscores or hyphens.

    Raises ValueError for a flag that does not exist, naming near ones. Other mistakes and --help
    end the program, as tyro words them.
    """
    import tyro

    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    known = [f"--{field.name}" for field in fields]
    known += [f"--no_{field.name}" for field in fields if field.type is bool]
    for arg in args:
        flag = arg.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if re.match(r"--[a-zA-Z]", arg) and flag not in [*known, "--help"]:
            near = difflib.get_close_matches(flag, known, n=3, cutoff=0.7)
            advice = f"did you mean {' or '.join(near)}?" if near else "--help lists all flags"
            raise ValueError(f"there is no flag {arg.split('=')[0]}; {advice}")
    return tyro.cli(
        settings, args=args, prog=prog, description=description, use_underscores=True, **more
    )


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
        from lora_engine.run_folder import RunFolder

        RunFolder.check_free(config.output_path, take_up=config.resume is not None)
        config = _with_scenes(config)
    from lora_engine.training import train

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
    from lora_engine.tensor_files import read_limited

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
