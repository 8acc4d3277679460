"""The token ids of a batch on the device, where its chunks are padded."""

import numpy as np
import torch
from torch import Tensor

from torch_src.models.tokenization import TokenTable
from torch_src.runtime.devices import tensors_to


class DeviceTokens:
    """A TokenTable on a device with its texts in another order, for chunks of neighbors in that order.

    The arrays travel together, in one asynchronous copy. No method waits for a GPU.
    """

    def __init__(self, table: TokenTable, order: np.ndarray, pad_id: int, device: torch.device):
        """`order` (N,): row at each place."""
        self.pad_id, self.lengths = pad_id, table.lengths[order]
        arrays = [table.ids, table.starts[order], self.lengths, order, np.argsort(order)]
        arrays += [] if table.types is None else [table.types]
        (packed,) = tensors_to(device, np.concatenate([array.astype(np.int64) for array in arrays]))
        self.ids, self.starts, self.counts, self.order, self.places, *self.types = packed.split(
            [len(array) for array in arrays]
        )

    def padded(self, first: int, last: int) -> list[Tensor]:
        """Return [input ids, attention mask(, segment ids)], each (B, L) int64, of places first..last-1."""
        columns = torch.arange(int(self.lengths[first:last].max()), device=self.ids.device)
        padding = columns >= self.counts[first:last, None]
        at = (self.starts[first:last, None] + columns).masked_fill_(padding, 0)
        input_ids = self.ids[at].masked_fill_(padding, self.pad_id)
        types = [types[at].masked_fill_(padding, 0) for types in self.types]
        return [input_ids, (~padding).long(), *types]
