"""Forward passes in chunks whose backward passes run later, chunk by chunk (GradCache).

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983):
the outputs are computed without a graph, the loss is differentiated with respect to them, and each chunk is
then recomputed with a graph to back-propagate its part of that gradient. Memory depends on the
chunk size; the gradient equals that of the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_src.models.tokenization import TokenTable, length_sorted_batches
from torch_src.runtime.devices import autocast, tensors_to

# Padded [input ids, attention mask(, segment ids)], each (B, L) int64, to outputs (B, ...).
Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class Chunking:
    """How a batch is split into forward passes: chunks of texts of similar length."""

    texts: int  # in a chunk, at most, recomputed in the backward pass (GradCache); 0: keep all graphs
    tokens: int  # padded tokens in a chunk, at most
    seed: int
    device: torch.device
    precision: str
    rank: int = 0  # each process draws its own dropout

    def __str__(self) -> str:
        if self.texts:
            return f"GradCache: chunks of at most {self.texts:,} texts and {self.tokens:,} tokens"
        return f"at most {self.tokens:,} tokens a forward pass; all activations of a batch are kept"

    def scaled(self, fraction: float, batch_texts: int) -> "Chunking":
        """Return GradCache with chunks of this fraction of the size; 0 texts where less than one is left."""
        texts = self.texts or batch_texts
        return replace(self, texts=int(texts * fraction), tokens=int(self.tokens * fraction))

    @property
    def options(self) -> str:
        """The options for such chunks."""
        return f"--grad_cache_chunk {max(1, self.texts)} --tokens_per_batch {max(1, self.tokens)}"

    def run(
        self, forward: Forward, tokens: TokenTable, pad_id: int, place: tuple[int, ...]
    ) -> "ChunkedForward":
        """Run forward(*padded tensors) over all texts; `place` (epoch, step, ...) seeds the dropout."""
        chunks = length_sorted_batches(tokens.lengths, self.texts or len(tokens), self.tokens)
        on_device = DeviceTokens(tokens, np.concatenate(chunks), pad_id, self.device)
        seed = (self.seed, *map(int, place), self.rank)
        return ChunkedForward(self, forward, on_device, [len(rows) for rows in chunks], seed)


class DeviceTokens:
    """A TokenTable on a device with its texts in another order, for chunks of neighbors in that order.

    All arrays are copied in one transfer. No method waits for a GPU.
    """

    def __init__(self, table: TokenTable, order: np.ndarray, pad_id: int, device: torch.device):
        """order: (N,), the row at each position."""
        self.pad_id, self.lengths = pad_id, table.lengths[order]
        arrays = [table.ids, table.starts[order], self.lengths, order, np.argsort(order)]
        arrays += [] if table.types is None else [table.types]
        (packed,) = tensors_to(device, np.concatenate([array.astype(np.int64) for array in arrays]))
        self.ids, self.starts, self.counts, self.order, self.inverse_order, *self.types = packed.split(
            [len(array) for array in arrays]
        )

    def padded(self, first: int, last: int) -> list[Tensor]:
        """Return [input ids, attention mask(, segment ids)], each (B, L) int64, of positions first:last."""
        columns = torch.arange(int(self.lengths[first:last].max()), device=self.ids.device)
        padding = columns >= self.counts[first:last, None]
        at = (self.starts[first:last, None] + columns).masked_fill_(padding, 0)
        input_ids = self.ids[at].masked_fill_(padding, self.pad_id)
        types = [types[at].masked_fill_(padding, 0) for types in self.types]
        return [input_ids, (~padding).long(), *types]


class ChunkedForward:
    """One forward pass over all texts. `outputs` (N, ...) is a leaf tensor in the order of the texts.

    After loss.backward(), backward() adds to the gradients of the weights. Before each chunk the generators
    are seeded from `seed` and the chunk's number, so that the recomputation and a resumed run draw the same
    dropout. Without GradCache the graphs are kept instead of recomputed.

    autocast keeps its 16-bit copies of the weights until the outermost context ends. So all chunks share one
    context, in which each weight is cast once. The recomputation has a context of its own, because copies
    made without a graph pass no gradient to the weights.
    """

    def __init__(
        self,
        chunking: Chunking,
        forward: Forward,
        tokens: DeviceTokens,
        sizes: list[int],
        seed: tuple[int, ...],
    ):
        self.chunking, self.forward, self.tokens = chunking, forward, tokens
        self.cached = bool(chunking.texts)
        ends = np.cumsum(sizes).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))  # of the chunks, in the order of `tokens`
        self.seeds = [seed_of(*seed, at) for at in range(len(sizes))]
        with autocast(chunking.device, chunking.precision), torch.set_grad_enabled(not self.cached):
            found = [self._run(at) for at in range(len(sizes))]
        self.graphs = [] if self.cached else found
        self.outputs = torch.cat([output.detach() for output in found])[
            self.tokens.inverse_order
        ].requires_grad_()

    def _run(self, at: int) -> Tensor:
        # torch.manual_seed takes 2.5 ms without a GPU (it keeps a stack trace): seed the generators directly.
        torch.default_generator.manual_seed(self.seeds[at])
        if torch.cuda.is_available():
            torch.cuda.manual_seed(self.seeds[at])
        return self.forward(*self.tokens.padded(*self.spans[at]))

    def backward(self, inputs: list[Tensor] | None = None) -> None:
        """Back-propagate the gradient of `outputs` into the weights, or into `inputs` alone."""
        assert self.outputs.grad is not None, "the loss was not differentiated"
        device, gradient = self.chunking.device, self.outputs.grad[self.tokens.order]
        with autocast(device, self.chunking.precision):
            for at, (first, last) in enumerate(self.spans):
                output = self._run(at) if self.cached else self.graphs[at]
                # the backward pass computes in the types of the forward pass
                with torch.autocast(device.type, enabled=False):
                    torch.autograd.backward(output, gradient[first:last], inputs=inputs)


def seed_of(*numbers: int) -> int:
    """Return a 63-bit seed for a tuple of numbers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1
