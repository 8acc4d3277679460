"""Shared by the tests: the vocabulary of the sample data and a BERT small enough to run in milliseconds."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may go to the network

VOCAB = Path(__file__).resolve().parents[1] / "script" / "sample_data" / "tiny_bert" / "vocab.txt"


@pytest.fixture(scope="session")
def tokenizer():
    """The WordPiece tokenizer of the sample data."""
    from torch_src.models.tokenization import load_tokenizer

    return load_tokenizer("", str(VOCAB))


@pytest.fixture
def tiny_config(tokenizer):
    """A BERT of 2 layers, 32 wide, 64 positions; weights drawn wider than usual, so that texts differ."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture
def tiny_bert(tiny_config):
    """Return a function: (seed, add_pooling_layer) -> BertModel in eval mode."""
    import torch
    from transformers import BertModel

    def build(seed: int = 0, add_pooling_layer: bool = False):
        torch.manual_seed(seed)
        return BertModel(tiny_config, add_pooling_layer=add_pooling_layer).eval()

    return build


@pytest.fixture(scope="session")
def programs():
    """A server that starts the four programs quickly, as processes of their own."""
    from preloaded import Preloaded

    with Preloaded() as server:
        yield server
