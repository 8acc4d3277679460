"""Token tables from lists, and token ids of pairs as lists, which tests compare."""

from types import SimpleNamespace

import numpy as np

from torch_src.models.tokenization import TokenTable, tokenize_pairs


def table_of(sequences, types=None) -> TokenTable:
    """Return the table of texts given as lists of ids, and of pairs' segment ids."""
    flat = [np.array([token for text in texts for token in text]) for texts in (sequences, types or [])]
    lengths = np.array([len(text) for text in sequences])
    return TokenTable(flat[0].astype(np.uint32), lengths, 0, flat[1].astype(np.uint8) if types else None)


def pair_lists(*arguments):
    """Return what tokenize_pairs returns, with a list of ids and of segment ids for each pair."""
    table = tokenize_pairs(*arguments)
    ids, types = (np.split(values, table.starts[1:-1]) for values in (table.ids, table.types))
    return SimpleNamespace(
        ids=[of_pair.tolist() for of_pair in ids], types=[of_pair.tolist() for of_pair in types],
        lengths=table.lengths.tolist(), cut=table.cut,
    )  # fmt: skip
