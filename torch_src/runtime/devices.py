"""Device, precision, threads and memory, for training and inference on CPU and CUDA."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from torch_src.runtime.errors import UserError

MAX_WORKERS = 16
USABLE_FRACTION = 0.9  # of free memory, on a CPU or a GPU; the rest is for libraries and gaps between blocks
TEXTS_PER_WORKER = 4096  # fewer are tokenized by a thread: a process takes a tenth of a second to start


def choose_device(name: str) -> torch.device:
    """Return the device; UserError when it is not available. Under torchrun `cuda` is `cuda:LOCAL_RANK`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.getenv("LOCAL_RANK")
    if name == "cuda" and local is not None and torch.cuda.is_available():
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device (a CPU build of torch, or no driver)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: only {torch.cuda.device_count()} CUDA devices are visible")
    if device.type == "cuda":
        # the default of calls without a device: seeds, synchronization, NCCL buffers
        torch.cuda.set_device(device.index or 0)
        # torch may prefer cuDNN's attention, which takes about 30 ms to plan for a shape that is new, as
        # nearly all of ours are
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def search_devices(name: str, device: torch.device) -> list[torch.device]:
    """Return the devices to search on: all GPUs for `auto` or `cuda` on a GPU machine, else `device`."""
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def token_budget(requested: int, device: torch.device) -> int:
    """Return the padded tokens per forward pass: `requested`, or for 0 the default of the device."""
    if requested:
        return requested
    if device.type == "cuda":
        return 32768
    # Activations should fit into the caches: 4,096 was the fastest of 2,048 to 16,384 for inference.
    return 4096


def worker_count(requested: int, device: torch.device, texts: int) -> int:
    """Return the number of processes that tokenize `texts` texts: `requested`, or for -1 the default.

    0 on a CPU, whose cores the model needs; on CUDA three quarters of the processors, fewer for few texts.
    """
    if requested >= 0:
        return requested
    if device.type != "cuda":
        return 0
    processors = (os.cpu_count() or 1) // int(os.getenv("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_WORKERS, max(1, 3 * processors // 4), texts // TEXTS_PER_WORKER)


def tensors_to(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Return the arrays as tensors on `device`; on CUDA asynchronously, through pinned memory."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return tensors


def choose_precision(name: str, device: torch.device) -> str:
    """Return bf16, fp16 or fp32: `name`, or for `auto` the fastest with hardware support."""
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: slow on a CPU (expected bf16 or fp32)")
    return name


def _cpu_has_bf16() -> bool:
    # Emulated bf16 is slower than fp32. Only Linux lists the instructions.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which a model runs; weights stay fp32, scores and losses are cast to fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Return half-precision values as fp32, all others unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


# glibc's malloc options (malloc.h): use the heap for large blocks too (older versions refuse more than
# 32 MiB), and return and request memory in large units.
MMAP_THRESHOLD, MMAP_LIMITS = -3, (1 << 30, 32 << 20)
MALLOC_OPTIONS = ((-1, 2**31 - 1), (-2, 64 << 20))


def keep_freed_memory() -> bool:
    """Make malloc reuse the memory of freed tensors; return whether this C library supports it.

    By default glibc returns large blocks to the system. New ones cost a page fault per 4 KB, a fifth of the
    encoding time on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # not glibc
    if not any(mallopt(MMAP_THRESHOLD, limit) == 1 for limit in MMAP_LIMITS):
        return False  # the other options alone would be slower
    return all([mallopt(option, value) == 1 for option, value in MALLOC_OPTIONS])


def set_threads(threads: int) -> int:
    """Set the number of CPU threads of this process and return it.

    0: torch's default; under torchrun an even share of the machine's processors instead of torchrun's 1.
    """
    keep_freed_memory()
    local_processes = int(os.getenv("LOCAL_WORLD_SIZE", "1"))
    if not threads and local_processes > 1:
        threads = max(1, (os.cpu_count() or 1) // local_processes)
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def make_deterministic(device: torch.device) -> None:
    """Use deterministic operations; UserError without cuBLAS's variable on CUDA.

    An operation that has no deterministic form is then an error on CUDA (`nondeterministic_operation`).
    """
    if device.type == "cuda" and not os.getenv("CUBLAS_WORKSPACE_CONFIG"):
        raise UserError("--deterministic: put CUBLAS_WORKSPACE_CONFIG=:4096:8 in front of the command")
    # with warn_only torch leaves the backward pass of its memory-efficient attention nondeterministic
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cuda")


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak in 10^9 bytes: of GPU memory on CUDA, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory() -> int:
    """Return the available bytes of memory, within the limit of a container."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free  # no container, or no limit ("max")


def free_gpu_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are free or already reserved by this process."""
    free, total = torch.cuda.mem_get_info(device)
    # by its index, not the device, which may have none
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)
    return min(free + torch.cuda.memory_reserved(device), int(fraction * total))


def available_gpu_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that new tensors of this process can take."""
    return free_gpu_memory(device) - torch.cuda.memory_allocated(device)
