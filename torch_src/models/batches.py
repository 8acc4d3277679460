"""Batches of one forward pass at inference: like lengths together, cut by a token budget that gives way when
memory does not suffice.
"""

from collections.abc import Callable

import numpy as np
import torch

from torch_src.runtime.errors import UserError, is_out_of_memory
from torch_src.runtime.log import warn

LEAST_TOKENS = 512  # a token budget is not halved below this


class InBatches:
    """The loop over batches of whatever has these three: an encoder of texts, a scorer of pairs."""

    device: torch.device
    batch_size: int  # rows in one forward pass, at most
    tokens_per_batch: int  # padded tokens in one forward pass, at most; halved when memory does not suffice

    def for_each_batch(self, lengths: np.ndarray, forward: Callable[[np.ndarray], None]) -> None:
        """Call forward(rows) until every row has had its turn; `lengths`: token counts (N,).

        Rows of like length stand together, so that hardly a padded token is computed; longest first, so that
        a batch which does not fit fails in the first minute. A batch that the device has no memory for is
        tried again with half the budget; UserError when that would be too little for one row.
        """
        order, start = np.argsort(-lengths, kind="stable"), 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            rows = order[start : start + max(1, min(self.batch_size, self.tokens_per_batch // longest))]
            if _fits(forward, rows):
                start += len(rows)
            else:
                self._halve(longest)

    def _halve(self, longest: int) -> None:
        if self.tokens_per_batch // 2 < max(LEAST_TOKENS, longest):
            raise UserError(
                f"{self.device}: out of memory at {self.tokens_per_batch} tokens a forward pass, and no less "
                "is possible; use a smaller model or length, or free the device's memory"
            )
        self.tokens_per_batch //= 2
        warn(f"{self.device}: out of memory; tokens_per_batch halved to {self.tokens_per_batch}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _fits(forward: Callable[[np.ndarray], None], rows: np.ndarray) -> bool:
    """Call forward(rows); return whether memory sufficed. What it held is free again on return, as the error
    that refers to it is gone.
    """
    try:
        forward(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
