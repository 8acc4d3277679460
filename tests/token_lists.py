"""Token ids of pairs as lists, which tests compare."""

from types import SimpleNamespace

import numpy as np

from torch_src.models.tokenization import tokenize_pairs


def pair_lists(*arguments):
    """Return what tokenize_pairs returns, with a list of ids and of segment ids for each pair."""
    table = tokenize_pairs(*arguments)
    ids, types = (np.split(values, table.starts[1:-1]) for values in (table.ids, table.types))
    return SimpleNamespace(
        ids=[part.tolist() for part in ids], types=[part.tolist() for part in types],
        lengths=table.lengths.tolist(), cut=table.cut,
    )  # fmt: skip
