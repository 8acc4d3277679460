"""The processes that train together: those of torchrun (gloo on a CPU, NCCL on CUDA), or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_src.runtime.errors import UserError
from torch_src.runtime.log import rank

# How gloo and NCCL report that another process has ended.
PEER_ENDED = ("Connection closed", "onnection reset", "Broken pipe", "remote process exited")
# All work is shared, so processes wait only for slower reading at the start and for the first process while
# it writes weights or ranks the dev set: minutes at most, also on a slow disk.
TIMEOUT = timedelta(minutes=30)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Turn the error of a collective whose other process has ended into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in PEER_ENDED):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"another process of this run has ended ({reason}); see its own error") from error


class Processes:
    """Collectives over all processes of a run. With a single process each returns its input."""

    def __init__(self, device: torch.device):
        """Join the process group when torchrun started several processes."""
        self.rank, self.world, self.device = rank(), int(os.getenv("WORLD_SIZE", "1")), device
        self.joined = self.world > 1 and not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Return whether this process writes the files and the log."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return this process's contiguous shard of `count` items."""
        sizes = self._shard_sizes(count)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def _shard_sizes(self, count: int) -> list[int]:
        return [count // self.world + (at < count % self.world) for at in range(self.world)]

    def all_gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows (count, ...) of all processes in the order of their shards.

        Differentiable: the gradient of a row is its sum over all processes.
        """
        return rows if self.world == 1 else _AllGatherRows.apply(rows, count, self)

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; return it."""
        if self.world > 1:
            with _peer_errors():
                dist.all_reduce(tensor)
        return tensor

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest of the processes' values."""
        if self.world == 1:
            return value
        number = torch.tensor(value, device=self.device)
        with _peer_errors():
            dist.all_reduce(number, dist.ReduceOp.MIN)
        return int(number.item())

    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of all parameters over all processes, by one all-reduce of one flat tensor."""
        if self.world == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        self.all_reduce_sum_(flat)
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Copy the first process's tensor to all processes, in place; return it."""
        if self.world > 1:
            with _peer_errors():
                dist.broadcast(tensor, 0)
        return tensor

    def require_same(self, value: int, message: str) -> None:
        """UserError `message` when the first process has another value (an int64)."""
        if self.broadcast_(torch.tensor([value], device=self.device)).item() != value:
            raise UserError(message)

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.all_reduce_sum_(torch.zeros(1, device=self.device))

    def close(self) -> None:
        """Leave the process group. Do not call it after an error: NCCL would wait for the other processes.

        torchrun notices a process that ends with an error and ends the others.
        """
        if self.joined:
            dist.destroy_process_group()


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, processes: Processes) -> Tensor:
        ctx.count, ctx.processes = count, processes
        sizes = processes._shard_sizes(count)
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        shards = [torch.empty_like(padded) for _ in sizes]
        with _peer_errors():
            dist.all_gather(shards, padded)
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        summed = ctx.processes.all_reduce_sum_(gradient.clone(memory_format=torch.contiguous_format))
        return summed[ctx.processes.shard(ctx.count)], None, None
