"""CUDA graphs: the kernels of a function recorded once a shape, and launched at once ever after.

A training step of these models is some thousand small kernels; launching them one by one takes
longer than running them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.terminal import one_line

_MAX_GRAPHS = 64  # each keeps the activations of its shape; further shapes run as they are


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CudaGraphs:
    """Calls functions of tensors on a GPU, as graphs from the second time on that a shape comes.

    A function takes tensors, returns one, and may change only what lies still in memory: flat
    gradients, moments and such, which `changed` lists, so that recording leaves no trace in them.
    Graphs share their memory: a call is over before the next one begins. Dropout draws from the
    global generator as it does without a graph.

    What cannot be recorded runs as it is from then on; `say` is told why in a line.
    """

    def __init__(
        self, changed: Callable[[], Sequence[Tensor]], *, say: Callable[[str], None]
    ) -> None:
        self.changed = changed
        self.say = say
        self._pool: Any = None  # the memory that all graphs share
        self._recorded: dict[tuple, _Recorded] = {}
        self._seen: set[tuple] = set()
        self._works = True

    def __call__(self, function: Callable[..., Tensor], name: str, *inputs: Tensor) -> Tensor:
        """function(*inputs), by a graph where there is one for this name and these shapes."""
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._recorded and not self._record(key, function, inputs):
            return function(*inputs)
        graph, kept, output = self._recorded[key]
        for place, tensor in zip(kept, inputs):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return output.clone()  # the next replay writes to the same place

    def clear(self) -> None:
        """Give up all graphs, and with them their memory."""
        self._recorded.clear()
        self._pool = None

    def _record(
        self, key: tuple, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> bool:
        # A shape's first time runs as it is: whatever is set up lazily is set up then, and shapes
        # that come once are not worth their memory.
        is_first = key not in self._seen
        self._seen.add(key)
        if is_first or not self._works or len(self._recorded) >= _MAX_GRAPHS:
            return False
        try:
            self._recorded[key] = self._run_and_record(function, inputs)
        except Exception as error:  # torch's many reasons why something cannot be recorded
            self._works = False
            reason = one_line(error)
            self.say(f"CUDA graphs do not work here ({reason}): training without them")
        return key in self._recorded

    def _run_and_record(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> _Recorded:
        random_state = torch.cuda.get_rng_state()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        changed = list(self.changed())
        before = [tensor.clone() for tensor in changed]
        try:
            kept = [tensor.clone() for tensor in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*kept)  # libraries get their workspaces for this stream
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, which pin memory, go on meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                output = function(*kept)
            return _Recorded(graph, kept, output)
        finally:
            torch.cuda.synchronize()
            torch.cuda.set_rng_state(random_state)
            with torch.no_grad():
                for tensor, value in zip(changed, before):
                    tensor.copy_(value)
