"""The processes that train together: torchrun's (gloo on a CPU, nccl on CUDA), or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import rank

# what gloo and NCCL say of a process that is gone
GONE = ("Connection closed", "onnection reset", "Broken pipe", "remote process exited")
PATIENCE = timedelta(
    hours=12
)  # the others wait for the first during a dev evaluation; torchrun ends them when it dies


@contextmanager
def _together() -> Iterator[None]:
    """A sum that fails since another process is gone is no fault of this one: UserError, no traceback."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in GONE):
            raise
        why = str(error).strip().split("\n")[0][:200]
        raise UserError(f"another process of this run has ended: its own message says why ({why})") from error


class ProcessGroup:
    """Sums and gathers over all processes; with one process everything is as it was."""

    def __init__(self, device: torch.device):
        """Join the processes that torchrun started, if it did."""
        self.rank, self.world, self.device = rank(), int(os.getenv("WORLD_SIZE", "1")), device
        self.joined = self.world > 1 and not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)

    def share(self, count: int) -> slice:
        """Return this process's share of `count` things: an even, contiguous part."""
        counts = self.counts(count)
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])

    def counts(self, count: int) -> list[int]:
        """Return how many of `count` things each process has."""
        return [count // self.world + (at < count % self.world) for at in range(self.world)]

    def gather(self, own: Tensor, count: int) -> Tensor:
        """Return the rows (count, ...) of all processes in the order of their shares; no gradient flows."""
        if self.world == 1:
            return own
        counts = self.counts(count)
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        with _together():
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum every parameter's gradient over all processes, by one all-reduce of one flat tensor."""
        if self.world == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.sum_(flat)
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def from_first_(self, tensor: Tensor) -> Tensor:
        """Give every process the first one's tensor, in place."""
        if self.world > 1:
            with _together():
                dist.broadcast(tensor, 0)
        return tensor

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.world > 1:
            self.sum_(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the group. Not after an error: the others may be within a sum, and NCCL would wait for them.

        A process that just ends is noticed by torchrun, which ends the others.
        """
        if self.joined:
            dist.destroy_process_group()
