"""CUDA graphs: the kernels of a function are recorded once per shape, then launched together.

A training step of these models is some thousand small kernels; launching them one by one takes
longer than running them.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.terminal import one_line

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 64  # each keeps the activations of its shape; further shapes run as they are


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CudaGraphs:
    """Calls functions of tensors on a GPU, as graphs from the second call with a shape on.

    A function takes tensors, returns one, and may change only tensors that stay where they are in
    memory, such as flat gradients and moments. `changed` lists these, so that recording can restore
    them. Graphs share their memory: a call is over before the next one begins. Dropout draws from
    the global generator as it does without a graph.

    If recording fails, the reason is logged and functions run without graphs from then on.
    """

    def __init__(self, changed: Callable[[], Sequence[Tensor]]) -> None:
        self.changed = changed
        self._pool: Any = None  # the memory that all graphs share
        self._recorded: dict[tuple, _Recorded] = {}
        self._seen: set[tuple] = set()
        self._works = True

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs), by the graph for its name and these shapes, if there is one."""
        key = (function.__name__, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._recorded and not self._record(key, function, inputs):
            return function(*inputs)
        graph, kept, output = self._recorded[key]
        for static, tensor in zip(kept, inputs):
            static.copy_(tensor, non_blocking=True)
        graph.replay()
        return output.clone()  # the next replay writes to the same place

    def clear(self) -> None:
        """Discard all graphs and their memory."""
        self._recorded.clear()
        self._pool = None

    def _record(
        self, key: tuple, function: Callable[..., Tensor], inputs: Sequence[Tensor]
    ) -> bool:
        # The first call with a shape runs without a graph: lazy initialization happens then, and a
        # shape that occurs once is not worth the memory.
        is_first = key not in self._seen
        self._seen.add(key)
        if is_first or not self._works or len(self._recorded) >= _MAX_GRAPHS:
            return False
        try:
            self._recorded[key] = self._run_and_record(function, inputs)
        except Exception as error:  # torch's many reasons why something cannot be recorded
            self._works = False
            logger.warning(
                f"CUDA graphs do not work here ({one_line(error)}): training without them"
            )
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
