"""do_dual_infer.py: queries + collection + output/dual_params.bin -> query.emb.npy, para_emb/, res.top50."""

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from torch_src import hparams
from torch_src.backbones import check_fits, load_config, load_weights, model_fingerprint
from torch_src.collection import PassageCollection
from torch_src.devices import choose_device, choose_precision, peak_memory_gb, set_threads
from torch_src.dual_hparams import DEBUG as TRAIN_DEBUG
from torch_src.dual_hparams import FIXED_BY_WEIGHTS, DualHparams
from torch_src.dual_model import DualEncoder, build_backbone, load_backbone
from torch_src.encoding import Encoder, encode_collection
from torch_src.errors import UserError
from torch_src.formats import RunRow, format_run_row, read_q2qid, read_queries
from torch_src.helpers import atomic_write, exit_status, read_json, require, say, warn
from torch_src.inference_de_hparams import DEBUG, PRETRAINED, InferenceDeHparams
from torch_src.passage_ids import iter_json_pairs
from torch_src.search import load_faiss, search
from torch_src.stamps import clear_stamp, fingerprint_files, fingerprint_text, up_to_date, write_stamp
from torch_src.tokenization import TextRules, load_tokenizer, tokenizer_fingerprint
from torch_src.vectors import VectorStore, save_vectors


@dataclass
class TrainedModel:
    """What is needed to encode: settings fixed by the weights, where the model lies, its tokenizer, its
    fingerprint.
    """

    fixed: dict
    path: str  # folder or hub name of configuration and tokenizer (and of the weights, when not fine-tuned)
    params: str | None  # dual_params.bin, None for the pretrained model as it is
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    config: object = field(repr=False, default=None)


def find_model(hp: InferenceDeHparams) -> TrainedModel:
    """Return the model that the settings name; UserError where an option contradicts what the weights fix."""
    if hp.dual_params == PRETRAINED:
        return _pretrained_model(hp)
    params = require(
        hp.dual_params_path, "trained weights", "run do_dual_train.py first, or pass --dual_params none"
    )
    record_path = Path(params).parent / "dual_hparams.json"
    record = read_json(
        require(record_path, "the settings of dual_params.bin, written beside it by do_dual_train.py")
    )
    if "fixed_by_weights" not in record or "tokenizer" not in record:
        raise UserError(f"{record_path}: not written by do_dual_train.py")
    fixed = record["fixed_by_weights"]
    for name in FIXED_BY_WEIGHTS:
        asked = getattr(hp, name)
        if asked is not None and asked != fixed[name]:
            raise UserError(
                f"--{name} {asked!r}: {params} was trained with {fixed[name]!r}, "
                "and vectors made otherwise would be wrong; leave the option out, or train again"
            )
    beside = Path(params).parent / "dual_model"
    path = hp.pretrained_model_path or (str(beside) if beside.exists() else record["pretrained_model_path"])
    tokenizer = load_tokenizer(path, "" if path == str(beside) else fixed["vocab_path"])
    if tokenizer_fingerprint(tokenizer) != record["tokenizer"]:
        raise UserError(
            f"{path}: its tokenizer is not the one that {params} was trained with; leave the option out"
        )
    return TrainedModel(fixed, path, params, tokenizer, fingerprint_files([params]), load_config(path))


def _pretrained_model(hp: InferenceDeHparams) -> TrainedModel:
    trained = replace(DualHparams(), **TRAIN_DEBUG) if hp.debug else DualHparams()
    path = hp.pretrained_model_path or trained.pretrained_model_path
    fixed = {n: getattr(trained, n) if getattr(hp, n) is None else getattr(hp, n) for n in FIXED_BY_WEIGHTS}
    tokenizer = load_tokenizer(path, fixed["vocab_path"])
    fingerprint = fingerprint_text(f"{model_fingerprint(path)} seed {hp.seed}")
    return TrainedModel(fixed, path, None, tokenizer, fingerprint, load_config(path))


