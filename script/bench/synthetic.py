"""Synthetic inputs of the benchmarks: models with random weights, collections, texts, random vectors."""

import shutil
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from script.bench.common import ROOT

if TYPE_CHECKING:
    from torch_src.retrieval.vectors import VectorStore

# Characters of DuReader's texts: (mean, deviation of the logarithm). With the second a query has 21
# characters at the 99th percentile, as in DuReader, and a passage cut to 384 tokens has 245 on average.
PASSAGE_CHARACTERS, QUERY_CHARACTERS = (331.0, 0.8), (9.5, 0.37)


def write_model(folder: Path, dropout: float = 0.1, **sizes: int) -> None:
    """Write a BERT with random weights, a head of one logit and a vocabulary of single characters."""
    import torch
    import transformers
    from transformers import AutoConfig, BertForSequenceClassification

    tiny = ROOT / "tests/tiny_bert"
    config = AutoConfig.from_pretrained(tiny, **sizes, num_labels=1)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)


def write_small_model(folder: Path) -> None:
    """Write a 2-layer, 64-wide BERT."""
    write_model(folder, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)


def write_base_model(folder: Path, hidden: int = 768, layers: int = 12, dropout: float = 0.1) -> None:
    """Write such a model, by default of the size of BERT-base."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": max(1, hidden // 64)}
    write_model(folder, dropout, **sizes, intermediate_size=4 * hidden, vocab_size=21128)


def texts_like(characters: tuple[float, float], count: int, seed: int) -> list[str]:
    """Return distinct texts cut from the joined passages of the sample data, with log-normal lengths.

    characters: (mean, deviation of the logarithm), e.g. PASSAGE_CHARACTERS.
    """
    (mean, spread), draw = characters, np.random.default_rng(seed)
    parts = sorted((ROOT / "script/sample_data/passage-collection").glob("part-*"))
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").split("\n")[:-1]]
    source = "".join(line.split("\t")[2] for line in lines) * 2
    texts: dict[str, None] = {}
    while len(texts) < count:
        length = round(draw.lognormal(np.log(mean) - spread**2 / 2, spread))
        start = int(draw.integers(len(source) // 2))
        text = source[start : start + length].strip()
        if len(text) > 1:
            texts[text] = None
    return list(texts)


def write_id_map(folder: Path, rows: int) -> None:
    """Write passage2id.map.json with synthetic pids of 32 hex digits."""
    with open(folder / "passage2id.map.json", "w", encoding="ascii") as file:
        file.write("{")
        file.writelines(f'{", " if row else ""}"{row}": "{row:032x}"' for row in range(rows))
        file.write("}\n")


def repeat_collection(source: Path, target: Path, rows: int) -> None:
    """Write the passages of `source` repeatedly, `rows` lines in one part, and an id map."""
    target.mkdir(parents=True, exist_ok=True)
    lines = [
        line + b"\n" for part in sorted(source.glob("part-*")) for line in part.read_bytes().split(b"\n")[:-1]
    ]
    with open(target / "part-00", "wb") as file:
        file.writelines(islice(cycle(lines), rows))
    write_id_map(target, rows)


def open_store(
    folder: Path, stamp: dict[str, object], rows: int, hidden: int, block_rows: int
) -> "VectorStore":
    """Return the vector store of this folder; complete blocks are kept."""
    from torch_src.retrieval.vectors import VectorStore

    return VectorStore.create_or_continue(folder, stamp, rows, hidden, block_rows, print)


def fill_random(store: "VectorStore") -> None:
    """Write the missing blocks with independent normal numbers."""
    import torch

    for block in store.missing_blocks():
        first, last = store.block_range(block)
        generator = torch.Generator().manual_seed(block + 1)
        vectors = torch.randn(last - first, store.hidden, generator=generator)
        store.write_block(block, vectors.half().numpy())
