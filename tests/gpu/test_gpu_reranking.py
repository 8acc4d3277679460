"""Re-ranking on CUDA: the CPU's logits, whatever the precision, batch size and free memory."""

import numpy as np
import pytest
import torch
from gpu.memory import limited_memory
from gpu.test_gpu_encoding import large_world, one_pass_too_large, plan_words
from models.test_cross_encoder import listed
from retrieval.test_gpu_inference import CONFIGS, build_scorer, dtypes

from torch_src import cross_infer
from torch_src.retrieval.gpu_inference import scorer_on_gpu

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAMILIES = [family for family in CONFIGS if family != "t5"]
__all__ = ["large_world", "one_pass_too_large"]  # fixtures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-3), ("bf16", 0.05), ("fp16", 0.01)])
def test_logits_are_those_of_the_cpu(tokenizer, family, precision, largest):
    pairs = listed(tokenizer, 4, 20)
    expected = build_scorer(tokenizer, family, "fp32").score_all(pairs)
    logits = build_scorer(tokenizer, family, precision, CUDA).score_all(pairs)
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < largest


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_bf16_give_the_logits_of_the_cpu(tokenizer, family):
    pairs = listed(tokenizer, 4, 20)
    expected = build_scorer(tokenizer, family, "fp32").score_all(pairs)
    scorer = scorer_on_gpu(build_scorer(tokenizer, family, device=CUDA))
    assert scorer.bf16_weights and dtypes(scorer.model) == {torch.bfloat16, torch.float32}  # the head
    assert np.abs(scorer.score_all(pairs) - expected).max() < 0.05


def test_transfers_do_not_race(tokenizer):
    scorer, pairs = build_scorer(tokenizer, "bert", "fp32", CUDA), listed(tokenizer, 8, 40)
    first, table = scorer.score_rows(pairs, list(range(len(pairs))))
    for _ in range(50):
        assert scorer.score(table).tobytes() == first.tobytes()


def test_worker_processes_give_the_same_logits(tokenizer):
    scorer, pairs = build_scorer(tokenizer, "bert", "fp32", CUDA), listed(tokenizer, 8, 40)
    usual, others = (
        [logits for _, logits, _ in scorer.score_candidates(pairs, [(0, 100), (100, 320)], workers)]
        for workers in (0, 2)
    )
    assert [one.tobytes() for one in usual] == [other.tobytes() for other in others]


def test_out_of_memory_halves_the_batch(tokenizer):
    pairs = listed(tokenizer, 100, 100)
    scorer = build_scorer(tokenizer, "bert", "fp32", CUDA)
    expected = scorer.score_all(pairs)
    scorer.batch_size, scorer.tokens_per_batch = 10**6, 10**7
    with limited_memory(60e6):
        logits = scorer.score_all(pairs)
    assert scorer.tokens_per_batch < 10**7 and np.abs(logits - expected).max() < 1e-3


def test_a_plan_halves_the_batch_when_out_of_memory(large_world, one_pass_too_large, tmp_path, capsys):
    words = [*plan_words(large_world, tmp_path), "--cross_params", "none"]
    assert cross_infer.main(words) == 0
    printed = capsys.readouterr()
    assert "halved to" in printed.err and "plan of do_cross_infer.py" in printed.out
