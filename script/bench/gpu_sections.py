"""The sections of gpu.py: what each one measures, ours and the peers."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from script.bench.common import Figures
from script.bench.gpu_runs import OURS, PART, PEER, Bench, Section
from script.bench.peers import bi_encoder, cross_encoder
from script.bench.synthetic import PASSAGE_CHARACTERS, QUERY_CHARACTERS, open_store, texts_like
from torch_src.data.candidates import Candidates
from torch_src.data.collection import PassageCollection
from torch_src.data.dual_training_set import DualTrainingSet
from torch_src.data.formats import DualRow, format_dual_row, format_passage
from torch_src.dual_hparams import DualHparams
from torch_src.dual_train import training_stage
from torch_src.models.cross_encoder import load_cross_encoder
from torch_src.models.dual_encoder import load_backbone
from torch_src.models.tokenization import TextRules, load_tokenizer
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.faiss_index import FILL_ROWS, MAX_TRAINING, inverted_lists, load_faiss, new_index
from torch_src.retrieval.reranking import PairScorer
from torch_src.retrieval.search import DeviceCache, SearchStats, choose_kind, chunk_rows, search
from torch_src.retrieval.vectors import VectorStore, new_manifest
from torch_src.runtime.devices import autocast, free_gpu_memory, token_budget, worker_count
from torch_src.runtime.prefetch import one_ahead

LENGTH, QUERY_LENGTH = 384, 32  # tokens
HEAD = 8192  # texts or pairs that the model alone and the peers get
DEPTH = 50  # passages per query to re-rank
LR = 3e-5
GENERATED_ROWS = 65536  # vectors generated, or compared by a peer, at once
VECTOR_SHARE = 0.35  # of the free GPU memory, for the vectors to search: faiss holds a copy of them
INDEX_QUERIES = 1000
PROBES = 64  # inverted lists that a query searches

Find = Callable[[torch.Tensor], tuple[np.ndarray, str]]  # queries (B, H) fp16 -> (rows (B, K) int64, a note)


def forward_flops(bench: Bench, lengths: Iterable[int] | np.ndarray) -> float:
    """Return the operations of the encoder's forward pass over texts of these lengths in tokens.

    Per layer and token 12 H^2 weights, a multiplication and an addition each; attention adds 4 H L. Padding
    is not counted.
    """
    tokens = np.fromiter(lengths, dtype=np.float64)
    hidden = bench.sizes.hidden
    return float(bench.sizes.layers * (24 * hidden**2 * tokens + 4 * hidden * tokens**2).sum())


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of the rows (B, K) `expected` that `found` contains, query by query."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True))
    return hits / expected.size


# Ceilings


def ceilings(bench: Bench) -> None:
    """The rates that the other sections are compared with."""
    flops = 2.0 * bench.sizes.matmul**3
    bench.record("matmul", PART, {"seconds": flops / 1e12 / bench.matmul_tflops, "flops": flops})
    one = torch.randint(256, (bench.sizes.copy_bytes,), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(one)
    _bandwidth(bench, "device copy, read + write", 2 * len(one), lambda: other.copy_(one))
    host = torch.empty(len(one) // 4, dtype=torch.uint8, pin_memory=bench.on_gpu)
    part = one[: len(host)]
    _bandwidth(bench, "host to device, pinned", len(host), lambda: part.copy_(host, non_blocking=True))
    _bandwidth(bench, "device to host, pinned", len(host), lambda: host.copy_(part, non_blocking=True))


def _bandwidth(bench: Bench, name: str, size: int, work: Callable[[], object]) -> None:
    seconds = bench.seconds_of(work)
    bench.record(name, PART, {"seconds": seconds, "gb_per_s": size / 1e9 / seconds})


# Training


def train(bench: Bench) -> None:
    """An update of the official recipe, with one encoder for both sides as the peer has it.

    Model operations: three forward passes. GradCache needs a fourth, which is not counted.
    """
    sizes, folder = bench.sizes, bench.folder / "train_data"
    folder.mkdir()
    queries = texts_like(QUERY_CHARACTERS, sizes.train_queries, 1)
    passages = texts_like(PASSAGE_CHARACTERS, 2 * len(queries), 2)
    rows = zip(queries, passages[: len(queries)], passages[len(queries) :], strict=True)
    with open(folder / "dual.train.tsv", "w", encoding="utf-8", newline="") as file:
        file.writelines(format_dual_row(DualRow(*row)) for row in rows)
    for number, (texts, tokens) in enumerate(sizes.chunks):
        name = f"ours, {texts} texts a pass" + (f", {tokens} tokens" if tokens else "")
        work = partial(_our_update, bench, name, texts, tokens, profiled=not number)
        bench.attempt(name, 15 * bench.on_gpu, work)
    for texts in sizes.peer_chunks:
        name = f"sentence-transformers, {texts} texts a pass"
        bench.attempt(name, 15 * bench.on_gpu, partial(_peer_update, bench, name, texts))


def _settings(bench: Bench, chunk: int, tokens: int) -> DualHparams:
    return DualHparams(
        pretrained_model_path=bench.model, train_set=str(bench.folder / "train_data/dual.train.tsv"),
        output_dir=str(bench.folder / "train_output"), device=str(bench.device), eval_every=-1, lr=LR,
        batch_size=bench.sizes.train_queries, grad_cache_chunk=chunk, tokens_per_batch=tokens,
        share_encoder=True, q_max_seq_len=QUERY_LENGTH, p_max_seq_len=LENGTH,
    )  # fmt: skip


def _our_update(bench: Bench, name: str, chunk: int, tokens: int, profiled: bool) -> None:
    """Updates of the trainer, the next batch prepared in a thread as in a real run."""
    stage = training_stage(_settings(bench, chunk, tokens))
    stage.task.load()
    trainer, task = stage.trainer(bench.folder / "train_output", {}), stage.task
    batches = one_ahead(lambda epoch: task.batch(epoch, 0), range(2 + bench.sizes.updates))
    first = next(batches)
    losses = [trainer.update(0, [first]).loss]
    lengths = [len(ids) for ids in first.queries + first.passages]

    def updates() -> None:
        for step in range(1, 1 + bench.sizes.updates):
            losses.append(trainer.update(step, [next(batches)]).loss)

    _, figures = bench.time(updates)
    _record_updates(bench, name, OURS, figures, lengths, losses)
    if profiled:
        last = next(batches)
        bench.profile(lambda: trainer.update(bench.sizes.updates + 1, [last]))


def _peer_update(bench: Bench, name: str, mini_batch: int) -> None:
    """Updates with CachedMultipleNegativesRankingLoss on the same rows, tokenized beforehand."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import batch_to_device, dot_score

    model = bi_encoder(bench.model, LENGTH, str(bench.device), pooling="cls").train()
    _run_under(model, autocast(bench.device, bench.precision))
    kind: Any = losses.CachedMultipleNegativesRankingLoss
    loss_of = kind(model, scale=1.0, similarity_fct=dot_score, mini_batch_size=mini_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=bench.on_gpu)
    data, settings = DualTrainingSet(bench.folder / "train_data/dual.train.tsv"), _settings(bench, 0, 0)
    batch = data.batch(settings.seed, 0, 0, bench.sizes.train_queries, settings.hard_negatives)
    passages = [[batch.passages[column] for column in columns] for columns in batch.lists.T.tolist()]
    features = [model.preprocess(texts) for texts in (batch.queries, *passages)]
    lengths = [int(length) for column in features for length in column["attention_mask"].sum(1)]

    def update() -> float:
        columns = [batch_to_device(dict(column), bench.device) for column in features]
        loss = loss_of(columns, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seen = [update()]
    _, figures = bench.time(lambda: seen.extend(update() for _ in range(bench.sizes.updates)))
    _record_updates(bench, name, PEER, figures, lengths, seen)


def _run_under(model: torch.nn.Module, context: AbstractContextManager[object]) -> None:
    """Compute the forward passes of a model in this context, those in a backward hook too."""
    forward = model.forward

    def within(*args: Any, **options: Any) -> Any:
        with context:
            return forward(*args, **options)

    model.forward = within  # as accelerate does for a Trainer


def _record_updates(
    bench: Bench, name: str, side: str, figures: Figures, lengths: list[int], losses: list[float]
) -> None:
    figures["seconds"] /= bench.sizes.updates
    figures |= {"count": bench.sizes.train_queries, "unit": "queries", "tokens": sum(lengths)}
    bench.record(name, side, figures | {"flops": 3 * forward_flops(bench, lengths), "first_loss": losses[0]})


# Encoding


def encode(bench: Bench) -> None:
    """Passages to vectors: from the collection on disk to fp16 blocks on disk; the model alone; the peer."""
    texts = texts_like(PASSAGE_CHARACTERS, bench.sizes.texts, 3)
    vectors, flops = _our_encoding(bench, texts)
    bench.free_memory()
    work = partial(_peer_encoding, bench, texts[: len(vectors)], vectors, flops)
    bench.attempt("sentence-transformers", 10 * bench.on_gpu, work)


def _our_encoding(bench: Bench, texts: list[str]) -> tuple[np.ndarray, float]:
    """Return the vectors of the first texts and the operations of their forward passes."""
    backbone: Any = load_backbone(bench.model, AutoConfig.from_pretrained(bench.model), "cls", 0)
    encoder = Encoder(
        backbone.to(bench.device), load_tokenizer(bench.model), TextRules(LENGTH), "cls", False, bench.device,
        bench.precision, 512, token_budget(0, bench.device),
    )  # fmt: skip
    encoder.encode(texts[:512])  # a warm-up
    head = texts[:HEAD]
    table, figures = bench.time(lambda: encoder.tokenize(head))
    bench.record("our tokenizer alone, one process", PART, figures | _passages(head))
    flops = forward_flops(bench, table.lengths)

    def alone(name: str, encoder: Encoder) -> np.ndarray:
        vectors, figures = bench.time(lambda: encoder.encode_tokens(table))
        figures |= _passages(head) | {"flops": flops}
        bench.record(f"our model alone, {name}", PART, figures)
        return vectors

    vectors = alone(f"{encoder.tokens_per_batch} tokens", encoder)
    bench.profile(lambda: encoder.encode_tokens(table))
    whole_flops = flops * len(texts) / len(head)
    work = partial(_encode_collection, bench, encoder, texts, whole_flops)
    bench.attempt("ours", 10 * bench.on_gpu, work)
    for tokens in filter(None, bench.sizes.tokens):
        larger = replace(encoder, tokens_per_batch=tokens, batch_size=tokens)
        bench.attempt(f"{tokens} tokens", 5, partial(alone, f"{tokens} tokens", larger))
    if bench.on_gpu:  # without autocast, as the peer has it
        low = replace(encoder, tower=backbone.to(bench.dtype), precision="fp32")
        bench.attempt("16-bit weights", 5, partial(alone, "16-bit weights", low))
    return vectors, flops


def _encode_collection(bench: Bench, encoder: Encoder, texts: list[str], flops: float) -> None:
    folder = bench.folder / "collection"
    folder.mkdir()
    with open(folder / "part-00", "w", encoding="utf-8", newline="") as file:
        file.writelines(map(format_passage, texts))
    workers = worker_count(-1, bench.device)

    def whole() -> None:
        collection = PassageCollection(folder)
        store = open_store(bench.folder / "vectors", {}, len(texts), encoder.width, bench.sizes.block_rows)
        encode_collection(encoder, collection, store, 1e9, workers)

    _, figures = bench.time(whole)
    figures |= _passages(texts) | {"flops": flops}
    more = {"workers": workers, "tokens_per_batch": encoder.tokens_per_batch}
    bench.record("ours, disk to disk", OURS, figures | more)


def _peer_encoding(bench: Bench, texts: list[str], ours: np.ndarray, flops: float) -> None:
    """SentenceTransformer.encode with weights in 16 bits; it sorts by length."""
    model = bi_encoder(bench.model, LENGTH, str(bench.device), bench.dtype, "cls")
    for size in bench.sizes.peer_batches:
        options = {"batch_size": size, "convert_to_tensor": True, "show_progress_bar": False}
        model.encode(texts[:size], **options)  # a warm-up
        vectors, figures = bench.time(partial(model.encode, texts, **options))
        theirs = vectors.float().cpu().numpy()
        sizes = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        cosine = float((np.einsum("nh,nh->n", theirs, ours) / sizes).min())
        figures |= _passages(texts) | {"flops": flops, "cosine_with_ours": cosine}
        bench.record(f"sentence-transformers, batches of {size}", PEER, figures)


def _passages(texts: list[str]) -> Figures:
    return {"count": len(texts), "unit": "passages"}


# Re-ranking


def rerank(bench: Bench) -> None:
    """Logits of (query, passage) pairs, tokenizing included; the model alone; the peer."""
    count = bench.sizes.pairs
    queries = texts_like(QUERY_CHARACTERS, -(-count // DEPTH), 5)
    passages = texts_like(PASSAGE_CHARACTERS, count, 4)
    query_of = (np.arange(count) // DEPTH).astype(np.int32)
    rows, scores = np.full(count, -1), np.zeros(count, dtype=np.float32)
    pairs = Candidates(queries, query_of, rows, scores, None, None, passages)
    logits, flops = _our_scoring(bench, pairs)
    bench.free_memory()
    texts = [(queries[at], text) for at, text in zip(query_of, passages, strict=True)][: len(logits)]
    bench.attempt("CrossEncoder", 10 * bench.on_gpu, partial(_peer_scoring, bench, texts, logits, flops))


def _our_scoring(bench: Bench, pairs: Candidates) -> tuple[np.ndarray, float]:
    """Return the logits of the first pairs and the operations of their forward passes."""
    model = load_cross_encoder(bench.model, AutoConfig.from_pretrained(bench.model), 0, trained=True)
    scorer = PairScorer(
        model.to(bench.device), load_tokenizer(bench.model), TextRules(LENGTH), bench.device, bench.precision,
        512, token_budget(0, bench.device),
    )  # fmt: skip
    head = pairs.head(-(-min(HEAD, len(pairs)) // DEPTH), DEPTH)
    tokenized = scorer.tokenize([head.queries[at] for at in head.query_of], head.passages(0, len(head)))
    flops = forward_flops(bench, tokenized.lengths)
    scorer.score(tokenized)  # a warm-up

    def alone(scorer: PairScorer) -> np.ndarray:
        logits, figures = bench.time(lambda: scorer.score(tokenized))
        figures |= _pairs(len(head)) | {"flops": flops}
        bench.record(f"our model alone, {scorer.tokens_per_batch} tokens", PART, figures)
        return logits

    logits = alone(scorer)
    bench.profile(lambda: scorer.score(tokenized))
    _, figures = bench.time(lambda: scorer.score_all(pairs))
    figures |= {"flops": flops * len(pairs) / len(head), "tokens_per_batch": scorer.tokens_per_batch}
    bench.record("ours, with tokenizing", OURS, figures | _pairs(len(pairs)))
    for tokens in filter(None, bench.sizes.tokens):
        larger = replace(scorer, tokens_per_batch=tokens, batch_size=tokens)
        bench.attempt(f"{tokens} tokens", 5, partial(alone, larger))
    return logits, flops


def _peer_scoring(bench: Bench, pairs: list[tuple[str, str]], ours: np.ndarray, flops: float) -> None:
    """CrossEncoder.predict with weights in 16 bits; it sorts by length."""
    model = cross_encoder(bench.model, LENGTH, str(bench.device), bench.dtype)
    for size in bench.sizes.peer_batches:
        options = {"batch_size": size, "show_progress_bar": False}
        model.predict(pairs[:size], **options)  # a warm-up
        scores, figures = bench.time(partial(model.predict, pairs, **options))
        difference = float(np.abs(np.asarray(scores, np.float32).reshape(-1) - ours).max())
        figures |= _pairs(len(pairs)) | {"flops": flops, "largest_difference": difference}
        bench.record(f"CrossEncoder, batches of {size}", PEER, figures)


def _pairs(count: int) -> Figures:
    return {"count": count, "unit": "pairs"}


# Exact search


def exact_search(bench: Bench) -> None:
    """The top k of all queries over random unit vectors that lie on the device from the start.

    Ours gets them as the chunks that a search leaves cached on the GPU, and returns exact results with fp64
    scores. The peers return the results of 16-bit products.
    """
    sizes = bench.sizes
    comparison = SearchComparison(bench)
    vectors, first = comparison.vectors, sizes.queries[0]
    for memory_gb in sizes.search_memory_gb:
        find = OurSearch(bench, vectors, memory_gb).find
        comparison.add(f"ours, {memory_gb:g} GB", OURS, find)
    if bench.profiling:
        part = OurSearch(bench, vectors[: 10 * GENERATED_ROWS], sizes.search_memory_gb[0])
        bench.profile(lambda: part.find(comparison.queries[:first]))
    comparison.add("torch matmul + topk, fp16", PEER, partial(blockwise_topk, vectors, topk=sizes.topk))
    name = "faiss GpuIndexFlatIP, fp16"
    bench.attempt(name, 20 * bench.on_gpu, partial(_add_flat_index, bench, comparison, name))
    for count in sizes.queries[1:]:
        comparison.measure_all(count)


class SearchComparison:
    """The vectors, the queries, and the searches that are compared."""

    def __init__(self, bench: Bench):
        self.bench, sizes, self.rows = bench, bench.sizes, bench.sizes.rows
        if bench.on_gpu:
            room = int(VECTOR_SHARE * free_gpu_memory(bench.device))
            self.rows = min(self.rows, room // (2 * sizes.hidden))
        if self.rows < sizes.rows:
            bench.skip(f"{sizes.rows:,} rows", f"the GPU's memory allows {self.rows:,}")
        self.vectors = unit_vectors(self.rows, sizes.hidden, bench.device)
        self.queries = unit_vectors(max(sizes.queries), sizes.hidden, bench.device, seed=1)
        self.variants: dict[str, tuple[str, Find, float]] = {}
        self.seconds_per_query: dict[str, float] = {}
        self.expected: dict[int, np.ndarray] = {}  # number of queries -> our rows

    def add(self, name: str, side: str, find: Find, memory_gb: float = 0.0) -> None:
        """Measure a search with the smallest number of queries, and keep it for the others.

        memory_gb: what it holds outside of torch; 0 for a search in torch.
        """
        self.variants[name] = side, find, memory_gb
        self.attempt(name, self.bench.sizes.queries[0])

    def measure_all(self, count: int) -> None:
        """Measure the faster of ours, and the peers, with `count` queries."""
        for side in (OURS, PEER):
            names = [name for name in self.seconds_per_query if self.variants[name][0] == side]
            names.sort(key=lambda name: self.seconds_per_query[name])
            for name in names[:1] if side == OURS else names:
                if side == OURS or count in self.expected:
                    self.attempt(name, count)
                else:
                    self.bench.skip(f"{name}, {count:,} queries", "ours was not measured")

    def attempt(self, name: str, count: int) -> None:
        seconds = self.seconds_per_query.get(name, 0.0) * count
        self.bench.attempt(f"{name}, {count:,} queries", seconds, partial(self._measure, name, count))

    def _measure(self, name: str, count: int) -> None:
        (side, find, memory_gb), queries = self.variants[name], self.queries[:count]
        if name not in self.seconds_per_query:
            find(queries[: max(1, count // 8)])  # a warm-up
        (rows, note), figures = self.bench.time(lambda: find(queries))
        figures["peak_gb"] = memory_gb or figures["peak_gb"]
        self.seconds_per_query[name] = figures["seconds"] / count
        figures |= {"work": f"{count:,} queries", "count": count, "unit": "queries", "rows": self.rows}
        figures |= {"flops": 2.0 * count * self.rows * self.bench.sizes.hidden, "note": note}
        if side == OURS:
            self.expected.setdefault(count, rows)
        if count in self.expected:
            figures["recall_against_ours"] = agreement(rows, self.expected[count])
        self.bench.record(f"{name}, {count:,} queries", side, figures)


class OurSearch:
    """The project's exact search over vectors (N, H) fp16 that are already on the device."""

    def __init__(self, bench: Bench, vectors: torch.Tensor, memory_gb: float):
        self.sizes, self.device, self.memory_gb = bench.sizes, bench.device, memory_gb
        rows, hidden = vectors.shape
        self.store = VectorStore(bench.folder / "none", new_manifest({}, rows, hidden, GENERATED_ROWS))
        self.cache = DeviceCache([bench.device])
        chunk = chunk_rows(bench.sizes.queries_at_once, hidden, memory_gb, [bench.device])
        self.cache.chunks[0] = [(first, vectors[first : first + chunk]) for first in range(0, rows, chunk)]
        self.cache.complete = True  # nothing is read from the store
        self.kind = choose_kind("auto", hidden, bench.device)

    def find(self, queries: torch.Tensor) -> tuple[np.ndarray, str]:
        found, total = [], SearchStats()
        for part in queries.float().cpu().split(self.sizes.queries_at_once):
            rows, _, stats = search(
                self.store,
                part.numpy(),
                self.sizes.topk,
                [self.device],
                self.kind,
                self.memory_gb,
                self.cache,
            )
            found.append(rows)
            total.add(stats)
        return np.concatenate(found), f"{self.kind} {total}"


def unit_vectors(rows: int, hidden: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return random vectors (rows, hidden) float16 of length 1 on the device."""
    vectors = torch.empty(rows, hidden, dtype=torch.float16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for chunk in vectors.split(GENERATED_ROWS):
        random = torch.randn(chunk.shape, generator=generator, device=device)
        chunk.copy_(torch.nn.functional.normalize(random, dim=1))
    return vectors


def blockwise_topk(
    vectors: torch.Tensor, queries: torch.Tensor, topk: int, at_once: int = 2000
) -> tuple[np.ndarray, str]:
    """Return the rows (B, K) int64 of the best fp16 products, block after block of the vectors."""
    found = []
    for part in queries.split(at_once):
        scores = torch.full((len(part), topk), -torch.inf, dtype=vectors.dtype, device=vectors.device)
        rows = torch.zeros(scores.shape, dtype=torch.int64, device=vectors.device)
        for at, block in enumerate(vectors.split(GENERATED_ROWS)):
            best = torch.topk(part @ block.T, min(topk, len(block)), dim=1)
            both = torch.cat([rows, best.indices + at * GENERATED_ROWS], 1)
            scores, order = torch.topk(torch.cat([scores, best.values], 1), topk, dim=1)
            rows = both.gather(1, order)
        found.append(rows)
    return torch.cat(found).cpu().numpy(), ""


def _add_flat_index(bench: Bench, comparison: SearchComparison, name: str) -> None:
    """Fill a flat faiss index on the GPU and add its search to the comparison."""
    faiss, resources = faiss_on_gpu(bench)
    if resources is None:
        return bench.skip(name, "faiss has no GPU here")
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16, config.device = True, bench.device.index or 0
    index = faiss.GpuIndexFlatIP(resources, bench.sizes.hidden, config)

    def fill() -> None:
        for chunk in comparison.vectors.split(GENERATED_ROWS):
            index.add(chunk.float())

    def find(queries: torch.Tensor) -> tuple[np.ndarray, str]:
        parts = queries.float().split(bench.sizes.queries_at_once)
        found = [index.search(part, bench.sizes.topk)[1] for part in parts]
        return torch.cat(found).cpu().numpy(), ""

    before = free_gpu_memory(bench.device)
    _, figures = bench.time(fill)
    held = (before - free_gpu_memory(bench.device)) / 1e9  # faiss has an allocator of its own
    bench.record(f"{name}, filling", PART, figures | {"count": index.ntotal, "unit": "rows", "peak_gb": held})
    comparison.add(name, PEER, find, held)


def faiss_on_gpu(bench: Bench) -> tuple[Any, Any]:
    """Return (faiss, its resources on the GPU, None without a GPU); faiss then takes torch tensors too."""
    faiss = load_faiss()
    if not bench.on_gpu or not getattr(faiss, "get_num_gpus", lambda: 0)():
        return faiss, None
    import_module("faiss.contrib.torch_utils")
    return faiss, faiss.StandardGpuResources()


# Inverted lists


def inverted_file(bench: Bench) -> None:
    """Training and filling an IVF index on the GPU (ours, in the ratio) and on the CPU (the peer).

    The vectors are in clusters, as those of passages are, and come from host memory. Recall: of the exact
    top k, with 64 probed lists.
    """
    sizes = bench.sizes
    vectors = clustered_vectors(sizes.index_rows, sizes.hidden, bench.device)
    queries = clustered_vectors(min(INDEX_QUERIES, sizes.index_rows), sizes.hidden, bench.device, seed=1)
    exact, _ = blockwise_topk(vectors, queries, sizes.topk)
    host, asked = vectors.cpu(), queries.float().cpu().numpy()
    del vectors, queries
    bench.free_memory()
    faiss, resources = faiss_on_gpu(bench)
    work = partial(_build_index, bench, faiss, host, asked, exact)
    if resources is None:
        bench.skip("GPU", "faiss has no GPU here")
    else:
        bench.attempt("GPU", 10, partial(work, "GPU", OURS, resources))
    bench.attempt("CPU", 40 * bench.on_gpu, partial(work, "CPU", PEER, None))


def _build_index(
    bench: Bench, faiss: Any, host: torch.Tensor, queries: np.ndarray, exact: np.ndarray,
    name: str, side: str, resources: Any,
) -> None:  # fmt: skip
    sizes = bench.sizes
    index = new_index(sizes.index, sizes.hidden)
    lists = inverted_lists(index)
    sample = host[: min(len(host), 64 * lists, MAX_TRAINING)].float().numpy()
    free = free_gpu_memory(bench.device) if resources is not None else 0
    if resources is not None:
        index = faiss.index_cpu_to_gpu(resources, bench.device.index or 0, index)
    _, training = bench.time(lambda: index.train(sample))
    training.pop("peak_gb")  # torch's
    more = {"work": "training", "count": len(sample), "unit": "vectors"}
    bench.record(f"{name}: {sizes.index}, training", side, training | more)

    def fill() -> None:
        for chunk in host.split(FILL_ROWS):
            index.add(chunk.float().numpy())

    _, filling = bench.time(fill)
    filling.pop("peak_gb")
    if resources is not None:
        filling["peak_gb"] = (free - free_gpu_memory(bench.device)) / 1e9
    more = {"work": "filling", "count": len(host), "unit": "vectors"}
    bench.record(f"{name}: {sizes.index}, filling", side, filling | more)
    index.nprobe = min(PROBES, lists)
    found, searching = bench.time(lambda: index.search(queries, sizes.topk)[1])
    searching.pop("peak_gb")
    more = {"work": "searching", "count": len(queries), "unit": "queries"}
    recall = {"recall": agreement(found, exact)}
    bench.record(f"{name}: {sizes.index}, {index.nprobe} probes", side, searching | more | recall)


def clustered_vectors(rows: int, hidden: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return fp16 vectors (rows, hidden) of length 1 around 1,000 centers, the same for every seed."""
    centers = unit_vectors(1000, hidden, device)
    vectors = unit_vectors(rows, hidden, device, seed=1 + seed)
    generator = torch.Generator(device).manual_seed(seed)
    for chunk in vectors.split(GENERATED_ROWS):
        center = centers[torch.randint(len(centers), (len(chunk),), generator=generator, device=device)]
        chunk.copy_(torch.nn.functional.normalize((chunk + center).float(), dim=1))
    return vectors


# the order in which they run: the cheap ones that the others are compared with first
SECTIONS = {
    "ceilings": Section(ceilings, 3, 5),
    "train": Section(train, 25, 30),
    "encode": Section(encode, 16, 20),
    "rerank": Section(rerank, 12, 15),
    "search": Section(exact_search, 28, 30),
    "ivf": Section(inverted_file, 20, 30),
}
