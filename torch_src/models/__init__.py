"""Text to vector, pair to logit: backbones, model folders, tokenization, encoders, losses."""
