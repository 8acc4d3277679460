"""Fast, inexact inner products with a proved bound on their error: the first look of an exact search.

`Float32`, `Bfloat16` and `Int8` answer one question about a chunk of passages: which (query, passage) pairs
can reach a score of `floor[query]` or more? Every pair that does is in the answer; a few others may be.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

GROUP = (
    64  # scores are looked at in groups of so many passages: only groups whose best is high enough are opened
)
EPSILON = 2.0**-23  # of fp32
PASSAGE_LEVELS = (127, 63)  # 8 bits where products of bytes are summed exactly; AVX2 sums two in 16 bits: 7
QUERY_LEVELS = 127
SLACK = 1.0 + 2.0**-10  # covers the rounding of the bounds themselves


def fp32_error(hidden: int) -> float:
    """Return c: an fp32 inner product of H numbers, summed in any order, is off by at most c ||q|| ||p||.

    |fl(q.p) - q.p| <= gamma |q|.|p|, gamma = n u / (1 - n u), u half of EPSILON (Higham 2002, section 3.1); n
    is taken two larger and u doubled, which covers scaling the result and the rounding of the bound itself.
    """
    size = (hidden + 2) * EPSILON
    return size / (1 - size)


def norms(vectors: Tensor) -> Tensor:
    """Return the Euclidean norms (n,) fp64 of rows (n, H), never too small."""
    return torch.linalg.vector_norm(vectors, dim=1).double() * SLACK


class Scratch:
    """Tensors that are used again for every chunk: fresh memory would cost a page fault every 4 KB."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def like(self, vectors: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of the shape (C, H) of `vectors`, with whatever is in it."""
        kept = self.tensors.get(name)
        if kept is None or len(kept) < len(vectors):
            kept = self.tensors[name] = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
        return kept[: len(vectors)]


class Products:
    """The queries of one search on one device, and their products with chunks of passages.

    Each query is scaled by a power of two (its largest value then lies in [0.5, 1)), which loses nothing and
    keeps every bound clear of overflow and underflow.
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

    def reached(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        """Return (query, passage) indices, both (n,), of all pairs with q.p >= floor[q], and maybe others.

        vectors (C, H) fp32; floor (B,) fp64, in the units of the scaled queries. None when there are more
        than `limit`.
        """
        raise AssertionError("each kind of product has its own")


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block CUDA's fp32 products are fp32 (no tf32) and sums of bf16 products are fp32: the bounds
    below count on both.
    """
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction
    flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = False, False
    try:
        yield
    finally:
        flags.allow_tf32, flags.allow_bf16_reduced_precision_reduction = before


