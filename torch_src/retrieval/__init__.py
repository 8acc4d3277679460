"""Vectors on disk, encoding, exact search, faiss index, re-ranking."""
