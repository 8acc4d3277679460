"""Passage retrieval in two stages: dual encoder, exact search, cross-encoder. Which module imports which:
tests/test_layout.py.
"""
