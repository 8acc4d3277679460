"""sentence-transformers' own objects on a plain model folder, as the benchmarks use them."""

import torch


def bi_encoder(path: str, length: int):
    """Return a SentenceTransformer with mean pooling and normalisation, at `length` tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    # fp32 asked for: weights saved as fp16 would be computed in fp16, which no CPU does fast.
    transformer = Transformer(path, max_seq_length=length, model_kwargs={"dtype": torch.float32})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