def load_model(model: TrainedModel, seed: int) -> DualEncoder:
    """Return the dual encoder with its weights, on the CPU."""
    fixed = model.fixed
    shape = (fixed["share_encoder"], fixed["pooling"], fixed["normalize"])
    if model.params is None:
        return DualEncoder(load_backbone(model.path, model.config, fixed["pooling"], seed), *shape)
    encoder = DualEncoder(build_backbone(model.config, fixed["pooling"]), *shape)
    load_weights(model.params, encoder, "do_dual_train.py")
    return encoder


class DualInference:
    """One inference run, its inputs checked before anything long starts."""

    def __init__(self, hp: InferenceDeHparams, topk: int, bs: int):
        self.hp, self.topk, self.bs = hp, topk, bs
        self.device = choose_device(hp.device)
        self.precision = choose_precision(hp.precision, self.device)
        self.threads = set_threads(hp.threads)
        say(f"device {self.device}  precision {self.precision}  threads {self.threads}")
        load_faiss()
        self.queries = read_queries(hp.dev_q_path)
        self._check_qids()
        self.model = find_model(hp)
        lengths = {name: self.model.fixed[name] for name in ("q_max_seq_len", "p_max_seq_len")}
        check_fits(self.model.config, len(self.model.tokenizer), lengths, self.model.path)
        self.collection = PassageCollection(hp.passage_dir_path, str(Path(hp.output_dir) / "cache"))
        self.output = Path(hp.output_dir)

    def _check_qids(self) -> None:
        """Every query must be known to q2qid, else the converter would fail after hours of encoding."""
        if self.hp.dev_q2qid == "none":
            return
        q2qid = read_q2qid(
            require(self.hp.dev_q2qid_path, "query text -> qid", "pass --dev_q2qid none to go without")
        )
        missing = [query for query in self.queries if query not in q2qid]
        if missing:
            raise UserError(
                f"{self.hp.dev_q2qid_path}: {len(missing)} queries of {self.hp.dev_q_path} are missing, "
                f"the first: {missing[0][:60]!r}"
            )
        if len(q2qid) > len(self.queries):
            warn(
                f"{self.hp.dev_q2qid_path} has {len(q2qid)} queries, {self.hp.dev_q_path} only "
                f"{len(self.queries)} of them: the others will have no result"
            )

    def check_passage_ids(self) -> None:
        """The map must be exactly as long as the collection, or every pid after the gap would be wrong."""
        if self.hp.passage_ids == "none":
            return
        path = require(self.hp.passage_ids_path, "row -> pid", "pass --passage_ids none to go without")
        count = sum(1 for _ in iter_json_pairs(path))
        if count != len(self.collection):
            raise UserError(
                f"{path}: {count:,} ids, but the collection has {len(self.collection):,} passages"
            )

    def vector_stamp(self, side: str) -> dict:
        """Return what decides the vectors of one side."""
        fixed = self.model.fixed
        length = {"query": "q_max_seq_len", "passage": "p_max_seq_len"}[side]
        names = ("pooling", "normalize", "remove_spaces", f"{side}_prefix", length)
        return {
            "weights": self.model.fingerprint, "tokenizer": tokenizer_fingerprint(self.model.tokenizer),
            **{name: fixed[name] for name in names}, "precision": self.precision,
            "device": self.device.type, "threads": self.threads, "batch_size": self.hp.batch_size,
            "tokens_per_batch": self.hp.tokens_per_batch,
        }  # fmt: skip

    def run_stamp(self) -> dict:
        """Return what decides res.top{k}."""
        sides = {
            f"{side} {k}": v for side in ("query", "passage") for k, v in self.vector_stamp(side).items()
        }
        texts = {
            "queries": fingerprint_text("\n".join(self.queries)),
            "collection": self.collection.fingerprint,
        }
        return {"stage": "dual_infer", **sides, **texts, "block_rows": self.hp.block_rows, "topk": self.topk}

    def encoder(self, side: str, model: DualEncoder) -> Encoder:
        fixed, hp = self.model.fixed, self.hp
        length = {"query": "q_max_seq_len", "passage": "p_max_seq_len"}[side]
        rules = TextRules(fixed[length], fixed[f"{side}_prefix"], fixed["remove_spaces"])
        return Encoder(
            model.tower(side).to(self.device).eval(), self.model.tokenizer, rules, fixed["pooling"],
            fixed["normalize"], self.device, self.precision, hp.batch_size, hp.tokens_per_batch,
        )  # fmt: skip

    def encode(self) -> tuple[np.ndarray, VectorStore]:
        """Return the query vectors (B, H) float32 and the passage vectors on disk; one tower on the device at
        a time.
        """
        model = load_model(self.model, self.hp.seed)
        queries = self.encoder("query", model).encode(self.queries)
        save_vectors(self.output / "query.emb.npy", queries)
        write_stamp(self.output / "query.emb.npy", self.vector_stamp("query"))
        if model.query_encoder is not model.passage_encoder:
            model.query_encoder = None  # its memory is the passage tower's now
        stamp = {**self.vector_stamp("passage"), "collection": self.collection.fingerprint}
        store = VectorStore.create_or_continue(
            self.output / "para_emb", stamp, len(self.collection), queries.shape[1], self.hp.block_rows, say,
            self.hp.force,
        )  # fmt: skip
        if store.missing_blocks():
            encode_collection(self.encoder("passage", model), self.collection, store, self.hp.log_every)
        else:
            say(f"{store.folder}: vectors up to date ({store.rows:,} passages)")
        return queries, store

    def write_run(self, path: Path, queries: np.ndarray, store: VectorStore) -> None:
        """Search `bs` queries a round and write the run, in the order of the queries."""
        clear_stamp(path)
        with atomic_write(path) as file:
            for start in range(0, len(queries), self.bs):
                rows, scores = search(store, queries[start : start + self.bs], self.topk, self.device)
                for query, found, values in zip(
                    self.queries[start:], rows.tolist(), scores.tolist(), strict=False
                ):
                    for rank, (row, score) in enumerate(zip(found, values, strict=True), start=1):
                        file.write(format_run_row(RunRow(query, row, rank, score)))
                say(f"searched {min(start + self.bs, len(queries)):,}/{len(queries):,} queries")
        write_stamp(path, self.run_stamp())


