"""A stand-in for torch.cuda that captures what runs on the CPU, and fails on request.

torch's own `torch.cuda.graph` runs on it. As on a GPU, a capture changes nothing, what it computes
has no value before a replay, and a replay reads and writes the same memory as the capture did and
draws random numbers anew. Unlike there, all streams are one.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_engine.training.cuda_graphs import CudaGraphs
from lora_engine.training.trainer import Trainer

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"


def record_steps(trainer: Trainer) -> Trainer:
    """Let a trainer on the CPU use graphs."""
    trainer.graphs = CudaGraphs(
        trainer._changed_by_a_step, device=trainer.device, dtype=trainer.dtype
    )
    return trainer


class Stream:
    def __init__(self, cuda: "FakeCuda", device) -> None:
        self.cuda = cuda
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        self.cuda.waits.append((self, event))

    def record_event(self) -> "Event":
        event = Event(self.cuda)
        event.record(self)
        return event


class Event:
    def __init__(self, cuda: "FakeCuda", blocking: bool = False) -> None:
        self.cuda = cuda
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Without a stream: on the current device's, whichever that is."""
        self.stream = stream or self.cuda.other_device

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class FakeCuda:
    """Takes the place of torch.cuda's streams, events, graphs and generator in a test.

    `failures[n]` is how capture number n fails: "create", "begin", "middle" (an error that the
    capture survives), "invalid" (one that it does not survive), "end", "memory" (in the middle) or
    "upload" (memory, at the end). `loses_writes` makes replays wrong.
    """

    def __init__(self, monkeypatch) -> None:
        self.failures: dict[int, str] = {}
        self.loses_writes = False
        self.streams: list[Stream] = []
        self.captures: list[tuple[object, Stream]] = []  # pool and stream of each
        self.num_begun = 0
        self.num_replays = 0
        self.num_pools = 0
        self.waits: list[tuple[Stream, Event]] = []
        self.devices: set = set()  # that calls have named; None for torch's current one
        self.default = self.current = Stream(self, "default")
        self.other_device = Stream(self, "another device")
        for name in (
            "current_stream", "stream", "synchronize", "get_rng_state", "set_rng_state",
            "graph_pool_handle",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda **settings: Event(self, **settings))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)

    def new_stream(self, device=None) -> Stream:
        self.devices.add(device)
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    def current_stream(self, device=None) -> Stream:
        self.devices.add(device)
        return self.current

    def stream(self, stream: Stream | None) -> "_Current":
        return _Current(self, stream)

    def synchronize(self, device=None) -> None:
        pass  # torch.cuda.graph names no device

    def get_rng_state(self, device=None) -> torch.Tensor:
        self.devices.add(device)
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        self.devices.add(device)
        torch.set_rng_state(state)

    def graph_pool_handle(self) -> int:
        self.num_pools += 1
        return self.num_pools


class _Current:
    """A context in which a stream is the current one; without an exit it stays so."""

    def __init__(self, cuda: FakeCuda, stream: Stream | None) -> None:
        self.cuda = cuda
        self.stream = stream

    def __enter__(self) -> None:
        self.before = self.cuda.current
        self.cuda.current = self.stream or self.before

    def __exit__(self, *_) -> None:
        self.cuda.current = self.before


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.failure = cuda.failures.get(cuda.num_begun)
        cuda.num_begun += 1
        if self.failure == "create":
            raise RuntimeError("no graphs on this device")

    def capture_begin(self, pool, **_) -> None:
        if self.failure == "begin":
            raise RuntimeError(NOT_PERMITTED)
        self.cuda.captures.append((pool, self.cuda.current))
        self.random_state = torch.get_rng_state()
        self.recorder = _Recorder(self.failure)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        torch.set_rng_state(self.random_state)
        self.recorder.undo()
        if self.failure in ("invalid", "end"):
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        if self.failure == "upload":
            error = RuntimeError("CUDA error: out of memory")
            error.error_code = 2
            raise error

    @torch.no_grad()
    def replay(self) -> None:
        self.cuda.num_replays += 1
        for operator, args, kwargs, out in self.recorder.operations:
            is_write = _is_write(operator)
            if is_write and self.cuda.loses_writes:
                continue
            new = operator(*args, **kwargs)
            if not is_write:
                for ours, value in zip(_tensors(out), _tensors(new)):
                    if ours.data_ptr() != value.data_ptr():
                        ours.detach().copy_(value)


class _Recorder(TorchDispatchMode):
    """Remembers each operation with its operands, where they are in memory."""

    def __init__(self, failure: str | None) -> None:
        super().__init__()
        self.failure = failure
        self.operations: list[tuple] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:  # waits for the device
            raise RuntimeError(NOT_PERMITTED)
        if self.before:  # part of what is to change has been written
            if self.failure in ("middle", "invalid"):
                raise RuntimeError(NOT_PERMITTED)
            if self.failure == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        operands = {_storage(tensor): tensor for tensor in _tensors((args, kwargs))}
        if _is_write(operator):
            for key, tensor in operands.items():
                if key not in self.made and key not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[key] = whole, whole.clone()
        out = operator(*args, **kwargs)
        for tensor in _tensors(out):
            if _storage(tensor) not in operands:
                self.made[_storage(tensor)] = tensor.detach()
        self.operations.append((operator, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Nothing has run yet."""
        for tensor, before in self.before.values():
            tensor.copy_(before)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_write(operator) -> bool:
    return operator._schema.is_mutable
