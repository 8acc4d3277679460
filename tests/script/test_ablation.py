"""The tables of script/bench/ablation.py, from values worked by hand."""

import numpy as np
import pytest

from script.bench import ablation


def test_each_recipe_is_compared_with_the_one_before():
    """Two seeds, 40 queries: the mean over the seeds is compared query by query."""
    base = np.zeros((2, 40))
    batch = base + [[0.5], [0.1]]  # both seeds better, each query by 0.3
    mined = batch + np.where(np.arange(40) % 2, 0.2, -0.2)  # half of the queries better, half worse
    found = {"base": base, "batch": batch, "mined": mined, "denoised": mined, "distilled_kl": mined}
    found["distilled_mse"] = mined + [[0.2], [-0.1]]  # one seed better, one worse
    tests = ablation.tests(found)
    assert [test["before"] for test in tests.values()] == ["base", "batch", "mined", "denoised", "denoised"]
    assert tests["batch"]["mean"] == pytest.approx(0.3) and tests["batch"]["p"] < 0.001
    assert (tests["batch"]["better"], tests["batch"]["seeds_better"]) == (40, 2)
    assert (tests["mined"]["better"], tests["mined"]["worse"]) == (20, 20) and tests["mined"]["p"] > 0.5
    assert (
        tests["distilled_mse"]["mean"] == pytest.approx(0.05) and tests["distilled_mse"]["seeds_better"] == 1
    )
    lines = ablation.table(found, tests, [1, 2])
    assert lines[1].split()[:3] == ["base", "0.0000", "0.0000"]
    assert lines[2].split() == ["batch", "0.3000", "0.2828", "0.5000", "0.1000"]
    assert lines[-1].startswith("distilled_mse denoised") and lines[-1].endswith("1 of 2")