def run(hp: InferenceDeHparams, topk: int, bs: int) -> None:
    """Encode, search and write the run, unless it is up to date."""
    hparams.announce("encode and search", hp)
    topk, bs = hp.topk or topk, hp.bs or bs
    say(f"topk {topk}  bs {bs}")
    inference = DualInference(hp, topk, bs)
    path = inference.output / f"res.top{topk}"
    if not hp.force and up_to_date(path, inference.run_stamp(), say):
        say(f"{path}: up to date")
        return
    inference.check_passage_ids()
    if len(inference.collection) < topk:
        warn(
            f"the collection has {len(inference.collection)} passages, fewer than topk {topk}: "
            "all of them are kept"
        )
    queries, store = inference.encode()
    gc.collect()
    if inference.device.type == "cuda":
        torch.cuda.empty_cache()
    inference.write_run(path, queries, store)
    hparams.save(
        hp,
        inference.output / "dual_infer_hparams.json",
        topk=topk,
        bs=bs,
        fixed_by_weights=inference.model.fixed,
    )
    say(f"wrote {path} ({len(queries):,} queries x {min(topk, store.rows)})  "
        f"peak memory {peak_memory_gb(inference.device):.2f} GB")  # fmt: skip


def main(argv: list[str], topk: int = 50, bs: int = 1000) -> int:
    """Run with these options (they win over `topk` and `bs`); return the exit status."""
    return exit_status(lambda: run(hparams.parse(InferenceDeHparams, argv, DEBUG), topk, bs))
