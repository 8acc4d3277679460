"""A re-ranker's logits fused with the scores of its retriever."""

import numpy as np
from numpy.testing import assert_array_equal

from torch_src.retrieval.fusion import fused_scores


def test_fusion_does_not_depend_on_the_retrievers_scale():
    logits = np.linspace(-1, 1, 7)
    scores = np.array([0.5, 0.3, 0.2, 0.1, 0.7, 0.4, 0.3])
    spans = [slice(0, 4), slice(4, 5), slice(5, 7)]
    one, other = (fused_scores(logits, a * scores + b, spans, 0.7) for a, b in ((1, 0), (250, -3)))
    assert np.allclose(one, other) and not np.allclose(one, logits)


def test_fusion_by_hand():
    """Mean 4 and deviation 2; one candidate and none have nothing to add."""
    logits = np.array([0.5, 1.0, -1.0, 0.0, 0.25], dtype=np.float32)
    scores = np.array([6, 2, 6, 2, 5], dtype=np.float32)
    spans = [slice(0, 4), slice(4, 5), slice(5, 5)]
    with np.errstate(all="raise"):
        assert_array_equal(fused_scores(logits, scores, spans, 0.5), [1.0, 0.5, -0.5, -0.5, 0.25])
