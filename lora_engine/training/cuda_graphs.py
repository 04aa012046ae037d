"""CUDA graphs: the kernels of a function are recorded once per shape, then launched together.

A training step of these models is some thousand small kernels; launching them one by one takes
longer than running them.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.stopping import TrainingStopped
from lora_engine.terminal import one_line

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 64  # the driver keeps a copy of each one's launches; further shapes run as they are

# How far a replay may be from the same call without a graph: L2 distance over L2 norm. The kernels
# are the same; what may differ is the order of sums, which some leave to chance, so an accumulated
# rounding error. Other inputs, other dropout masks or a kernel left out change a gradient by far
# more than a hundredth.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class _Change(NamedTuple):
    """A tensor that a function changes, and its value before."""

    tensor: Tensor
    before: Tensor


class CudaGraphs:
    """Calls functions of tensors on a GPU, as graphs from the second call with a shape on.

    A function takes tensors, returns one, and may change only tensors that stay where they are in
    memory, such as flat gradients and moments. `changed` lists these, so that recording can restore
    them. Dropout draws from the device's generator as it does without a graph. `dtype` is that of
    the functions' matmuls.

    Memory: all graphs are recorded on one stream (torch's blocks of memory belong to streams) in
    one pool, and read their inputs from shared buffers, because a call is over before the next one
    begins. A graph recorded after a larger one takes little more: its tensors fit into the blocks
    of the larger one, the rest of which is split off. The other way round that fails for many
    blocks. So a shape that is larger than all before discards the other graphs, which are recorded
    again when their turn comes; with captions of a few lengths that happens a few times in a run.
    (A model of torch's allocator, with the tensors of BLIP's step at batch size 32 in 18 shapes of
    8 to 28 tokens, takes 1.09 times the memory of the largest shape; in random order, and without
    discarding, 1.07 to 1.26 times. What the driver keeps of a graph is not counted.)

    If recording fails, the reason is logged and functions run without graphs from then on. So do
    they if the first replay of a function does not compute what the function does. `problem` is the
    reason, None while graphs are used. Where torch
    could not begin or end a capture, its allocator still takes the stream to be captured, and
    nothing after that can be relied on: that raises TrainingStopped. In any case what a function
    changes is as before the call, and the random state, too.
    """

    def __init__(
        self,
        changed: Callable[[], Sequence[Tensor]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.changed = changed
        self.device = device
        self.tolerance = _TOLERANCES[dtype]
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # the memory that all graphs share
        self._buffers: dict[tuple, Tensor] = {}  # flat, by function, position and dtype
        self._largest = 0  # elements of a recorded graph's inputs
        self._recorded: dict[tuple, _Recorded] = {}
        self._seen: set[tuple] = set()
        self._given_up: set[tuple] = set()
        self._checked: set[str] = set()  # functions whose first replay was right
        self._is_exact = True
        self.problem: str | None = None

    def __call__(
        self, function: Callable[..., Tensor], *inputs: Tensor, or_plainly: bool = False
    ) -> Tensor:
        """function(*inputs), by the graph for its name and these shapes, if there is one.

        Raises torch.OutOfMemoryError if there is no memory to record it, so that the caller can try
        less at a time; with `or_plainly` it then runs without a graph. Raises TrainingStopped after
        a failure that torch does not recover from.
        """
        key = (function.__name__, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._recorded and not self._record(key, function, inputs, or_plainly):
            return function(*inputs)
        recorded = self._recorded[key]
        for static, tensor in zip(recorded.inputs, inputs):
            static.copy_(tensor, non_blocking=True)
        _launch(recorded.graph)
        return recorded.output.clone()  # the next replay writes to the same place

    def clear(self) -> None:
        """Discard all graphs and their memory; shapes that come again are recorded again."""
        self._discard()
        self._buffers.clear()
        self._given_up.clear()
        if self._is_exact:
            self.problem = None  # cuBLAS, too, fails without memory, but with another error

    def _discard(self) -> None:
        """Discard all graphs: their pool is freed with the last one."""
        if self._recorded:
            torch.cuda.synchronize(self.device)  # no replay is under way
        self._recorded.clear()
        self._largest = 0

    def _record(
        self,
        key: tuple,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        or_plainly: bool,
    ) -> bool:
        # The first call with a shape runs without a graph: lazy initialization happens then, and a
        # shape that occurs once is not worth the memory.
        is_first = key not in self._seen
        self._seen.add(key)
        is_off = self.problem is not None or key in self._given_up
        if is_first or is_off or len(self._recorded) >= _MAX_GRAPHS:
            return False
        size = sum(tensor.numel() for tensor in inputs)
        if size > self._largest:
            self._discard()
            self._largest = size
        try:
            self._recorded[key] = self._run_and_record(function, inputs)
        except torch.OutOfMemoryError:
            if not or_plainly:
                raise
            self._given_up.add(key)
        except TrainingStopped:
            raise
        except _Mismatch as error:
            self._is_exact = False
            self._discard()
            self.problem = f"a CUDA graph {error}"
            logger.warning(
                f"{self.problem}: training without graphs; please report this with the output of "
                f"`python -m lora_engine doctor --device cuda`"
            )
        except Exception as error:  # torch's many reasons why something cannot be recorded
            self.problem = f"CUDA graphs do not work here ({one_line(error)})"
            logger.warning(f"{self.problem}: training without them")
        return key in self._recorded

    def _run_and_record(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> _Recorded:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        static = self._static_inputs(function, inputs)
        with self._undone() as changes:
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                plain = function(*static)  # libraries get their workspaces for this stream
            current.wait_stream(self._stream)
            expected = [_finite(plain), *map(_added, changes)]
        with self._undone():
            graph, output = self._capture(function, static)
        if function.__name__ not in self._checked:
            with self._undone() as changes:
                _launch(graph)
                self._check(function, [_finite(output), *map(_added, changes)], expected)
        return _Recorded(graph, static, output)

    def _static_inputs(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """The inputs in memory that replays read, too: the beginning of a buffer for each position.

        A graph holds addresses. Graphs that were recorded before a buffer had to grow keep the old
        one; that is rare, as the largest shape discards the graphs of all others.
        """
        static = []
        for position, tensor in enumerate(inputs):
            place = function.__name__, position, tensor.dtype
            buffer = self._buffers.get(place)
            if buffer is None or buffer.numel() < tensor.numel():
                buffer = self._buffers[place] = tensor.new_empty(tensor.numel())
            static.append(buffer[: tensor.numel()].view(tensor.shape).copy_(tensor))
        return static

    def _capture(
        self, function: Callable[..., Tensor], static: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record function(*static) -> the graph, and its output, which has no value yet."""
        if not self._recorded:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(  # other threads, which pin memory, go on meanwhile
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        failed = None
        # `capture` leaves this stream current if it cannot begin or end.
        with torch.cuda.stream(self._stream):
            try:
                with capture:
                    try:
                        output = function(*static)
                    except Exception as error:  # raised below, where the capture has ended well
                        failed = error
            except Exception as error:
                _raise_if_out_of_memory(error)
                raise TrainingStopped(
                    f"recording a CUDA graph failed ({one_line(failed or error)}), after which "
                    f"torch can no longer be relied on: rerun the command with --no_cuda_graphs, "
                    f"and with --resume to continue"
                ) from failed or error
        try:
            if failed is not None:
                raise failed
        finally:
            del failed  # its traceback refers to this frame
        return graph, output

    def _check(
        self, function: Callable[..., Tensor], found: list[Tensor], expected: list[Tensor]
    ) -> None:
        """Raises _Mismatch if a replay has other results than the function had."""
        for ours, right in zip(found, expected):
            distance, norm = float((ours - right).norm()), float(right.norm())
            if distance > self.tolerance * norm:
                raise _Mismatch(
                    f"of {function.__name__.strip('_')} does not compute what its function does "
                    f"(relative distance {distance / (norm or 1.0):.2g})"
                )
        self._checked.add(function.__name__)

    @contextmanager
    def _undone(self) -> Iterator[list[_Change]]:
        """Within the context functions may run; after it all that they change is as before."""
        random_state = torch.cuda.get_rng_state(self.device)
        changed = [tensor.detach() for tensor in self.changed()]
        changes = [_Change(tensor, tensor.clone()) for tensor in changed]
        try:
            yield changes
        finally:
            torch.cuda.synchronize(self.device)
            torch.cuda.set_rng_state(random_state, self.device)
            for tensor, before in changes:
                tensor.copy_(before)


class _Mismatch(RuntimeError):
    """A replay whose results are not those of the function."""


def _added(change: _Change) -> Tensor:
    return _finite(change.tensor - change.before)


def _finite(tensor: Tensor) -> Tensor:
    """A copy in fp32, with 0 for what is not finite, as in a step that overflows."""
    return tensor.float().nan_to_num(0.0, 0.0, 0.0)


def _launch(graph: torch.cuda.CUDAGraph) -> None:
    """Replay; raises torch.OutOfMemoryError if there is no memory to upload the graph to."""
    try:
        graph.replay()
    except RuntimeError as error:
        _raise_if_out_of_memory(error)
        raise


def _raise_if_out_of_memory(error: Exception) -> None:
    """Raise CUDA's error as that of torch's allocator. (An allocation that fails leaves everything
    else as it is.)"""
    if getattr(error, "error_code", None) == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(str(error)) from error
