"""The difference of two results over the same queries: mean, 95 % interval, paired test, wins and losses."""

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000  # of the randomization test
BOOTSTRAPS = 2000
SEED = 42
SIGNIFICANT = 0.05  # p below which a difference is taken to be more than chance


@dataclass(frozen=True)
class Difference:
    """The mean difference second - first of a metric, and how certain it is."""

    first: float  # means over the queries
    second: float
    mean: float
    low: float  # 95 % interval of the mean difference
    high: float
    p: float
    better: int  # queries
    worse: int
    same: int

    @property
    def is_significant(self) -> bool:
        return self.p < SIGNIFICANT

    @property
    def is_gain(self) -> bool:
        return self.is_significant and self.mean > 0


def compare(first: np.ndarray, second: np.ndarray, seed: int = SEED) -> Difference:
    """Return the difference second - first of per-query values, both (Q,) for the same queries."""
    differences = second - first
    low, high = interval(differences, seed)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Difference(
        float(first.mean()), float(second.mean()), float(differences.mean()), low, high,
        randomization_p(differences, seed), better, worse, len(differences) - better - worse,
    )  # fmt: skip


def randomization_p(differences: np.ndarray, seed: int) -> float:
    """Return the two-sided p of the mean difference, with random signs per query (Smucker et al. 2007)."""
    generator = np.random.default_rng([seed, 1])
    extreme, observed = 0, abs(differences.sum())
    for start in range(0, DRAWS, 500):
        signs = generator.integers(0, 2, (min(500, DRAWS - start), len(differences))) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (extreme + 1) / (DRAWS + 1)


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of per-query values, by bootstrap over queries."""
    generator = np.random.default_rng([seed, 2])
    count, means = len(values), np.empty(BOOTSTRAPS)
    for start in range(0, BOOTSTRAPS, 100):
        means[start : start + 100] = values[generator.integers(0, count, (100, count))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
