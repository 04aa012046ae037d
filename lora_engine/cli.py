"""Command lines: flags from a dataclass, and users' mistakes as messages, not tracebacks.

This module imports nothing slow, such as torch: commands import it within `reported_errors`, which
also turns a Ctrl-C during the import into a message.
"""

import dataclasses
import difflib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lora_engine.other_names import FLAGS, REASONS, ours_for, reason_for
from lora_engine.stopping import SIGNALS, Interrupted, LoadingStopped, TrainingStopped
from lora_engine.terminal import ConsoleHandler, logging_to, one_line, printable

USAGE_ERROR = 2
STOPPED = 3
# What a shell reports for a program that was ended by SIGINT (Ctrl-C) or SIGPIPE.
INTERRUPTED = 130
PIPE_CLOSED = 141

T = TypeVar("T")


class ExitStatus:
    """The exit status of a program, in `code`."""

    code = 0


@contextmanager
def reported_errors() -> Iterator[ExitStatus]:
    """Turn errors within the context into a message on stderr and an exit status; show log records.

    A context manager, not a function that calls `main`: it adds no frame to the stack.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
    # Exit by an exception, so that worker processes end and temporary files are removed.
    before = {
        number: signal.signal(number, lambda number, frame: sys.exit(128 + number))
        for number in SIGNALS
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN
    }
    status = ExitStatus()
    try:
        with logging_to(ConsoleHandler()):
            yield status
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        status.code = PIPE_CLOSED
    except (ValueError, OSError) as error:
        _print_error("error:", error)
        status.code = USAGE_ERROR
    except (TrainingStopped, LoadingStopped) as error:
        _print_error("stopped:", error)
        status.code = STOPPED
    except Interrupted as error:
        _print_error("stopped by", error)
        status.code = error.status
    except RuntimeError as error:
        is_short = type(error).__name__ == "OutOfMemoryError"  # torch's, which is slow to import
        if not is_short and "can't allocate memory" not in str(error):  # on a CPU
            raise
        error.args = (
            f"{one_line(error)}\nTry a smaller --batch_size (with more --grad_accum_steps to keep "
            f"the step the same) or --gradient_checkpointing",
        )
        _print_error("stopped:", error)
        status.code = STOPPED
    except KeyboardInterrupt as error:
        _print_error("interrupted", error)
        status.code = INTERRUPTED
    finally:
        _drop_unwritable_output()
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable[[list[str]], int]) -> int:
    """Call `main` with the command line and return its exit status; see `reported_errors`."""
    with reported_errors() as status:
        status.code = main(sys.argv[1:])
    return status.code


def _print_error(kind: str, error: BaseException) -> None:
    notes = getattr(error, "__notes__", [])
    with suppress(OSError):  # a closed terminal must not change the exit status
        print(printable("\n".join([f"{kind} {error}".rstrip(), *notes])), file=sys.stderr)


def _drop_unwritable_output() -> None:
    """Otherwise Python flushes again at exit, fails, and changes the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(settings: type[T], args: Sequence[str], *, prog: str, description: str, **more: Any) -> T:
    """Fill a dataclass from flags, which may be spelled with underscores or hyphens.

    Raises ValueError as `given_fields` does, for a required flag that is missing, and for what tyro
    refuses. For --help, tyro prints and exits.
    """
    import tyro

    see = f"see {prog.replace('python -m lora_engine', this_program())} --help"
    given = given_fields(settings, args)
    if "default" not in more and not {"--help", "-h"} & {*args}:
        missing = [flag for flag in _required(settings) if flag.removeprefix("--") not in given]
        if missing:
            raise ValueError(f"{prog.split()[-1]} needs {' and '.join(missing)}; {see}")
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(
                settings, args=args, prog=prog, description=description, use_underscores=True,
                **more,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    raise ValueError(f"{_complaint(told.getvalue())}; {see}")


# What tyro says, and how we say it; anything else is passed on.
_COMPLAINTS = {
    r"Error parsing (\S+): .*could not convert string to float: (.+)":
        r"\1 is \2; it must be a number",
    r"Error parsing (\S+): .*invalid literal for int\(\) with base 10: (.+)":
        r"\1 is \2; it must be a whole number",
    r"Error parsing (\S+): Could not find valid parse for arguments: \[(.+?)\] .*\[INT .*":
        r"\1 is \2; it must be whole numbers, separated by spaces, such as 4 8",
    r"Error parsing (\S+): Could not find valid parse for arguments: \[(.+?)\] .*\[FLOAT .*":
        r"\1 is \2; it must be numbers, separated by spaces, such as 1e-4 2e-4",
    r"invalid choice (.+) for argument '(.+)'\. Expected one of \((.+)\)\.":
        r"\2 is \1; it must be one of \3",
    r"Unrecognized options: (.+)": r"unrecognized arguments \1: values follow their flags",
}


def _complaint(box: str) -> str:
    """tyro's error message in one line, without its frame, title and further sections."""
    sections = re.split("[─-]{4,}", re.sub("[│╭╮╰╯]", " ", box))  # on some terminals ASCII
    texts = [" ".join(section.split()) for section in sections[len(sections) > 1:]]
    for pattern, ours in _COMPLAINTS.items():
        for text in (texts[0], " ".join(texts)):
            if re.fullmatch(pattern, text):
                return re.sub(pattern, ours, text)
    return texts[0]


def _required(settings: type) -> list[str]:
    """The flags that have no default."""
    positional = _fields_marked(settings, "Positional")
    return [
        f"--{field.name}" for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING and field.name not in positional
    ]


def _fields_marked(settings: type, mark: str) -> set[str]:
    """The fields whose type has a mark of tyro's, such as Positional."""
    import tyro

    hints = get_type_hints(settings, include_extras=True)
    return {
        name for name, hint in hints.items()
        if getattr(tyro.conf, mark) in getattr(hint, "__metadata__", ())
    }


def given_fields(settings: type, args: Sequence[str]) -> list[str]:
    """The fields of a dataclass that a command line sets.

    Raises ValueError for a flag that lacks its value or is given twice, and for one that does not
    exist: suggests the one that does what another tool's does, or close matches.
    """
    fields = {f"--{field.name}": field for field in dataclasses.fields(settings)}
    positional = {f"--{name}" for name in _fields_marked(settings, "Positional")}
    repeatable = _fields_marked(settings, "UseAppendAction")
    fields |= {
        f"--no_{field.name}": field for field in [*fields.values()] if field.type is bool
    }
    given: list[str] = []
    for arg, following in zip(args, [*args[1:], None]):
        flag, equals, _ = arg.partition("=")
        if re.fullmatch(r"-[a-zA-Z]\w+", flag):  # one hyphen
            flag = f"-{flag}"
        if not re.match(r"--[a-zA-Z]", flag) or flag == "--help":
            continue
        spelling = flag.replace("-", "_").replace("__", "--", 1)
        if spelling in positional:
            raise ValueError(f"there is no flag {flag}; give its values without one")
        if spelling not in fields:
            known = fields.keys() - positional
            raise ValueError(f"there is no flag {flag}; {_advice_on_flag(spelling, known)}")
        if not arg.startswith("--"):
            raise ValueError(f"{arg} needs two hyphens: {flag}")
        name = fields[spelling].name
        if fields[spelling].type is bool:
            if equals or following is not None and following.lower() in ("true", "false"):
                raise ValueError(f"{flag} takes no value: give --{name} or --no_{name}")
        elif not equals and (following is None or re.match(r"--[a-zA-Z]", following)):
            raise ValueError(f"{flag} needs a value")
        if name in given and name not in repeatable:
            several = "tuple" in str(fields[spelling].type)
            advice = "give all its values behind one" if several else "give it once"
            raise ValueError(f"--{name} is given twice; {advice}")
        given.append(name)
    return given


def _advice_on_flag(flag: str, known: Collection[str]) -> str:
    name = flag.removeprefix("--")
    ours, reason = ours_for(name, FLAGS, known), reason_for(name, REASONS)
    if ours is not None:
        return f"it is {ours} here"
    if reason is not None:
        return reason
    near = difflib.get_close_matches(flag, known, n=3, cutoff=0.7)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists all flags"


# --- command lines that people may copy ---------------------------------------------------------


def this_program() -> str:
    """How to start `lora_engine` as this program was started: by the command that pip installs, or
    by this Python, whose path is relative if it is inside the working folder."""
    script = Path(sys.argv[0])
    if script.stem == "lora-engine":  # argv has its path, also where the shell found it
        found = shutil.which("lora-engine")
        is_on_path = found is not None and script.exists() and os.path.samefile(found, script)
        return "lora-engine" if is_on_path else quoted(_as_seen_here(script))
    return f"{quoted(_as_seen_here(Path(sys.executable)))} -m lora_engine"


def _as_seen_here(path: Path) -> str:
    """A path, relative to the working folder if it is inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def quoted(*words: str) -> str:
    """Words of a command line as this system's shell reads them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
