"""Token ids of many texts in two flat arrays: 4 bytes a token, where Python lists would take 40."""

import numpy as np

from torch_src.models.tokenization import pad


class TokenTable:
    """`ids` (tokens,) uint32, text after text; `lengths` (N,) int64; `cut`: how many texts were too long."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, cut: int = 0):
        self.ids, self.lengths, self.cut = ids, lengths, cut
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    @classmethod
    def of_lists(cls, ids: list[list[int]], cut: int = 0) -> "TokenTable":
        """Return the table of a list of ids for each text."""
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(
            (token for text in ids for token in text), dtype=np.uint32, count=int(lengths.sum())
        )
        return cls(flat, lengths, cut)

    @classmethod
    def joined(cls, tables: list["TokenTable"]) -> "TokenTable":
        """Return the texts of all tables in one."""
        ids, lengths = (np.concatenate([getattr(t, name) for t in tables]) for name in ("ids", "lengths"))
        return cls(ids, lengths, sum(table.cut for table in tables))

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input ids, attention mask), both (len(rows), L) int64, L the longest of these texts."""
        return pad([self.ids[self.starts[row] : self.starts[row + 1]] for row in rows.tolist()], pad_id)
