"""Forward passes in chunks whose backward passes run later, chunk by chunk (GradCache).

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983):
the outputs are computed without a graph, the loss is differentiated with respect to them, and each chunk is
then recomputed with a graph to back-propagate its part of that gradient. Memory depends on the
chunk size; the gradient equals that of the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_src.models.tokenization import length_sorted_batches


class Chunk:
    """The forward pass of some rows of a batch, and its backward pass once the loss is differentiated."""

    def __init__(self, forward: Callable[[np.ndarray], Tensor], rows: np.ndarray, seed: int, cached: bool):
        self.forward, self.rows, self.seed, self.cached = forward, rows, seed, cached
        with torch.set_grad_enabled(not cached):
            self.output = self._run()
        self.leaf: Tensor | None = None  # outputs of the whole batch, set by ChunkedForward

    def _run(self) -> Tensor:
        # torch.manual_seed takes 2.5 ms without a GPU (it keeps a stack trace): seed the generators directly.
        torch.default_generator.manual_seed(self.seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(self.seed)
        return self.forward(self.rows)

    def backward(self, inputs: list[Tensor] | None = None) -> None:
        """Back-propagate the gradient of the batch's outputs into the weights, or into `inputs` alone."""
        assert self.leaf is not None and self.leaf.grad is not None, "the loss was not differentiated"
        output = self._run() if self.cached else self.output
        gradient = self.leaf.grad[torch.from_numpy(self.rows).to(self.leaf.device)]
        torch.autograd.backward(output, gradient, inputs=inputs)


class ChunkedForward:
    """One forward pass over all rows. `outputs` (N, ...) is a leaf tensor in the order of the rows.

    After loss.backward(), backward() of each chunk in `deferred` adds to the gradients of the weights.

    forward(rows) returns the outputs of the given rows; `chunks` are index arrays that cover all N. Before
    each chunk the generators are seeded from `seed` and the chunk's number, so that the recomputation and a
    resumed run draw the same dropout. When not `cached`, the graphs are kept instead of recomputed.
    """

    def __init__(
        self,
        forward: Callable[[np.ndarray], Tensor],
        chunks: list[np.ndarray],
        seed: tuple[int, ...],
        cached: bool,
    ):
        self.deferred = [Chunk(forward, rows, seed_of(*seed, at), cached) for at, rows in enumerate(chunks)]
        outputs = torch.cat([chunk.output.detach() for chunk in self.deferred])
        order = np.argsort(np.concatenate(chunks))
        self.outputs = outputs[torch.from_numpy(order).to(outputs.device)].requires_grad_()
        for chunk in self.deferred:
            chunk.leaf = self.outputs


@dataclass(frozen=True)
class Chunking:
    """How a batch is split into forward passes: chunks of texts of similar length."""

    texts: int  # in a chunk, at most, recomputed in the backward pass (GradCache); 0: keep all graphs
    tokens: int  # padded tokens in a chunk, at most
    seed: int
    rank: int = 0  # each process draws its own dropout

    def run(
        self, forward: Callable[[np.ndarray], Tensor], lengths: Sequence[int], place: tuple[int, ...]
    ) -> ChunkedForward:
        """Run forward(rows) over texts of these lengths; `place` (epoch, step, ...) seeds the dropout."""
        chunks = length_sorted_batches(lengths, self.texts or len(lengths), self.tokens)
        seed = (self.seed, *map(int, place), self.rank)
        return ChunkedForward(forward, chunks, seed, cached=bool(self.texts))


def seed_of(*numbers: int) -> int:
    """Return a 63-bit seed for a tuple of numbers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1
