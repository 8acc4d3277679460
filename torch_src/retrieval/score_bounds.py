"""Fast inexact inner products with a proven error bound: the first stage of the exact search.

`Float32`, `Float16`, `Bfloat16` and `Int8` return the (query, passage) pairs of a chunk that can have a score
of at least `floor[query]`. No such pair is missed; a few others may be returned.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from torch_src.runtime.errors import is_out_of_memory

GROUP = 64  # passages per group: only groups whose best score is high enough are scanned
EPSILON = 2.0**-23  # of fp32
PASSAGE_LEVELS = (127, 63)  # 8 bits; 7 where AVX2 adds two products of bytes in 16 bits
QUERY_LEVELS = 127
PROBED = {"cpu": (512, 2048), "cuda": (1024, 16384)}  # queries and passages of the probe for the fastest kind
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
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32).double() * SLACK


class Scratch:
    """Tensors of a device reused for every chunk: new memory costs a page fault every 4 KB."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.mean: Tensor | None = None  # (H,) fp32, subtracted from all passages by `Int8`

    def get(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor; one name always has one width, dtype and device."""
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor) < shape[0]:
            tensor = self.tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        return tensor[: shape[0]]

    def rows(self, name: str, vectors: Tensor, at: Tensor) -> Tensor:
        """Return the rows (n, H) of the vectors at positions (n,)."""
        out = self.get(name, (len(at), vectors.shape[1]), vectors.dtype, vectors.device)
        return torch.index_select(vectors, 0, at, out=out)

    def like(self, vectors: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized tensor with the shape (C, H) and the device of `vectors`."""
        return self.get(name, (len(vectors), vectors.shape[1]), dtype, vectors.device)


class Queries:
    """A batch of queries on the device of the search.

    `scaled`: each query times a power of two, to a largest value in [0.5, 1), without over- or underflow.
    """

    def __init__(self, queries: np.ndarray, device: torch.device):
        """queries (B, H) float32."""
        _, exponents = np.frexp(np.abs(queries).max(axis=1))
        scaled = np.ldexp(queries.astype(np.float64), -exponents[:, None]).astype(np.float32)
        self.vectors = torch.from_numpy(queries).to(device)  # (B, H) fp32
        self.scaled = torch.from_numpy(scaled).to(device)  # (B, H) fp32
        self.scale = torch.from_numpy(np.ldexp(1.0, -exponents)).to(device)  # (B,) fp64
        self.norms = norms(self.scaled)
        self.error = fp32_error(queries.shape[1])


class Passages:
    """The vectors (C, H) of one chunk on the device of the search.

    Each conversion is computed when it is first used, once for all batches of queries, in the memory of
    `scratch`: the conversions are valid until those of the next chunk.
    """

    def __init__(self, float16: Tensor, scratch: Scratch):
        self.float16, self.scratch = float16, scratch  # (C, H) fp16

    def __len__(self) -> int:
        return len(self.float16)

    def split(self, rows: int) -> Iterator[tuple[int, "Passages"]]:
        """Yield (position, passages): at most `rows` at once; each is valid until the next one."""
        if len(self) <= rows:
            yield 0, self
            return
        scratch = Scratch()
        for start in range(0, len(self), rows):
            yield start, Passages(self.float16[start : start + rows], scratch)

    @cached_property
    def float32(self) -> Tensor:
        """(C, H) fp32"""
        return self.scratch.like(self.float16, "float32").copy_(self.float16)

    @cached_property
    def largest_norm(self) -> Tensor:
        """() fp64, an upper bound of the largest norm"""
        return norms(self.float16 if self.float16.is_cuda else self.float32).max()

    @cached_property
    def bfloat16(self) -> tuple[Tensor, Tensor, Tensor]:
        """(vectors rounded to bf16 (C, H), the largest norm of a rounding error, that of a rounded vector)"""
        rounded = self.float32.bfloat16()
        back = rounded.float()
        return rounded, norms(self.float32 - back).max(), norms(back).max()

    @cached_property
    def int8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(levels (C, H) uint8, unit (C,) fp32, residual norms (C,) fp64, largest norm () fp64)

        Levels are 1 to 2L + 1, where L is `int8_levels`. A vector is the mean + (levels - L - 1) * unit + a
        residual; the largest norm is that of the second term. The mean is that of the first chunk: trained
        vectors share a large mean that wastes range.
        """
        scratch = self.scratch
        if scratch.mean is None:
            scratch.mean = self.float32.mean(0)
        scaled = torch.sub(self.float32, scratch.mean, out=scratch.like(self.float16, "scaled"))
        limit = int8_levels(self.float16.shape[1])
        unit = torch.maximum(scaled.amax(1), -scaled.amin(1)).clamp_min_(1e-30).div_(limit)
        scaled *= (1 / unit)[:, None]
        levels = torch.round(scaled, out=scratch.like(self.float16, "levels"))
        residual_norms = norms(scaled.sub_(levels)) * unit
        largest_norm = (norms(levels) * unit).max()
        levels = scratch.like(self.float16, "int8", torch.int8).copy_(levels).view(torch.uint8)
        # -L..L, read as uint8, plus L + 1 wraps around to 1..2L + 1
        return levels.add_(limit + 1), unit, residual_norms, largest_norm


class ScoreBounds:
    """The queries of one batch, and bounds of their scores for a chunk."""

    name: str

    def __init__(self, queries: Queries):
        self.queries = queries

    def pairs_above(self, passages: Passages, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        """Return (query, passage) indices, both (n,) int64, of at least all pairs with q.p >= floor[q].

        The passages of a query come in increasing order. floor (B,) fp64, in the units of the scaled queries.
        None when there are more than `limit` pairs, or when the product cannot be computed.
        """
        raise NotImplementedError


# Of torch.backends.cuda.matmul: tf32, and sums of 16-bit products in less than fp32.
REDUCED_PRECISION = (
    "allow_tf32",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 products on CUDA without tf32, and sum 16-bit products in fp32: the bounds assume both."""
    flags = torch.backends.cuda.matmul
    before = {name: getattr(flags, name) for name in REDUCED_PRECISION if hasattr(flags, name)}
    try:
        for name in before:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(flags, name, value)


class Float32(ScoreBounds):
    """Plain fp32 products; on CUDA within `full_precision`."""

    name = "fp32"

    def bound(self, passages: Passages) -> Tensor:
        """Return (B,) fp64, the largest error that a score of this chunk can have."""
        return SLACK * self.queries.error * self.queries.norms * passages.largest_norm

    def kth_score(self, passages: Passages, keep: int) -> Tensor:
        """Return (B,) fp64, a score that at least `keep` passages of this chunk reach."""
        scores = self.queries.scaled @ passages.float32.T
        return torch.topk(scores, keep, dim=1).values[:, -1].double() - self.bound(passages)

    def pairs_above(self, passages: Passages, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        scores = passages.float32 @ self.queries.scaled.T
        return select_pairs(scores, round_down(floor - self.bound(passages), torch.float32), limit)


class RoundedQueries(ScoreBounds):
    """The queries rounded to 16 bits, and norms (B,) fp64 of the rounded queries and of their errors."""

    dtype: torch.dtype

    def __init__(self, queries: Queries):
        super().__init__(queries)
        self.rounded = queries.scaled.to(self.dtype)
        # The difference is exact in fp32: a value below the range of 16 bits becomes 0 and is all error.
        self.rounding_norms = norms(queries.scaled - self.rounded.float())
        self.rounded_norms = norms(self.rounded.float())


class Float16(RoundedQueries):
    """Products with queries rounded to fp16, summed in fp32 and rounded to fp16 at the end (tensor cores).

    The passages are stored in fp16: they need no conversion and have no rounding error. On a CPU, where torch
    does not promise how fp16 is summed, the product is computed in fp32; only tests use it there.
    """

    name, dtype = "fp16", torch.float16

    def pairs_above(self, passages: Passages, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        # q.p - q'.p = (q - q').p, bounded by the product of the norms (Cauchy-Schwarz); the error of the sum
        bound = (self.rounding_norms + self.queries.error * self.rounded_norms) * passages.largest_norm
        # A sum that reaches the threshold, rounded to fp16, reaches the threshold rounded down to fp16:
        # rounding never reorders numbers, not even large ones, which become infinite or the largest of fp16.
        lowest = round_down(floor - SLACK * bound, torch.float16)
        return select_pairs(self._scores(passages.float16), lowest, limit)

    def _scores(self, vectors: Tensor) -> Tensor:
        """Return (C, B) fp16 of vectors (C, H) fp16."""
        if vectors.is_cuda:
            return vectors @ self.rounded.T
        return (vectors.float() @ self.rounded.float().T).half()


class Bfloat16(RoundedQueries):
    """Products of operands rounded to bf16, summed in fp32 and rounded to bf16 at the end."""

    name, dtype = "bf16", torch.bfloat16

    def pairs_above(self, passages: Passages, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        rounded, rounding_norm, largest_norm = passages.bfloat16
        # q.p - q'.p' = q.(p - p') + (q - q').p', each bounded by the product of the norms (Cauchy-Schwarz)
        bound = self.queries.norms * rounding_norm + self.rounding_norms * largest_norm
        # the sum, and rounding it to bf16
        bound += (self.queries.error + 2.0**-8) * self.rounded_norms * largest_norm
        lowest = round_down(floor - SLACK * bound, torch.float32)
        return select_pairs(rounded @ self.rounded.T, lowest, limit)


class Int8(ScoreBounds):
    """Products of 8-bit integers: passages minus their mean in 7 or 8 bits, queries in 8, each with a scale.

    They take half the time of fp32 with AVX2 and a quarter with AVX512-VNNI (oneDNN). Integer sums are exact.
    """

    name = "int8"

    def __init__(self, queries: Queries):
        super().__init__(queries)
        scaled = queries.scaled
        unit = scaled.abs().amax(1).clamp_min(0.5) / QUERY_LEVELS  # 0.5: for a query of zeros
        levels = torch.round(scaled / unit[:, None])
        self.size = queries.norms.clamp_min(1e-30)  # products are computed with q / size
        limit = int8_levels(scaled.shape[1])
        self.product = int8_product(levels.to(torch.int8), (unit / self.size).float(), limit)
        self.rounding_norms = norms(scaled - levels * unit[:, None]) + 8 * EPSILON * queries.norms
        self.from_mean: Tensor | None = None

    def pairs_above(self, passages: Passages, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        levels, unit, residual_norms, largest_norm = passages.int8
        mean = passages.scratch.mean
        assert mean is not None  # set by passages.int8
        if self.from_mean is None:
            self.mean_norm = norms(mean[None])[0]
            self.from_mean = self.queries.scaled.double() @ mean.double()
        scores = self.product(levels)
        if scores is None:
            return None
        # q.p = q.mean + q'.p' + (q - q').p' + q.(p - mean - p'). The last term is at most size * residual
        # norm; it is added per passage, because for a few passages it is far larger than for the others.
        scores = torch.addcmul((SLACK * residual_norms).float()[:, None], scores, unit[:, None], out=scores)
        bound = self.rounding_norms * largest_norm
        # the rounding of each term
        total_norm = largest_norm + residual_norms.max() + 2 * self.mean_norm
        bound += self.queries.error * self.queries.norms * total_norm
        threshold = (floor - self.from_mean - SLACK * bound) / self.size
        return select_pairs(scores, round_down(threshold, torch.float32), limit)


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


def select_pairs(scores: Tensor, lowest: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """Return (query, passage) indices of scores (C, B) >= lowest (B,); None above `limit` pairs.

    The passages of a query come in increasing order. Waits twice for a GPU, once for each number of indices.
    """
    passages, queries = scores.shape
    if passages % GROUP:
        scores = torch.nn.functional.pad(scores, (0, 0, 0, -passages % GROUP), value=float("-inf"))
    groups = scores.view(-1, GROUP, queries)
    group, query = torch.nonzero(groups.amax(1) >= lowest, as_tuple=True)
    if len(query) > limit:
        return None
    at, within = torch.nonzero(groups[group, :, query] >= lowest[query][:, None], as_tuple=True)
    query, passage = query[at], group[at] * GROUP + within
    if passages % GROUP:
        real = passage < passages  # drop the padding, which passes a threshold of -inf
        query, passage = query[real], passage[real]
    return None if len(query) > limit else (query, passage)


def round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers of `dtype` that are slightly below the fp64 values.

    The smallest normal number is subtracted because a product may replace results below it by 0.
    """
    limits = torch.finfo(dtype)
    values = values.clamp(max=limits.max)
    return (values - limits.eps * values.abs() - limits.smallest_normal).to(dtype)


KINDS: dict[str, type[ScoreBounds]] = {kind.name: kind for kind in (Float32, Float16, Bfloat16, Int8)}


def fastest_kind(hidden: int, device: torch.device) -> tuple[str, dict[str, float]]:
    """Return (fastest kind of product, seconds of each), measured: CPU flags do not show the fast kernels."""
    kinds: list[type[ScoreBounds]] = [Float32, Float16]
    if device.type == "cpu":
        kinds = [Float32, Bfloat16, *([Int8] if int8_is_exact(hidden) else [])]
    draw = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, hidden, generator=draw) for n in PROBED[device.type])
    passages = vectors.half().to(device)
    floor = torch.full((len(queries),), 1e30, dtype=torch.float64, device=device)
    scratch, seconds = Scratch(), {}
    with full_precision():
        for kind in kinds:
            bounds = kind(Queries(queries.numpy(), device))
            seconds[kind.name] = min(_seconds(bounds, Passages(passages, scratch), floor) for _ in range(3))
    return min(seconds, key=lambda name: seconds[name]), seconds


def _seconds(bounds: ScoreBounds, passages: Passages, floor: Tensor) -> float:
    started = time.perf_counter()
    bounds.pairs_above(passages, floor, 1)
    if passages.float16.is_cuda:
        torch.cuda.synchronize(passages.float16.device)
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
