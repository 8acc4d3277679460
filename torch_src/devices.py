"""Device, precision and threads: chosen once, the same for training and inference, CPU and CUDA."""

import ctypes
import resource
import sys
from contextlib import nullcontext

import torch

from torch_src.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:N`; UserError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    return device


def search_devices(device: torch.device) -> list[torch.device]:
    """Return what the search runs on: every GPU when `device` is CUDA without a number, else `device`."""
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def choose_precision(name: str, device: torch.device) -> str:
    """Return bf16, fp16 or fp32: what was asked, or for `auto` the fastest that the device does well."""
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: no fast kernels for it on a CPU; use bf16 or fp32")
    return name


def _cpu_has_bf16() -> bool:
    # Without the instructions bf16 is emulated and slower than fp32. Known by the kernel's list alone
    # (Linux).
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, precision: str):
    """Return the context in which a model runs; weights stay fp32, scores and losses are taken to fp32 by
    hand.
    """
    if precision == "fp32":
        return nullcontext()
    # The weight cache of autocast would hold casts over a whole step of many chunks: it saves time, so it
    # stays on.
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


# glibc's malloc options (malloc.h): give memory back to the system late, take it in large pieces, and use the
# heap also for large blocks.
MALLOC_OPTIONS = ((-1, 2**31 - 1), (-2, 64 << 20), (-3, 1 << 30))


def keep_freed_memory() -> bool:
    """Keep what tensors free for the next ones of this process; return whether this C library does so.

    By default glibc returns every large block to the system, and each new one costs a page fault every 4 KB:
    measured on a CPU, a fifth of the encoding time. The peak memory stays the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # not glibc
    return all([mallopt(option, value) == 1 for option, value in MALLOC_OPTIONS])


def set_threads(threads: int) -> int:
    """Set the CPU threads of this process (0: what torch chooses) and return the number in force."""
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak so far in 10^9 bytes: of the GPU's memory on CUDA, else of this process's resident
    memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
