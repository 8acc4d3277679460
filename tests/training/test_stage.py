"""What a training stage refuses before it starts."""

import pytest
from transformers import AlbertConfig, AlbertModel

from torch_src.runtime.errors import UserError
from torch_src.training.stage import checkpoint_activations


def test_a_model_without_gradient_checkpointing_is_refused(tiny_bert):
    sizes = dict(embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    albert = AlbertModel(AlbertConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    with pytest.raises(UserError, match="^--gradient_checkpointing: .*albert"):
        checkpoint_activations(albert)
    model = tiny_bert()
    checkpoint_activations(model)
    assert model.is_gradient_checkpointing
