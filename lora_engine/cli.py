"""Command lines: flags from a dataclass, and people's mistakes as messages, not tracebacks.

What is slow to import, torch above all, is imported within `run`: Ctrl-C is no mistake then either.
"""

import dataclasses
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from lora_engine.stopping import SIGNALS, Interrupted, LoadingStopped, TrainingStopped
from lora_engine.terminal import one_line, printable

USAGE_ERROR = 2
STOPPED = 3
INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended
TERMINATED = 143  # and one that SIGTERM did
PIPE_CLOSED = 141  # and one whose reader has gone

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
            f"{one_line(error)}\nTry a smaller --batch_size (with --grad_accum_steps "
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
