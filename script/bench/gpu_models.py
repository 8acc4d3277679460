"""Sections of gpu.py: the rates of the card, and training, encoding and re-ranking against their peers."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from script.bench.common import Figures
from script.bench.gpu_runs import OURS, PART, PEER, Bench
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
from torch_src.models.tokenization import TextRules, TokenTable, load_tokenizer
from torch_src.retrieval.encoding import Encoder, encode_collection
from torch_src.retrieval.gpu_inference import encoder_on_gpu, scorer_on_gpu
from torch_src.retrieval.reranking import PairScorer
from torch_src.runtime.devices import autocast, token_budget, worker_count

LENGTH, QUERY_LENGTH = 384, 32  # tokens
ROWS = 4096  # maximum texts in a forward pass
HEAD = 8192  # texts or pairs that the model alone and the peers get
DEPTH = 50  # passages per query to re-rank
LR = 3e-5


def forward_flops(bench: Bench, lengths: Iterable[int] | np.ndarray) -> float:
    """Return the operations of the encoder's forward pass over texts of these lengths in tokens.

    Per layer and token 12 H^2 weights, a multiplication and an addition each; attention adds 4 H L. Padding
    is not counted.
    """
    tokens = np.fromiter(lengths, dtype=np.float64)
    hidden = bench.sizes.hidden
    return float(bench.sizes.layers * (24 * hidden**2 * tokens + 4 * hidden * tokens**2).sum())


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
        size = f"{texts} texts" + (f", {tokens} tokens" if tokens else "") + " a pass"
        name = "ours, passes chosen from free memory" if texts < 0 else f"ours, {size}"
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
        share_encoder=True, q_max_seq_len=QUERY_LENGTH, p_max_seq_len=LENGTH, epoch=1000,
    )  # fmt: skip


def _our_update(bench: Bench, name: str, chunk: int, tokens: int, profiled: bool) -> None:
    """Updates of the trainer, the next batches prepared by as many workers as in a run of 1,000 updates."""
    stage = training_stage(_settings(bench, chunk, tokens))
    stage.load()
    trainer, chunking = stage.trainer(bench.folder / "train_output", {}), stage.task.chunking
    batches = trainer.prepared((epoch, 0) for epoch in range(2 + bench.sizes.updates))
    first = next(batches)
    losses = [trainer.update(0, [first]).loss]
    lengths = [*first.queries.lengths.tolist(), *first.passages.lengths.tolist()]

    def updates() -> None:
        for step in range(1, 1 + bench.sizes.updates):
            losses.append(trainer.update(step, [next(batches)]).loss)

    _, figures = bench.time(updates)
    figures |= {"chunk_texts": chunking.texts, "chunk_tokens": chunking.tokens}
    figures |= {"workers": trainer.options.workers}
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
    if bench.on_gpu:  # last, because compiling may take the rest of the time
        bench.attempt("torch.compile", 20, partial(_compiled_encoding, bench, texts[:HEAD], flops))


def _encoder(bench: Bench) -> Encoder:
    backbone: Any = load_backbone(bench.model, AutoConfig.from_pretrained(bench.model), "cls", 0)
    return Encoder(
        backbone.to(bench.device), load_tokenizer(bench.model), TextRules(LENGTH), "cls", False, bench.device,
        bench.precision, ROWS, token_budget(0, bench.device),
    )  # fmt: skip


def _our_encoding(bench: Bench, texts: list[str]) -> tuple[np.ndarray, float]:
    """Return the vectors of the first texts and the operations of their forward passes."""
    encoder, head = _encoder(bench), texts[:HEAD]
    table, figures = bench.time(lambda: encoder.tokenize(head))
    bench.record("our tokenizer alone, one process", PART, figures | _passages(head))
    flops = forward_flops(bench, table.lengths)

    def alone(name: str, encoder: Encoder) -> np.ndarray:
        return _encoder_alone(bench, name, encoder, table, flops)

    def with_cudnn() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            alone("cuDNN attention allowed", encoder)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)

    if bench.on_gpu:  # before the weights are converted
        bench.attempt("autocast", 5, partial(alone, "autocast, 32768 tokens", encoder))
    encoder = encoder_on_gpu(encoder, "passage encoder")
    vectors = alone(f"{encoder.tokens_per_batch} tokens", encoder)
    bench.profile(lambda: encoder.encode_tokens(table))
    if bench.on_gpu:
        bench.attempt("cuDNN attention", 5, with_cudnn)
    whole_flops = flops * len(texts) / len(head)
    work = partial(_encode_collection, bench, encoder, texts, whole_flops)
    bench.attempt("ours", 10 * bench.on_gpu, work)
    for tokens in filter(None, bench.sizes.tokens):
        other = replace(encoder, tokens_per_batch=tokens)
        bench.attempt(f"{tokens} tokens", 5, partial(alone, f"{tokens} tokens", other))
    return vectors, flops


def _compiled_encoding(bench: Bench, head: list[str], flops: float) -> None:
    encoder = encoder_on_gpu(_encoder(bench))
    compiled: Any = torch.compile(encoder.tower, dynamic=True)
    table = encoder.tokenize(head)
    _encoder_alone(bench, "torch.compile", replace(encoder, tower=compiled), table, flops)


def _encoder_alone(bench: Bench, name: str, encoder: Encoder, table: TokenTable, flops: float) -> np.ndarray:
    """Record the forward passes; `first_seconds`: of the first ones, when their shapes are new."""
    _, first = bench.time(lambda: encoder.encode_tokens(table))
    vectors, figures = bench.time(lambda: encoder.encode_tokens(table))
    figures |= {"count": len(table), "unit": "passages", "flops": flops, "first_seconds": first["seconds"]}
    bench.record(f"our model alone, {name}", PART, figures)
    return vectors


def _encode_collection(bench: Bench, encoder: Encoder, texts: list[str], flops: float) -> None:
    folder = bench.folder / "collection"
    folder.mkdir()
    with open(folder / "part-00", "w", encoding="utf-8", newline="") as file:
        file.writelines(map(format_passage, texts))
    workers = worker_count(-1, bench.device, len(texts))

    def whole() -> None:
        collection = PassageCollection(folder)
        store = open_store(bench.folder / "vectors", {}, len(texts), encoder.width, bench.sizes.block_rows)
        encode_collection(encoder, encoder.texts_of(collection), store, 1e9, workers)

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
    queries = texts_like(QUERY_CHARACTERS, math.ceil(count / DEPTH), 5)
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
        ROWS, token_budget(0, bench.device),
    )  # fmt: skip
    head = pairs.head(math.ceil(min(HEAD, len(pairs)) / DEPTH), DEPTH)
    tokenized = scorer.tokenize([head.queries[at] for at in head.query_of], head.passages(0, len(head)))
    flops = forward_flops(bench, tokenized.lengths)

    def alone(name: str, scorer: PairScorer) -> np.ndarray:
        scorer.score(tokenized)  # the first pass of a shape is slower
        logits, figures = bench.time(lambda: scorer.score(tokenized))
        figures |= _pairs(len(head)) | {"flops": flops}
        bench.record(f"our model alone, {name}", PART, figures)
        return logits

    if bench.on_gpu:  # before the weights are converted
        bench.attempt("autocast", 5, partial(alone, "autocast, 32768 tokens", scorer))
    scorer = scorer_on_gpu(scorer)
    logits = alone(f"{scorer.tokens_per_batch} tokens", scorer)
    bench.profile(lambda: scorer.score(tokenized))
    workers = worker_count(-1, bench.device, len(pairs))
    _, figures = bench.time(lambda: list(scorer.score_candidates(pairs, [(0, len(pairs))], workers)))
    figures |= {"flops": flops * len(pairs) / len(head), "workers": workers}
    bench.record("ours, with tokenizing", OURS, figures | _pairs(len(pairs)))
    for tokens in filter(None, bench.sizes.tokens):
        other = replace(scorer, tokens_per_batch=tokens)
        bench.attempt(f"{tokens} tokens", 5, partial(alone, f"{tokens} tokens", other))
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
