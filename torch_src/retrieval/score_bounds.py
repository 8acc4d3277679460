"""Fast inexact inner products with a proven error bound: the first stage of the exact search.

`Float32`, `Bfloat16` and `Int8` return the (query, passage) pairs of a chunk that can have a score of at
least `floor[query]`. No such pair is missed; a few others may be returned.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from torch_src.runtime.errors import is_out_of_memory

GROUP = 64  # passages per group: only groups whose best score is high enough are scanned
EPSILON = 2.0**-23  # of fp32
PASSAGE_LEVELS = (127, 63)  # 8 bits; 7 where AVX2 adds two products of bytes in 16 bits
QUERY_LEVELS = 127
SLACK = 1.0 + 2.0**-10  # covers the rounding of the bounds themselves


def fp32_error(hidden: int) -> float:
    """Return c such that an fp32 inner product of H numbers, summed in any order, has an error of at most
    c ||q|| ||p||.

    |fl(q.p) - q.p| <= gamma |q|.|p|, gamma = n u / (1 - n u), u half of EPSILON (Higham 2002, section 3.1).
    Here n is H + 2 and u is doubled, which covers scaling the result and the rounding of the bound itself.
    """
    size = (hidden + 2) * EPSILON
    return size / (1 - size)


def norms(vectors: Tensor) -> Tensor:
    """Return upper bounds (n,) fp64 of the Euclidean norms of rows (n, H)."""
    return torch.linalg.vector_norm(vectors, dim=1).double() * SLACK


class Scratch:
    """Tensors reused for every chunk: new memory costs a page fault every 4 KB."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def like(self, vectors: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized tensor with the shape (C, H) and the device of `vectors`."""
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor) < len(vectors):
            tensor = self.tensors[name] = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
        return tensor[: len(vectors)]