class Float32(Products):
    """Plain fp32 products; on CUDA within `full_precision`."""

    name = "fp32"

    def scores(self, vectors: Tensor) -> Tensor:
        """Return (C, B) fp32."""
        return vectors @ self.queries.T

    def bound(self, vectors: Tensor) -> Tensor:
        """Return (B,) fp64: by how much a score of this chunk can be off."""
        return SLACK * self.error * self.query_norms * norms(vectors).max()

    def reached(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        return above(self.scores(vectors), floor - self.bound(vectors), limit)


class Bfloat16(Products):
    """Products of operands rounded to bf16, summed in fp32 and rounded to bf16 at the end."""

    name = "bf16"

    def __init__(self, queries: np.ndarray, device: torch.device):
        super().__init__(queries, device)
        self.rounded = self.queries.bfloat16()
        self.lost = norms(self.queries - self.rounded.float())
        self.rounded_norms = norms(self.rounded.float())

    def reached(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
        rounded = vectors.bfloat16()
        back = rounded.float()
        longest = norms(back).max()
        # q.p - q'.p' = q.(p - p') + (q - q').p', each at most the product of the norms (Cauchy-Schwarz)
        bound = self.query_norms * norms(vectors - back).max() + self.lost * longest
        bound += (
            (self.error + 2.0**-8) * self.rounded_norms * longest
        )  # summing, and rounding the sum to bf16
        return above(rounded @ self.rounded.T, floor - SLACK * bound, limit)


class Int8(Products):
    """Products of 8-bit integers: passages less their mean in 7 or 8 bits, queries in 8, a scale for each.

    They take half the time of fp32 with AVX2, a quarter with AVX512-VNNI (oneDNN). The sums of integers are
    exact. The mean of the first chunk is taken out since it is much of every vector of a trained encoder,
    tells nothing apart, and would use up the range.
    """

    name = "int8"

    def __init__(self, queries: np.ndarray, device: torch.device):
        super().__init__(queries, device)
        unit = self.queries.abs().amax(1).clamp_min(0.5) / QUERY_LEVELS  # (0.5: a query of zeros alone)
        levels = torch.round(self.queries / unit[:, None])
        self.size = self.query_norms.clamp_min(1e-30)  # products are taken with q / size
        self.levels = int8_levels(queries.shape[1])
        self.packed = PackedInt8(levels.to(torch.int8), (unit / self.size).float(), self.levels)
        self.lost = norms(self.queries - levels * unit[:, None]) + 8 * EPSILON * self.query_norms
        self.mean: Tensor | None = None

    def reached(self, vectors: Tensor, floor: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
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
        scores = self.packed.products(levels.add_(self.packed.zero))  # wraps round, as it should
        # q.p = q.mean + q'.p' + (q - q').p' + q.(p - mean - p'). The last is at most size * off: added here,
        # passage by passage, since a few of them have a far larger one than the others.
        scores = torch.addcmul((SLACK * off).float()[:, None], scores, unit[:, None], out=scores)
        bound = self.lost * longest
        bound += (
            self.error * self.query_norms * (longest + off.max() + 2 * self.mean_norm)
        )  # rounding, of each
        return above(scores, (floor - self.from_mean - SLACK * bound) / self.size, limit)


class PackedInt8:
    """Rows (B, H) int8 laid out once by oneDNN, with a scale each; what comes with `levels` from -L to L."""

    def __init__(self, rows: Tensor, scale: Tensor, levels: int):
        self.zero = levels + 1
        self.packed = torch.ops.onednn.qlinear_prepack(rows, None)
        self.scale, self.zeros = scale, torch.zeros(len(rows), dtype=torch.int64)

    def products(self, levels: Tensor) -> Tensor:
        """Return (C, B) fp32: (levels - zero) . rows * scale, of uint8 levels (C, H) from 1 to 2 L + 1."""
        return torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, self.zero, self.packed, self.scale, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def above(scores: Tensor, threshold: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """Return (query, passage) indices of scores (C, B) >= threshold (B,) fp64; None for more than `limit`."""
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
    real = passage < passages  # not of the padding, which a threshold of -inf lets through
    found = query[at][real], passage[real]
    return None if len(found[0]) > limit else found


def _round_down(values: Tensor) -> Tensor:
    """Return fp32 values that are not above the fp64 ones."""
    rounded = values.float()
    down = torch.nextafter(rounded, torch.full_like(rounded, float("-inf")))
    return torch.where(rounded.double() > values, down, rounded)


KINDS: dict[str, type[Products]] = {kind.name: kind for kind in (Float32, Bfloat16, Int8)}


def fastest(hidden: int, device: torch.device) -> tuple[str, dict[str, float]]:
    """Return (the kind that is fastest here, seconds of each): all give the same search results.

    Measured for a moment, since no list of processor flags says which library has a fast kernel for what.
    """
    draw = torch.Generator().manual_seed(0)
    queries, vectors = (torch.randn(n, hidden, generator=draw) for n in (512, 2048))
    vectors, floor = vectors.to(device), torch.full((512,), 1e30, dtype=torch.float64, device=device)
    kinds = [Float32, Bfloat16, *([Int8] if device.type == "cpu" and int8_is_exact(hidden) else [])]
    seconds = {}
    for kind in kinds:
        products = kind(queries.numpy(), device)
        seconds[kind.name] = min(_seconds(products, vectors, floor, device) for _ in range(3))
    return min(seconds, key=seconds.get), seconds


def _seconds(products: Products, vectors: Tensor, floor: Tensor, device: torch.device) -> float:
    begun = time.perf_counter()
    products.reached(vectors, floor, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


@cache
def int8_levels(hidden: int) -> int:
    """Return the most levels above zero that this machine's int8 products of H numbers are exact with.

    Looked at with the largest values that occur and in the sizes of a search. 0: there are no such products.
    """
    draw = np.random.default_rng(0)
    rows = draw.choice([-QUERY_LEVELS, 0, QUERY_LEVELS], size=(512, hidden)).astype(np.int8)
    rows[:2] = QUERY_LEVELS
    for most in PASSAGE_LEVELS:
        levels = draw.choice([1, most + 1, 2 * most + 1], size=(2048, hidden)).astype(np.uint8)
        levels[:2] = [[1], [2 * most + 1]]
        exact = (levels.astype(np.float64) - (most + 1)) @ rows.T.astype(np.float64)
        try:
            packed = PackedInt8(torch.from_numpy(rows), torch.ones(len(rows)), most)
            found = packed.products(torch.from_numpy(levels))
        except (RuntimeError, AttributeError, NotImplementedError):
            return 0  # a torch without oneDNN's quantised products
        if bool((found == torch.from_numpy(exact).float()).all()):
            return most
    return 0


def int8_is_exact(hidden: int) -> bool:
    """Return whether this machine has int8 products of H numbers that are right."""
    return int8_levels(hidden) > 0
