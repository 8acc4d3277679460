"""Outputs of many texts computed chunk by chunk, and the way back of their gradient (GradCache).

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv 2101.06983):
the outputs are computed without a graph, the loss's gradient with respect to them is taken, and each chunk is
then computed once more, with a graph, to carry its part of that gradient to the weights. Memory follows the
chunk; the gradient is that of the whole batch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class ChunkedForward:
    """One forward pass over all texts. `outputs` (N, ...) are detached, in the order of the texts.

    forward(rows) gives the outputs of some texts; `chunks` are index arrays that cover all N. Before each
    chunk the generator is seeded from `seed` and the chunk's number: the second computation then has the
    dropout of the first, and a run that is taken up again has that of the undisturbed one. Without `cached`
    the graphs are kept.
    """

    def __init__(self, forward: Callable, chunks: list[np.ndarray], seed: tuple[int, ...], cached: bool):
        self.forward, self.chunks, self.seed, self.cached = forward, chunks, seed, cached
        with torch.set_grad_enabled(not cached):
            self.parts = [self._chunk(at) for at in range(len(chunks))]
        back = np.argsort(np.concatenate(chunks))
        outputs = torch.cat([part.detach() for part in self.parts])
        self.outputs = outputs[torch.from_numpy(back).to(outputs.device)].requires_grad_()
        if cached:
            self.parts = []

    def _chunk(self, at: int) -> Tensor:
        seed = seed_of(*self.seed, at)
        # torch.manual_seed takes 2.5 ms where there is no GPU: it keeps a stack trace for the one to come
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        return self.forward(self.chunks[at])

    def backward(self, gradient: Tensor, inputs: list[Tensor] | None = None) -> None:
        """Add to the weights' gradients (or to those of `inputs` alone) what `gradient` (N, ...) asks for."""
        for at, rows in enumerate(self.chunks):
            part = self._chunk(at) if self.cached else self.parts[at]
            wanted = gradient[torch.from_numpy(rows).to(gradient.device)]
            torch.autograd.backward(part, wanted, inputs=inputs)


def seed_of(*numbers: int) -> int:
    """Return one 63-bit seed for a tuple of numbers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    return (high << 32 | low) >> 1
