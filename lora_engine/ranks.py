"""The processes of a run under torchrun: what they exchange, and how they end together.

`OneProcess` is the form for a single process, which imports nothing distributed. `ManyProcesses`
uses torch.distributed: gloo between CPUs and for what is small, NCCL for the gradients of GPUs.

    exchange      gather (JSON), vote (a few integers, without waiting), sum of gradients
    status        each process posts one to torchrun's store every second: its beat, why it failed
    the end       rank 0 reports it; the others leave after it

While a process waits for others it reads their status. A process that has failed, is gone, or has
not posted for `HUNG_S` ends the wait, and with it the run, in all of them. If that is rank 0, the
lowest rank that is left takes over: it writes the last checkpoint and reports.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from lora_engine.stopping import Interrupted, LoadingStopped, TrainingStopped
from lora_engine.terminal import one_line

if TYPE_CHECKING:  # importing torch takes seconds, which --help does not wait for
    from torch import Tensor

logger = logging.getLogger(__name__)

JOIN_S = 300.0  # until all processes have started
HUNG_S = 8.0  # without a beat
_BEAT_S = 1.0
_POLL_S = 0.5
_GPU_POLL_S = 5e-5
_STORE_S = 10.0  # for one operation of the store
_ORPHAN_S = 3.0  # without the store, until a process no longer waits for others
_NO_LIMIT = timedelta(days=7)  # of torch.distributed's operations: see `ManyProcesses`
_MAX_WARNINGS = 100
_PATIENCE = 10  # times HUNG_S before the first step: parsing a large file may hold Python's lock


class Ranks(Protocol):
    """The processes of a run; `rank` is this one's number among `size`.

    `local_size` of them are on this machine, and this one is number `local_rank` of those. `launch`
    is the same text in all of them, and another one in every launch. `is_main` is whether this one
    writes and reports. torchrun has restarted them `num_restarts` times.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launch: str
    num_restarts: int

    @property
    def is_main(self) -> bool: ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in order of rank; all must call it."""

    def from_machine(self, value: Any) -> Any:
        """The JSON value of this machine's first process; all must call it."""

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of all processes' values, element by element, on the CPU."""

    def vote(self, values: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Send integers without waiting -> a function that waits for those of all processes."""

    def summation(self, buffer: Tensor, num_parts: int) -> Summation:
        """A sum over `num_parts` tensors, shared out over the processes as by `share`."""

    def machine_first(self) -> AbstractContextManager[None]:
        """This machine's first process executes the context before its others do."""

    def check(self) -> None:
        """Raises TrainingStopped or Interrupted if another process has failed or is gone."""

    def cause(self, error: BaseException) -> BaseException:
        """Why this process ends: `error`, unless that is torchrun's answer to a lost process."""

    def remember(self, folder: str) -> None:
        """Keep the run's folder for the processes that torchrun starts after a failure."""

    def remembered(self) -> str | None:
        """The run's folder, if a process kept it before a restart."""

    def name(self, rank: int) -> str:
        """A process for messages, such as "rank 3 (on host b)"."""


class Summation(Protocol):
    """A sum of tensors in the order of their numbers, whichever process has computed them.

    Floating-point sums depend on the order: in this one they are the same for any number of
    processes.
    """

    def add(self) -> None:
        """Take the buffer's content as this process' next part, and set the buffer to zero."""

    def finish(self) -> None:
        """Write the sum over the parts of all processes into the buffer."""


def share(num_items: int, ranks: Ranks) -> range:
    """The numbers of this process' items: as many for each process, next to each other."""
    num_each = num_items // ranks.size
    return range(ranks.rank * num_each, (ranks.rank + 1) * num_each)


def dealt(items: Sequence[Any], ranks: Ranks) -> Sequence[Any]:
    """This process' items of a sequence of any length; `collect` restores the order."""
    return items[ranks.rank :: ranks.size]


def collect(results: Sequence[Any], ranks: Ranks) -> list[Any]:
    """The JSON results for all items that were `dealt`, in their order; all must call it."""
    missing = object()
    rounds = zip_longest(*ranks.gather(results), fillvalue=missing)
    return [result for one_round in rounds for result in one_round if result is not missing]


def check_equal(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raises ValueError that names the first process whose facts differ from rank 0's."""
    everyone = ranks.gather(dict(facts))
    for rank, theirs in enumerate(everyone):
        differing = [
            f"{name} {theirs.get(name)!r} instead of {value!r}"
            for name, value in everyone[0].items() if theirs.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{ranks.name(rank)} differs from {ranks.name(0)}: {', '.join(differing)}. All "
                f"processes need the same code, settings, weights and data"
            )


# --- one process ----------------------------------------------------------------------------------


class OneProcess:
    """A run in one process."""

    rank, size, local_rank, local_size, launch, is_main = 0, 1, 0, 1, "", True

    def __init__(self, num_restarts: int = 0) -> None:
        self.num_restarts = num_restarts

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def from_machine(self, value: Any) -> Any:
        return value

    def maximum(self, values: Tensor) -> Tensor:
        return values

    def vote(self, values: Sequence[int]) -> Callable[[], list[list[int]]]:
        return lambda: [list(values)]

    def summation(self, buffer: Tensor, num_parts: int) -> Summation:
        return _InPlace() if num_parts == 1 else _LocalSum(buffer)

    def machine_first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        pass

    def cause(self, error: BaseException) -> BaseException:
        return error

    def remember(self, folder: str) -> None:
        pass

    def remembered(self) -> str | None:
        return None

    def name(self, rank: int) -> str:
        return "this process"


class _InPlace:
    """The sum of one part, which is in the buffer already: nothing is copied."""

    def add(self) -> None:
        pass

    def finish(self) -> None:
        pass


class _LocalSum:
    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.total: Tensor | None = None

    def add(self) -> None:
        if self.total is None:
            self.total = self.buffer.clone()
        else:
            self.total += self.buffer
        self.buffer.zero_()

    def finish(self) -> None:
        if self.total is not None:
            self.buffer.copy_(self.total)


# --- many processes -------------------------------------------------------------------------------


@contextmanager
def open_ranks(environ: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The processes that torchrun has started, or one process.

    When the context ends in one of them, by an error too, it ends in all. Those other than rank 0
    print nothing within it, and nothing more after an error. Raises ValueError if the processes do
    not come together.
    """
    env = _environment_of(environ)
    if "TORCHELASTIC_RUN_ID" in environ:
        _end_with_launcher(os.getppid())
    if env is None:
        yield OneProcess(int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        return
    streams = _Muted(sys.stdout), _Muted(sys.stderr)
    ranks = ManyProcesses(env, streams)
    if env.rank:
        sys.stdout, sys.stderr = streams
    try:
        yield ranks
        ranks.leave()
    except BaseException as received:
        _ignore_sigterm_of_torchrun()
        error = ranks.cause(received)
        ranks.leave(error)
        if not _is_reported(error):  # it has a traceback, which only this process knows
            sys.stderr = streams[1].stream
        raise error
    sys.stdout, sys.stderr = (stream.stream for stream in streams)


def _ignore_sigterm_of_torchrun() -> None:
    """Report a failure to the end: torchrun signals all processes as soon as it sees one end."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Muted:
    """A stream that drops what is written to it, until it `is_open`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.is_open = False

    def write(self, text: str) -> int:
        return self.stream.write(text) if self.is_open else len(text)

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# What `cli.reported_errors` turns into a message.
_REPORTED = (
    ValueError, OSError, TrainingStopped, LoadingStopped, Interrupted, SystemExit, KeyboardInterrupt
)


def _is_reported(error: BaseException) -> bool:
    return isinstance(error, _REPORTED) or type(error).__name__ == "OutOfMemoryError"


class _Environment(NamedTuple):
    """What torchrun tells a process through its environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    num_restarts: int  # that this machine's launcher has counted
    has_agent_store: bool  # of torchrun; otherwise rank 0 has it

    @property
    def is_host(self) -> bool:
        """Whether the store is this process'."""
        return self.rank == 0 and not self.has_agent_store


def _environment_of(environ: Mapping[str, str]) -> _Environment | None:
    """The environment of a launch of several processes; None for a single process.

    Raises ValueError if the launch is described only in part.
    """
    size = environ.get("WORLD_SIZE") or "1"
    if size == "1":
        return None
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    missing = [name for name in names if not environ.get(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"WORLD_SIZE is {size!r}, but {', '.join(missing)} {verb} not set: start the processes "
            f"with torchrun --nproc_per_node {size} -m ..., or unset WORLD_SIZE to use one process"
        )
    numbers = {name: environ[name] for name in names if name != "MASTER_ADDR"}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise ValueError(f"{name} is {value!r}; expected a number, which torchrun sets")
    rank, number, local_rank, local_size, port = map(int, numbers.values())
    if not (rank < number and local_rank < local_size <= number):
        raise ValueError(
            f"RANK {rank} of WORLD_SIZE {number} with LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
            f"{local_size} is not possible: start the processes with torchrun, which sets them"
        )
    return _Environment(
        rank, number, local_rank, local_size, environ["MASTER_ADDR"], port,
        num_restarts=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


class _Status(NamedTuple):
    """What a process posts about itself.

    machine: text that only processes which see each other's `pid` share.
    failure: why it has ended; None while it goes on, and after a good end.
    signal: the number of the signal that has ended it, or 0.
    """

    host: str
    machine: str
    pid: int
    num_restarts: int
    beat: int = 0
    failure: str | None = None
    signal: int = 0
    is_usage_error: bool = False
    has_left: bool = False
    warnings: Sequence[str] = ()


def _status(text: bytes) -> _Status:
    """A posted status; that of another version may have other fields."""
    values = json.loads(text)
    return _Status(**{name: values[name] for name in _Status._fields if name in values})


class ManyProcesses:
    """A run in several processes, which a launcher such as torchrun has started.

    torch.distributed would wait for a lost process for many minutes. So every wait is ours: it
    reads the others' status twice a second.
    """

    def __init__(self, env: _Environment, streams: Sequence[_Muted]) -> None:
        self.rank, self.size = env.rank, env.size
        self.local_rank, self.local_size = env.local_rank, env.local_size
        self._main = 0
        self._streams = streams
        self._launcher = os.getppid()
        self._num_turns = 0
        self._patience = _PATIENCE
        self._found: BaseException | None = None  # what `check` has raised
        self._has_store = True
        self._orphan_s = float("inf")  # the time when the store was found to be gone
        self._lock = threading.Lock()  # guards _status
        self._status = _Status(
            socket.gethostname(), _machine(), os.getpid(), env.num_restarts
        )
        self._others = [self._status] * self.size  # until all have posted theirs
        self._end = threading.Event()
        self._is_host = env.is_host
        self._launcher_store: Any = _connect(env)
        self.launch = self._meet()
        self._seen_s = [time.monotonic()] * self.size
        self._checked_s = time.monotonic()
        self.num_restarts = max(status.num_restarts for status in self._others)
        self._warnings = _Warnings(self)
        logging.getLogger("lora_engine").addHandler(self._warnings)
        threading.Thread(target=self._keep_posting, name="ranks", daemon=True).start()
        self._start_groups(env)

    @property
    def is_main(self) -> bool:
        return self.rank == self._main

    def name(self, rank: int) -> str:
        return f"rank {rank} (on {self._others[rank].host})"

    # --- exchange --------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        import torch

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [size for (size,) in self.vote([len(data)])()]
        padded = data.new_zeros(max(sizes))
        padded[: len(data)] = data
        parts = self._all_gather(padded)()
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes)]

    def from_machine(self, value: Any) -> Any:
        return self.gather(value)[self.rank - self.local_rank]

    def maximum(self, values: Tensor) -> Tensor:
        import torch.distributed as dist

        largest = values.clone()
        self.started(lambda: dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True))()
        return largest

    def vote(self, values: Sequence[int]) -> Callable[[], list[list[int]]]:
        import torch

        wait = self._all_gather(torch.tensor(values, dtype=torch.int64))
        return lambda: [part.tolist() for part in wait()]

    def summation(self, buffer: Tensor, num_parts: int) -> Summation:
        self._patience = 1
        return _ExchangedSum(self, buffer, num_parts // self.size)

    def _all_gather(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        wait = self.started(lambda: dist.all_gather(parts, tensor, async_op=True))

        def result() -> list[Tensor]:
            wait()
            return parts

        return result

    def started(
        self, operation: Callable[[], Any], *, on_gpu: bool = False
    ) -> Callable[[], None]:
        """Start an asynchronous operation of torch.distributed -> a function that waits for it.

        A GPU is waited for too, although its stream could do that alone: so the step is whole, or
        nothing of it is queued, when another process is lost.
        """
        try:
            work = operation()
        except RuntimeError as error:
            self._explain(error)
        return lambda: self._wait(work, on_gpu)

    def _wait(self, work: Any, on_gpu: bool) -> None:
        try:
            while not self._is_done(work, on_gpu):
                self.check()
            if on_gpu:
                work.wait()
        except RuntimeError as error:
            if error is self._found:
                raise
            self._explain(error)

    def _is_done(self, work: Any, on_gpu: bool) -> bool:
        if on_gpu:  # with a timeout, `wait` would abort what is under way
            time.sleep(_GPU_POLL_S)
            return work.is_completed()
        try:
            work.wait(timedelta(seconds=_POLL_S))
        except RuntimeError:
            if work.is_completed():
                raise
            return False
        return True

    def machine_first(self) -> AbstractContextManager[None]:
        return self._in_turn()

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        self._num_turns += 1
        key = f"turn/{self.rank - self.local_rank}/{self._num_turns}"
        while self.local_rank and not self._with_store(lambda store: store.check([key])):
            time.sleep(0.02)
            self.check()
        yield
        if not self.local_rank:
            self._with_store(lambda store: store.set(key, "done"))

    def remember(self, folder: str) -> None:
        self._launcher_store.set("lora_engine/run", folder)

    def remembered(self) -> str | None:
        if not self._launcher_store.check(["lora_engine/run"]):
            return None
        return self._launcher_store.get("lora_engine/run").decode()

    # --- status ----------------------------------------------------------------------------------

    def check(self) -> None:
        now = time.monotonic()
        if now - self._checked_s < _POLL_S / 2:
            return
        self._checked_s = now
        before, self._others = self._others, self._read_all()
        is_orphan = self._is_orphan()
        if is_orphan:
            self._orphan_s = min(self._orphan_s, now)
            if now - self._orphan_s > _ORPHAN_S:  # they have left: nobody can say so any more
                self._raise(Interrupted(signal.SIGTERM))
            if os.getppid() != self._launcher:
                return
        lost = {}
        for rank, status in enumerate(self._others):
            if status.has_left and status.failure is None or rank == self.rank:
                continue
            if status.failure is not None:
                self._raise(_error_of(self.name(rank), status))
            if status.beat != before[rank].beat or is_orphan:
                self._seen_s[rank] = now
            elif now - self._seen_s[rank] > (limit_s := HUNG_S * self._patience):
                lost[rank] = f"has not responded for {limit_s:.0f} s: it hangs, or was stopped"
                if self._is_near(status):
                    with suppress(OSError):  # torchrun would wait another 30 s for it
                        os.kill(status.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            if self._is_near(status) and not _exists(status.pid):
                lost[rank] = "is gone: it was killed, perhaps because memory ran out"
        if lost:
            if self._main in lost:
                self._take_over(lost)
            self._raise(TrainingStopped(
                "; ".join(f"{self.name(rank)} {what}" for rank, what in lost.items())
            ))

    def cause(self, error: BaseException) -> BaseException:
        if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            error = Interrupted(signal.SIGTERM)  # as which the others are to know it
        is_sigterm = isinstance(error, Interrupted) and error.number == signal.SIGTERM
        if is_sigterm and error is not self._found:
            self._checked_s = 0.0
            try:
                self.check()
            except (TrainingStopped, ValueError) as reason:
                return reason
            except Interrupted:
                pass
        return error

    def _is_orphan(self) -> bool:
        """Whether the store is gone, because the launcher has been killed."""
        is_gone = os.getppid() != self._launcher and self._is_near(self._others[0])
        return is_gone or not self._has_store

    def _raise(self, error: BaseException) -> NoReturn:
        self._found = self._found or error
        raise self._found

    def _take_over(self, lost: Mapping[int, str]) -> None:
        """The lowest rank that is left writes and reports from now on."""
        self._main = min(set(range(self.size)) - lost.keys())
        if self.is_main:
            for stream in self._streams:
                stream.is_open = True

    def _is_near(self, status: _Status) -> bool:
        return status.machine == self._status.machine

    def _explain(self, error: RuntimeError) -> NoReturn:
        """Raises the reason why an operation has failed, once the lost process is known."""
        end_s = time.monotonic() + HUNG_S + 2 * _BEAT_S
        while time.monotonic() < end_s:
            self.check()
            time.sleep(0.1)
        self._raise(TrainingStopped(f"the processes have lost each other: {one_line(error)}"))

    def warn(self, text: str) -> None:
        """Post a warning, which rank 0 shows."""
        self._post(warnings=(*self._status.warnings, text)[-_MAX_WARNINGS:])

    def _post(self, **changes: Any) -> None:
        """Change this process' status."""
        with self._lock:
            self._status = self._status._replace(**changes)
            text = json.dumps(self._status._asdict())
            self._with_store(lambda store: store.set(f"status/{self.rank}", text))

    def _with_store(self, operation: Callable[[Any], Any]) -> Any:
        """Use the store, unless it is gone; `_end_with_launcher` then ends this process."""
        if self._is_orphan():
            return None
        try:
            return operation(self._store)
        except RuntimeError:
            self._has_store = False  # torch would print a stack trace for each operation
            return None

    def _keep_posting(self) -> None:
        while not self._end.wait(_BEAT_S):
            self._post(beat=self._status.beat + 1)
            if self.is_main:
                self._warnings.show(self._read_all())

    def _read_all(self) -> list[_Status]:
        keys = [f"status/{rank}" for rank in range(self.size)]
        texts = self._with_store(lambda store: store.multi_get(keys))
        if texts is None:
            return self._others
        return [_status(text) for text in texts]

    # --- begin and end ---------------------------------------------------------------------------

    def _meet(self) -> str:
        """Wait for the other processes of this launch -> its name, chosen by rank 0.

        The store may be that of earlier launches, and launchers may count their restarts
        differently. So rank 0 answers what it finds of each process, until all have found the
        answer to what they sent in this launch.
        """
        mine, launch = uuid.uuid4().hex, None
        store, end_s = self._launcher_store, time.monotonic() + JOIN_S
        store.set(f"lora_engine/hello/{self.rank}", mine)
        statuses = [f"status/{rank}" for rank in range(self.size)]
        while launch is None or not self._store.check(statuses):
            if self.rank == 0:
                greetings = {
                    str(rank): store.get(key).decode()
                    for rank in range(self.size)
                    if store.check([key := f"lora_engine/hello/{rank}"])
                }
                store.set("lora_engine/welcome", json.dumps([mine, greetings]))
            if launch is None and store.check(["lora_engine/welcome"]):
                name, greetings = json.loads(store.get("lora_engine/welcome"))
                if greetings.get(str(self.rank)) == mine:
                    launch = name
                    self._store = _with_prefix(f"lora_engine/{launch}", store)
                    self._post()
            if time.monotonic() > end_s:
                self._miss(statuses if launch is not None else None)
            time.sleep(0.05)
        self._others = self._read_all()
        return launch

    def _miss(self, statuses: Sequence[str] | None) -> NoReturn:
        if statuses is None:
            raise ValueError(f"rank 0 has not started within {JOIN_S:.0f} s")
        missing = [rank for rank, key in enumerate(statuses) if not self._store.check([key])]
        raise ValueError(
            f"{self.size - len(missing)} of {self.size} processes have started within "
            f"{JOIN_S:.0f} s; missing: rank {', rank '.join(map(str, missing))}"
        )

    def _start_groups(self, env: _Environment) -> None:
        """Start torch.distributed, with a connection of its own to the store: while it waits there,
        that connection cannot post a beat."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            raise ValueError(
                "torch.distributed is initialized already; train() does that itself"
            )
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=_with_prefix(
                f"lora_engine/{self.launch}/groups",
                _connect(env._replace(has_agent_store=True), timeout_s=JOIN_S),
            ),
            rank=self.rank,
            world_size=self.size,
            timeout=_NO_LIMIT,
        )

    def leave(self, error: BaseException | None = None) -> None:
        """End this process' part: rank 0 first, because torchrun ends all when one has failed.

        Raises as `check` if rank 0 does not get to its end.
        """
        if error is not None and error is not self._found:
            self._post(
                failure=_failure_of(error),
                signal=error.number if isinstance(error, Interrupted) else 0,
                is_usage_error=isinstance(error, (ValueError, OSError)),
            )
        if self.is_main:
            self._warnings.show(self._read_all())
        while not self.is_main and not self._main_has_left():
            time.sleep(0.05)
        if self.is_main and not self._has_store:  # the others must still find this one alive
            time.sleep(_ORPHAN_S)
        logging.getLogger("lora_engine").removeHandler(self._warnings)
        self._end.set()
        self._post(has_left=True)  # the others wait for that of the main process
        end_s = time.monotonic() + 2 * _BEAT_S
        while self._is_host and time.monotonic() < end_s and not self._all_have_left():
            time.sleep(0.05)  # the store ends with this process
        if error is None:
            if self._found is not None:
                raise self._found
            import torch.distributed as dist

            dist.destroy_process_group()

    def _all_have_left(self) -> bool:
        return all(
            status.has_left or self._is_near(status) and not _exists(status.pid)
            for status in self._read_all()
        )

    def _main_has_left(self) -> bool:
        try:
            self.check()
        except (Exception, Interrupted):
            pass
        main = self._others[self._main]
        is_gone = self._is_near(main) and not _exists(main.pid)
        begin_s = min(self._seen_s[self._main], self._orphan_s)
        return main.has_left or is_gone or time.monotonic() - begin_s > 2 * HUNG_S


class _Warnings(logging.Handler):
    """Passes warnings of the package to rank 0, which shows each once."""

    def __init__(self, ranks: ManyProcesses) -> None:
        super().__init__(logging.WARNING)
        self.ranks = ranks
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.shown.add(text)
        if not self.ranks.is_main:
            self.ranks.warn(text)

    def show(self, statuses: Sequence[_Status]) -> None:
        for rank, status in enumerate(statuses):
            for text in status.warnings:
                if text not in self.shown and rank != self.ranks.rank:
                    self.shown.add(text)
                    logger.warning(f"{self.ranks.name(rank)}: {text}")


class _ExchangedSum:
    """Each process sums one slice of all parts, and the slices are gathered.

    With one part per process that is about twice the buffer on the network for each, however many
    they are; to gather all parts everywhere would be `size` times the buffer.
    """

    def __init__(self, ranks: ManyProcesses, buffer: Tensor, num_each: int) -> None:
        self.ranks = ranks
        self.buffer = buffer
        self.num_done = 0
        width = -(-buffer.numel() // ranks.size)
        self.parts = buffer.new_zeros(num_each, ranks.size * width)

    def add(self) -> None:
        self.parts[self.num_done, : self.buffer.numel()] = self.buffer
        self.num_done += 1
        self.buffer.zero_()

    def finish(self) -> None:
        import torch
        import torch.distributed as dist

        size, num_each = self.ranks.size, len(self.parts)
        mine = self.parts.view(num_each, size, -1).transpose(0, 1).contiguous()
        received = torch.empty_like(mine)  # (ranks, parts of each, width of a slice)
        on_gpu = mine.is_cuda
        self.ranks.started(lambda: dist.all_to_all_single(
            received.view(-1), mine.view(-1), async_op=True
        ), on_gpu=on_gpu)()
        total, *rest = received.view(size * num_each, -1)
        for part in rest:
            total += part
        gathered = torch.empty(size, len(total), dtype=total.dtype, device=total.device)
        self.ranks.started(
            lambda: dist.all_gather(list(gathered), total, async_op=True), on_gpu=on_gpu
        )()
        self.buffer.copy_(gathered.view(-1)[: self.buffer.numel()])


def _failure_of(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it has exited with status {error}"
    # A message for people says all; one of a library may be no more than a name.
    return one_line(error) if _is_reported(error) else f"{type(error).__name__}: {one_line(error)}"


def _error_of(name: str, status: _Status) -> BaseException:
    if status.signal:
        return Interrupted(status.signal)
    text = f"{name}: {status.failure}"
    return ValueError(text) if status.is_usage_error else TrainingStopped(text)


def _exists(pid: int) -> bool:
    if not hasattr(signal, "SIGKILL"):  # Windows, where os.kill ends a process whatever the signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end_with_launcher(launcher: int) -> None:
    """Send this process SIGTERM when its launcher, the process `launcher`, ends without doing so.

    (Linux can send a signal then, but it sends one for each thread of the launcher.)
    """
    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_BEAT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _machine() -> str:
    """Text that is the same in processes that see each other's process IDs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers have their own
    except OSError:  # not Linux
        return socket.gethostname()


def _connect(env: _Environment, timeout_s: float = _STORE_S) -> Any:
    """A connection to the store of a launch. Raises ValueError if it cannot be reached."""
    import torch.distributed as dist

    try:
        socket.getaddrinfo(env.address, env.port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR {env.address!r} cannot be resolved on {socket.gethostname()}: {error}; "
            f"give the name or the address of the machine of rank 0"
        ) from None
    if not env.is_host:
        _wait_for(env.address, env.port)
    try:
        store = dist.TCPStore(
            env.address,
            env.port,
            is_master=env.is_host,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
            multi_tenant=True,  # a script may train more than once
        )
    except RuntimeError as error:
        raise _unreachable(env.address, env.port, error) from None
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _wait_for(address: str, port: int) -> None:
    """Wait until someone listens there. (torch retries for longer, and prints a stack trace.)"""
    end_s = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise _unreachable(address, port, error) from None
            time.sleep(0.1)


def _unreachable(address: str, port: int, error: Exception) -> ValueError:
    return ValueError(
        f"{socket.gethostname()} cannot reach {address}:{port}, where rank 0 or torchrun should "
        f"listen (MASTER_ADDR, MASTER_PORT): {one_line(error)}"
    )


def _with_prefix(prefix: str, store: Any) -> Any:
    import torch.distributed as dist

    return dist.PrefixStore(prefix, store)
