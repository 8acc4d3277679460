"""A small GPU: a limit on the memory that this process may allocate."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def limited_memory(bytes_free: float) -> Iterator[None]:
    """Within, this process may allocate only `bytes_free` more bytes on the first GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allocated = torch.cuda.memory_reserved(0)
    torch.cuda.set_per_process_memory_fraction((allocated + bytes_free) / total, 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
