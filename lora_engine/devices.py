"""Device and compute dtype: which are used, and how much memory they have."""

import ctypes
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(
    name: str | None, *, local_rank: int = 0, local_size: int = 1
) -> torch.device:
    """The device of that name; for None CUDA if available, else the CPU.

    A GPU has its number: of several processes on a machine each has the GPU of its `local_rank`,
    one alone torch's current one if the name has none. Raises ValueError for an unknown name, and
    for a device that does not exist.
    """
    device = _named_device(name)
    if device.type != "cuda":
        return device
    if local_size == 1:
        return torch.device("cuda", _number(device))
    if device.index is not None:
        raise ValueError(
            f"--device {name} is one GPU for {local_size} processes; give --device cuda: each "
            f"process takes the GPU of its number"
        )
    if torch.cuda.device_count() < local_size:
        raise ValueError(
            f"{local_size} processes need as many GPUs, but this machine has "
            f"{torch.cuda.device_count()}: lower torchrun's --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def _named_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        what = _OTHER_DEVICES.get(str(name).split(":")[0].lower(), "is unknown")
        raise ValueError(f"--device {name} {what}; {_existing_devices()}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} finds no CUDA device; "
            f"{_existing_devices()}"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


_OTHER_DEVICES = {
    "mps": "(Apple's GPU) is not supported",
    "xpu": "(Intel's GPU) is not supported",
    "xla": "(a TPU) is not supported",
    "tpu": "is not supported",
    "gpu": "is cuda here",
    "rocm": "is cuda here",
}


def _existing_devices() -> str:
    numbers = range(torch.cuda.device_count())
    return f"this machine has {', '.join(['cpu', *(f'cuda:{number}' for number in numbers)])}"


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def use_device(device: torch.device) -> None:
    """Make a GPU torch's current one, for all that does not name a device, such as streams, events
    and libraries' workspaces; set it up.

    Attention by cuDNN, torch's first choice, is switched off: it plans anew for each shape, and its
    results are not reproducible.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernels(dtype: torch.dtype) -> str:
    """The kernels for attention that torch chooses from on a GPU, the first that applies."""
    kinds = {
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled() and dtype != torch.float32,
        "flash": torch.backends.cuda.flash_sdp_enabled() and dtype != torch.float32,
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    return ", ".join(kind for kind, is_used in kinds.items() if is_used)


def index_on(device: torch.device, numbers: list[int]) -> Tensor:
    """Numbers as an index tensor on a device; a copy to a GPU does not wait for it."""
    index = torch.tensor(numbers, dtype=torch.long, pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype of `precision`; "auto" is bf16 (else fp16) on CUDA, fp32 elsewhere."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        # From Ampere on; older cards would emulate bf16.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return PRECISIONS[precision]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """torch.autocast to `dtype`; for fp32 a context that does nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def disable_tf32() -> None:
    """Compute fp32 in full precision: torch allows TF32 for convolutions by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def processor_supports(feature: str) -> bool:
    """Whether the processor has instructions for matrix products in bf16 or int8; for "amx",
    whether they multiply whole tiles, as Intel's AMX does in both."""
    names = {"bf16": ("avx512_bf16", "amx_tile"), "int8": ("vnni",), "amx": ("amx_tile",)}[feature]
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in names)


def num_processors() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def set_threads(asked: int | None, local_size: int) -> None:
    """Set torch's threads for a CPU: `asked`, or with several processes on a machine a share each.

    torchrun sets OMP_NUM_THREADS to 1 where it is not set; that is not taken for a wish.
    """
    given = os.environ.get("OMP_NUM_THREADS", "1")
    if asked is None and local_size > 1 and given == "1":
        asked = max(num_processors() // local_size, 1)
        if asked > 1:
            logger.info(
                f"OMP_NUM_THREADS=1, torchrun's default, is not used: {local_size} processes share "
                f"{num_processors()} processors, {asked} threads each (--num_threads)"
            )
    if asked is not None:
        torch.set_num_threads(asked)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    num_threads = torch.get_num_threads()
    return f"{device} ({num_threads} thread{'s' if num_threads > 1 else ''})"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory so far: of tensors on a GPU, of this process on the CPU; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or the memory that this process may still use on the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_unused_memory_bytes()]
    try:  # MemAvailable includes the page cache, which Linux frees on demand
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")  # a container's limit
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # not Linux, no such group, or no limit ("max")
        pass
    return max(min(free), 0)


def _unused_memory_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except ValueError:  # macOS tells only the total; half of it is a cautious guess
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except AttributeError:  # Windows
        # MEMORYSTATUSEX: two 32-bit numbers, of which the first is its size, then seven of 64 bits,
        # of which the second is the physical memory that is available.
        status = (ctypes.c_uint64 * 8)(64)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)  # type: ignore[attr-defined]
        return status[2]