class ScoreBounds:
    """The queries (B, H) fp32 of one search on one device, and bounds of their scores for a chunk.

    Each query is scaled by a power of two to a largest value in [0.5, 1): exact, without over- or underflow.
    """

    name: str

    def __init__(self, queries: np.ndarray, device: torch.device):
        _, exponents = np.frexp(np.abs(queries).max(axis=1))
        scaled = np.ldexp(queries.astype(np.float64), -exponents[:, None]).astype(np.float32)
        self.queries = torch.from_numpy(scaled).to(device)  # (B, H) fp32
        self.scale = torch.from_numpy(np.ldexp(1.0, -exponents)).to(device)  # (B,) fp64
        self.query_norms = norms(self.queries)
        self.error = fp32_error(queries.shape[1])
        self.scratch = Scratch()

    def pairs_above(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        """Return (query, passage) indices, both (n,) int64, of at least all pairs with q.p >= floor[q].

        vectors (C, H) fp32; floor (B,) fp64, in the units of the scaled queries. None when there are more
        than `limit` pairs, or when the product cannot be computed.
        """
        raise NotImplementedError


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 products on CUDA without tf32, and sum bf16 products in fp32: the bounds assume both."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction
    flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = False, False
    try:
        yield
    finally:
        flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = before


class Float32(ScoreBounds):
    """Plain fp32 products; on CUDA within `full_precision`."""

    name = "fp32"

    def scores(self, vectors: Tensor) -> Tensor:
        """Return (C, B) fp32."""
        return vectors @ self.queries.T

    def bound(self, vectors: Tensor) -> Tensor:
        """Return (B,) fp64, the largest error that a score of this chunk can have."""
        return SLACK * self.error * self.query_norms * norms(vectors).max()

    def pairs_above(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        return select_pairs(self.scores(vectors), floor - self.bound(vectors), limit)


class Bfloat16(ScoreBounds):
    """Products of operands rounded to bf16, summed in fp32 and rounded to bf16 at the end."""

    name = "bf16"

    def __init__(self, queries: np.ndarray, device: torch.device):
        super().__init__(queries, device)
        self.rounded = self.queries.bfloat16()
        self.rounding_norms = norms(self.queries - self.rounded.float())
        self.rounded_norms = norms(self.rounded.float())

    def pairs_above(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        rounded = vectors.bfloat16()
        back = rounded.float()
        longest = norms(back).max()
        # q.p - q'.p' = q.(p - p') + (q - q').p', each bounded by the product of the norms (Cauchy-Schwarz)
        bound = self.query_norms * norms(vectors - back).max() + self.rounding_norms * longest
        # the sum, and rounding it to bf16
        bound += (self.error + 2.0**-8) * self.rounded_norms * longest
        return select_pairs(rounded @ self.rounded.T, floor - SLACK * bound, limit)


class Int8(ScoreBounds):
    """Products of 8-bit integers: passages minus their mean in 7 or 8 bits, queries in 8, each with a scale.

    They take half the time of fp32 with AVX2 and a quarter with AVX512-VNNI (oneDNN). Integer sums are exact.
    The mean of the first chunk is subtracted, because trained vectors share a large mean that wastes range.
    """

    name = "int8"

    def __init__(self, queries: np.ndarray, device: torch.device):
        super().__init__(queries, device)
        unit = self.queries.abs().amax(1).clamp_min(0.5) / QUERY_LEVELS  # 0.5: for a query of zeros
        levels = torch.round(self.queries / unit[:, None])
        self.size = self.query_norms.clamp_min(1e-30)  # products are computed with q / size
        self.levels = int8_levels(queries.shape[1])
        self.product = int8_product(levels.to(torch.int8), (unit / self.size).float(), self.levels)
        self.rounding_norms = norms(self.queries - levels * unit[:, None]) + 8 * EPSILON * self.query_norms
        self.mean: Tensor | None = None

    def pairs_above(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        if self.mean is None:
            self.mean = vectors.mean(0)
            self.mean_norm = norms(self.mean[None])[0]
            self.from_mean = self.queries.double() @ self.mean.double()
        scaled = torch.sub(vectors, self.mean, out=self.scratch.like(vectors, "scaled"))
        unit = torch.maximum(scaled.amax(1), -scaled.amin(1)).clamp_min_(1e-30).div_(self.levels)
        scaled *= (1 / unit)[:, None]
        levels = torch.round(scaled, out=self.scratch.like(vectors, "levels"))
        off = norms(scaled.sub_(levels)) * unit
        longest = (norms(levels) * unit).max()
        levels = self.scratch.like(vectors, "int8", torch.int8).copy_(levels).view(torch.uint8)
        # -L..L, read as uint8, plus L + 1 wraps around to 1..2L + 1
        scores = self.product(levels.add_(self.levels + 1))
        if scores is None:
            return None
        # q.p = q.mean + q'.p' + (q - q').p' + q.(p - mean - p'). The last term is at most size * off; it is
        # added per passage, because for a few passages it is far larger than for the others.
        scores = torch.addcmul((SLACK * off).float()[:, None], scores, unit[:, None], out=scores)
        bound = self.rounding_norms * longest
        # the rounding of each term
        bound += self.error * self.query_norms * (longest + off.max() + 2 * self.mean_norm)
        return select_pairs(scores, (floor - self.from_mean - SLACK * bound) / self.size, limit)


def int8_product(rows: Tensor, scale: Tensor, levels: int) -> Callable[[Tensor], Tensor | None]:
    """Return f(passages (C, H) uint8) -> (C, B) fp32 = (passages - levels - 1) . rows * scale.

    rows (B, H) int8, scale (B,) fp32; the passages have values from 1 to 2 * levels + 1. f returns None where
    oneDNN's quantized operators, which torch does not document, are missing or fail.
    """
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    try:
        packed = torch.ops.onednn.qlinear_prepack(rows, None)
    except (RuntimeError, AttributeError):
        return lambda passages: None

    def product(passages: Tensor) -> Tensor | None:
        options: tuple = (None, 1.0, 0, torch.float32, "none", [], "")
        try:
            return torch.ops.onednn.qlinear_pointwise(
                passages, 1.0, levels + 1, packed, scale, zeros, *options
            )
        except (RuntimeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return None

    return product


def select_pairs(scores: Tensor, threshold: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """Return (query, passage) indices of scores (C, B) >= threshold (B,) fp64; None above `limit` pairs."""
    lowest = _round_down(threshold)
    passages, queries = scores.shape
    if passages % GROUP:
        scores = torch.nn.functional.pad(scores, (0, 0, 0, -passages % GROUP), value=float("-inf"))
    groups = scores.view(-1, GROUP, queries)
    group, query = torch.nonzero(groups.amax(1) >= lowest, as_tuple=True)
    if len(query) > limit:
        return None
    at, within = torch.nonzero(groups[group, :, query] >= lowest[query][:, None], as_tuple=True)
    passage = group[at] * GROUP + within
    real = passage < passages  # drop the padding, which passes a threshold of -inf
    found = query[at][real], passage[real]
    return None if len(found[0]) > limit else found


def _round_down(values: Tensor) -> Tensor:
    """Round fp64 values down to fp32."""
    rounded = values.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, float("-inf")))
    return torch.where(rounded.double() > values, down, rounded)


KINDS: dict[str, type[ScoreBounds]] = {kind.name: kind for kind in (Float32, Bfloat16, Int8)}


def fastest_kind(hidden: int, device: torch.device) -> tuple[str, dict[str, float]]:
    """Return (fastest kind of product, seconds of each), measured: CPU flags do not show the fast kernels."""
    draw = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, hidden, generator=draw) for n in (512, 2048))
    vectors, floor = vectors.to(device), torch.full((512,), 1e30, dtype=torch.float64, device=device)
    kinds = [Float32, Bfloat16, *([Int8] if device.type == "cpu" and int8_is_exact(hidden) else [])]
    seconds = {}
    for kind in kinds:
        bounds = kind(queries.numpy(), device)
        seconds[kind.name] = min(_seconds(bounds, vectors, floor, device) for _ in range(3))
    return min(seconds, key=lambda name: seconds[name]), seconds


def _seconds(bounds: ScoreBounds, vectors: Tensor, floor: Tensor, device: torch.device) -> float:
    started = time.perf_counter()
    bounds.pairs_above(vectors, floor, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@cache
def int8_levels(hidden: int) -> int:
    """Return the largest of PASSAGE_LEVELS with exact int8 products in a test on this machine, 0 for none."""
    draw = np.random.default_rng(0)
    rows = draw.choice([-QUERY_LEVELS, 0, QUERY_LEVELS], size=(512, hidden)).astype(np.int8)
    rows[:2] = QUERY_LEVELS
    for limit in PASSAGE_LEVELS:
        levels = draw.choice([1, limit + 1, 2 * limit + 1], size=(2048, hidden)).astype(np.uint8)
        levels[:2] = [[1], [2 * limit + 1]]
        exact = (levels.astype(np.float64) - (limit + 1)) @ rows.T.astype(np.float64)
        found = int8_product(torch.from_numpy(rows), torch.ones(len(rows)), limit)(torch.from_numpy(levels))
        if found is not None and bool((found == torch.from_numpy(exact).float()).all()):
            return limit
    return 0


def int8_is_exact(hidden: int) -> bool:
    """Return whether this machine has exact int8 products of H numbers."""
    return int8_levels(hidden) > 0
