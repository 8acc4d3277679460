"""Shared by do_dual_infer.py, do_cross_infer.py and the tools: models; the retriever, also as Python API."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from torch_src.common_hparams import Run
from torch_src.cross_hparams import MODEL_SETTINGS as CROSS_MODEL_SETTINGS
from torch_src.cross_hparams import CrossHparams
from torch_src.data.collection import PassageCollection
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.dual_hparams import MODEL_SETTINGS as DUAL_MODEL_SETTINGS
from torch_src.dual_hparams import DualHparams
from torch_src.hparams import NONE, check_range, from_saved
from torch_src.inference_cross_hparams import InferenceCrossHparams
from torch_src.inference_de_hparams import OPENVINO, InferenceDeHparams
from torch_src.models.backbones import (
    architecture,
    check_fits,
    folder_settings,
    load_config,
    load_weights,
    model_checksum,
    reranker_settings,
)
from torch_src.models.cross_encoder import (
    CrossEncoder,
    build_cross_encoder,
    load_cross_encoder,
)
from torch_src.models.dual_encoder import (
    DualEncoder,
    build_backbone,
    describe_retriever,
    load_backbone,
    load_query_backbone,
    pools_prompt,
    vector_width,
)
from torch_src.models.model_folder import log_overrides
from torch_src.models.tokenization import (
    LENGTHS,
    TextRules,
    exclude_prompt,
    load_tokenizer,
    reranker_rules,
    retriever_rules,
    tokenizer_checksum,
)
from torch_src.models.trained_settings import MODEL_FIELDS, model_fields_intact
from torch_src.models.truncation import Truncation, sampled, truncation_of_texts
from torch_src.models.windows import QUARTER, with_windows
from torch_src.retrieval.encoding import Encoder, to_float16
from torch_src.retrieval.engines.openvino import (
    MIN_COSINE,
    TOKENS,
    OpenVinoTower,
    check_openvino,
    smallest_cosine,
)
from torch_src.retrieval.gpu_inference import encoder_on_gpu, scorer_on_gpu
from torch_src.retrieval.hits import Hit
from torch_src.retrieval.passage_windows import PassageWindows, collection_windows
from torch_src.retrieval.reranking import PairScorer
from torch_src.retrieval.vectors import NOT_COMPARED, TEXT_HASH, MemoryVectors, VectorStore
from torch_src.runtime.devices import choose_device, choose_precision, set_threads, token_budget, worker_count
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import read_json, require
from torch_src.runtime.log import log, log_once, silent, warn
from torch_src.runtime.planning import evenly_spaced
from torch_src.runtime.stamps import JsonDict, changed_files, changes, checksum_files, checksum_text
from torch_src.saved_settings import for_vectors, retriever_settings
from torch_src.vector_search import OtherVectors, VectorSearch

CHECKED_TEXTS = 8  # that OpenVINO and torch must encode alike
LOG_SECONDS = 10.0  # between progress lines

InferenceHparams = InferenceDeHparams | InferenceCrossHparams


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from, and its settings."""

    settings: Mapping[str, Any]  # pooling, lengths, prefixes, ...: as in training
    path: str  # folder or hub name of configuration and tokenizer; also of the weights without `params`
    params: str | None  # NAME_params.bin; None: the pretrained weights
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    architecture: str  # computed before loading the weights, which may add fields to `config`
    checksum: str  # of the weights
    seed: int  # of randomly initialized weights

    @property
    def stamp(self) -> JsonDict:
        """Checksums of everything that affects the model's output."""
        return {
            "weights": self.checksum,
            "architecture": self.architecture,
            "tokenizer": tokenizer_checksum(self.tokenizer),
        }

    def check_unchanged(self) -> None:
        """UserError when the weights were replaced during loading."""
        if weights_checksum(self.path, self.params, self.seed) != self.checksum:
            raise UserError(f"{self.params or self.path}: changed while it was being read; run again")


def weights_checksum(path: str, params: str | None, seed: int) -> str:
    """Return the checksum of a model's weights."""
    return checksum_files([params]) if params else checksum_text(f"{model_checksum(path)} seed {seed}")


def find_dual_model(hp: InferenceDeHparams) -> ModelSource:
    """Return the trained retriever, or with `--dual_params none` a pretrained model."""
    if hp.dual_params != NONE and not _planned_before_training(hp.plan, hp.dual_params_path):
        return find_trained_model(hp, "dual", hp.dual_params_path, DUAL_MODEL_SETTINGS)
    return _find_pretrained_model(
        hp, "dual", DualHparams.defaults(hp.debug), folder_settings, DUAL_MODEL_SETTINGS
    )


def find_cross_model(hp: InferenceCrossHparams) -> ModelSource:
    """Return the trained re-ranker, or with `--cross_params none` a pretrained model."""
    if hp.cross_params != NONE and not _planned_before_training(hp.plan, hp.cross_params_path):
        return find_trained_model(hp, "cross", hp.cross_params_path, CROSS_MODEL_SETTINGS)
    return _find_pretrained_model(
        hp, "cross", CrossHparams.defaults(hp.debug), reranker_settings, CROSS_MODEL_SETTINGS
    )


def _planned_before_training(plan: bool, params_path: str) -> bool:
    # the pretrained model needs the same time and memory as a trained one
    return plan and not Path(params_path).exists()


def find_trained_model(
    hp: InferenceHparams, name: str, params_path: str, model_settings: tuple[str, ...]
) -> ModelSource:
    """Return the model of NAME_params.bin; UserError where an option contradicts its settings."""
    program = f"do_{name}_train.py" + (" --debug" if hp.debug else "")
    params = require(params_path, "trained weights", f"run {program} first, or pass --{name}_params none")
    trained_path = Path(params).with_name(f"{name}_hparams.json")
    trained = read_json(require(trained_path, f"settings of {name}_params.bin", f"run {program} again"))
    if "fixed_by_weights" not in trained or "tokenizer" not in trained:
        raise UserError(f"{trained_path}: not written by {program}; train again")
    if "checksum" in trained and not model_fields_intact(trained):
        raise UserError(
            f"{trained_path}: checksum mismatch: {', '.join(MODEL_FIELDS)} belong to the weights and must "
            "not be edited; restore the file, or train again"
        )
    settings = trained["fixed_by_weights"]
    for knob in model_settings:
        value = getattr(hp, knob)
        if knob != "vocab_path" and value is not None and value != settings[knob]:
            raise UserError(
                f"--{knob} {value!r}: {params} was trained with {settings[knob]!r}, so its results would be "
                "wrong; omit the option, or train again"
            )
    checksum = checksum_files([params])
    if trained.get("weights", checksum) != checksum:
        warn(f"{params}: not the weights that {trained_path} describes; its settings are used")
    path, tokenizer, config = _load_trained_model_files(hp, name, params, trained)
    return ModelSource(settings, path, params, tokenizer, config, architecture(config), checksum, hp.seed)


def _load_trained_model_files(
    hp: InferenceHparams, name: str, params: str, trained: JsonDict
) -> tuple[str, PreTrainedTokenizerBase, PretrainedConfig]:
    """Return (path, tokenizer, configuration): of NAME_model/ beside the weights, or of the options."""
    folder = Path(params).with_name(f"{name}_model")
    for changed in changed_files(folder, trained.get("model_files", {})) if folder.exists() else ():
        raise UserError(f"{changed}: missing or checksum mismatch; restore it, or train again")
    start = from_saved("pretrained_model_path", trained["pretrained_model_path"])
    path = hp.pretrained_model_path or (str(folder) if folder.exists() else start)
    vocab_path = hp.vocab_path
    if not vocab_path and path != str(folder):
        vocab_path = trained["fixed_by_weights"]["vocab_path"]
    tokenizer, config = load_tokenizer(path, vocab_path or "", name), load_config(path, kind=name)
    if tokenizer_checksum(tokenizer) != trained["tokenizer"]:
        raise UserError(f"{vocab_path or path}: not the tokenizer of {params}; omit the option")
    is_own = path == str(folder) or not folder.exists()
    if not is_own and architecture(config) != architecture(load_config(str(folder), kind=name)):
        raise UserError(f"{path}: not the configuration that {params} was trained with; omit the option")
    return path, tokenizer, config


def _find_pretrained_model(
    hp: InferenceHparams,
    name: str,
    defaults: DualHparams | CrossHparams,
    stated_by: Callable[[str], dict[str, Any]],
    model_settings: tuple[str, ...],
) -> ModelSource:
    """Return a pretrained model, `name` dual or cross.

    Unset settings are those that its folder states (`stated_by`), else the defaults of training.
    """
    path = hp.pretrained_model_path or defaults.pretrained_model_path
    own = stated_by(path)
    training = replace(defaults, **own)
    settings = {
        knob: getattr(training, knob) if getattr(hp, knob) is None else getattr(hp, knob)
        for knob in model_settings
    }
    config = load_config(path, kind=name)  # first, for its error about a missing folder
    tokenizer = load_tokenizer(path, settings["vocab_path"], name)
    checksum = weights_checksum(path, None, hp.seed)
    log_overrides(path, own, settings)
    return ModelSource(settings, path, None, tokenizer, config, architecture(config), checksum, hp.seed)


def load_dual_model(source: ModelSource) -> DualEncoder:
    """Return the dual encoder with its weights, on the CPU."""
    settings = source.settings
    options = (settings["share_encoder"], settings["pooling"], settings["normalize"])
    if source.params is None:
        start = (source.path, source.config, settings["pooling"], source.seed)
        backbone = load_backbone(*start)
        encoder = DualEncoder(backbone, *options, load_query_backbone(*start))
    else:
        encoder = DualEncoder(build_backbone(source.config, settings["pooling"]), *options)
        load_weights(source.params, encoder, "do_dual_train.py")
    source.check_unchanged()
    return encoder


def load_cross_model(source: ModelSource, trained: bool = True) -> CrossEncoder:
    """Return the cross-encoder with its weights, on the CPU; without `trained` its head may be random."""
    if source.params is None:
        encoder = load_cross_encoder(source.path, source.config, source.seed, trained)
    else:
        encoder = build_cross_encoder(source.config)
        load_weights(source.params, encoder.model, "do_cross_train.py")
    source.check_unchanged()
    return encoder


def pair_rules(source: ModelSource, windows: int = 1, stride: int = QUARTER) -> TextRules:
    """Return how pairs become token ids; `windows` and `stride`: of long passages."""
    rules = reranker_rules(source.settings, source.config)
    return with_windows(rules, source.tokenizer, windows, stride, "max_seq_len")


def pair_scorer(
    source: ModelSource,
    model: CrossEncoder,
    batch_size: int,
    device: torch.device,
    precision: str,
    rules: TextRules | None = None,
) -> PairScorer:
    """Return the scorer of a cross-encoder, which is moved to `device`; `rules`: other than pair_rules."""
    how = (source.tokenizer, rules or pair_rules(source), device, precision)
    return scorer_on_gpu(PairScorer(model.to(device), *how, batch_size, token_budget(0, device)))


def choose_hardware(hp: Run, own_process: bool = True) -> tuple[torch.device, str]:
    """Return (device, precision), after setting the number of threads.

    Without `own_process` threads and memory of the process stay as they are, unless --threads is given.
    """
    device = choose_device(hp.device)
    precision = choose_precision(hp.precision, device)
    threads = set_threads(hp.threads) if own_process or hp.threads else torch.get_num_threads()
    log_once(f"device {device}  precision {precision}  threads {threads}")
    return device, precision


def check_texts(texts: Sequence[str], what: str) -> list[str]:
    """Return the texts as a list; UserError for a single text and for what is no text."""
    if isinstance(texts, str):
        raise UserError(f"{what}: expected a list of texts, not one text")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{what}[{number}]: expected a text, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{what}[{number}]: not valid Unicode (a lone surrogate)") from None
    return texts


class Retriever:
    """A dual encoder and its collection, both checked before any slow step.

    `Retriever.load(...)` returns one for the Python API: it encodes texts and searches for questions, also
    from several threads. The programs make theirs from their settings.
    """

    def __init__(self, hp: InferenceDeHparams, own_process: bool = True):
        """`own_process`: set the threads of the process, and read the collection now, not when it is used."""
        self.hp, self.output, self.lock = hp, Path(hp.output_dir), threading.RLock()
        self.vectors: VectorSearch | None = None
        self.texts: Sequence[str] = ()  # of index()
        self.encoders: dict[str, Encoder] = {}  # by side
        self.device, self.precision = choose_hardware(hp, own_process)
        self.source = source = find_dual_model(hp)
        settings = source.settings
        self.rules = retriever_rules(settings)
        by_knob = {LENGTHS[side]: rules for side, rules in self.rules.items()}
        check_fits(source.config, source.tokenizer, by_knob, source.path)
        if not pools_prompt(source.config):
            self.rules = {side: exclude_prompt(rules, source.tokenizer) for side, rules in self.rules.items()}
        how = (source.tokenizer, hp.passage_windows, hp.window_stride, LENGTHS["passage"])
        self.rules["passage"] = with_windows(self.rules["passage"], *how)
        check_range("vector_dims", hp.vector_dims, 0, vector_width(source.config))
        log(describe_retriever(settings, source.config))
        if hp.encoder_engine == OPENVINO:
            check_openvino(self.device, self.precision, source.settings["pooling"])
        if own_process:
            self.collection  # noqa: B018 (opens it)

    @classmethod
    def load(
        cls,
        path: str | Path = "output",
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int = 0,
        **options: Any,
    ) -> "Retriever":
        """Return the retriever of an output folder of the programs, of a model folder, or of a hub name.

        From an output folder come the weights, the passages, their vectors and the saved settings. A model
        has no passages: pass yours to index(). device: auto, cpu, cuda or cuda:N. precision: auto, bf16, fp16
        or fp32. threads: of this process, 0 leaves them. options: as those of do_dual_infer.py, such as
        data_dir, pooling or query_prefix. UserError, a ValueError, when something is missing.
        """
        hardware = {"device": device, "precision": precision, "threads": threads}
        with silent():
            hp = retriever_settings(str(path), {**options, **hardware})
            manifest = Path(hp.para_emb_path) / "manifest.json"
            has_vectors = hp.output_dir == str(path) and manifest.exists()
            if has_vectors:
                hp = for_vectors(hp, read_json(manifest), choose_device(device).type)
            retriever = Retriever(hp, own_process=False)
            if has_vectors:
                retriever.open_vectors()
            retriever.own_encoder("query")
        return retriever

    @cached_property
    def collection(self) -> PassageCollection:
        return PassageCollection(self.hp.passage_dir_path, self.output / "cache")

    @property
    def width(self) -> int:
        """Dimensions of a stored vector."""
        return self.hp.vector_dims or vector_width(self.source.config)

    def passage_ids(self) -> np.ndarray | None:
        """Return the pids (N,) as bytes; None with `--passage_ids none`. UserError unless one per passage."""
        if self.hp.passage_ids == NONE:
            return None
        path = require(self.hp.passage_ids_path, "row -> pid", "pass --passage_ids none to omit pids")
        ids = read_passage_ids(path, self.output / "cache")
        check_length(path, len(ids), len(self.collection))
        return ids

    def vector_stamp(self, side: str) -> JsonDict:
        """Return the stamp of the vectors of one side, query or passage."""
        names = ("pooling", "normalize", "remove_spaces", f"{side}_prefix", LENGTHS[side])
        stamp = {**self.source.stamp, **{name: self.source.settings[name] for name in names}}
        if self.hp.vector_dims:
            stamp["vector_dims"] = self.hp.vector_dims
        if side == "passage" and self.hp.encoder_engine == OPENVINO:
            stamp["encoder_engine"] = OPENVINO
        if side == "passage" and self.hp.passage_windows > 1:
            stamp |= {
                "passage_windows": self.rules[side].windows, "window_stride": self.rules[side].stride
            }  # fmt: skip
        return {**stamp, "precision": self.precision, "device": self.device.type}

    def passage_stamp(self) -> JsonDict:
        """Return the stamp of the passage vectors of this collection."""
        return {**self.vector_stamp("passage"), **TEXT_HASH, "collection": self.collection.checksum}

    @cached_property
    def windows(self) -> PassageWindows | None:
        """The windows of the collection's passages; None with one vector per passage.

        The first access may take a pass of the tokenizer over the collection.
        """
        if self.hp.passage_windows == 1:
            return None
        workers = worker_count(self.hp.workers, self.device, len(self.collection))
        how = (self.source.tokenizer, self.rules["passage"], self.collection, self.passage_stamp())
        return collection_windows(*how, self.output / "cache", LOG_SECONDS, workers)

    @property
    def vector_rows(self) -> int:
        """The number of passage vectors."""
        return len(self.collection) if self.windows is None else self.windows.rows

    def open_vectors(self) -> None:
        """Open the vectors of the collection for search(); OtherVectors when they are not of this model."""
        manifest = read_json(Path(self.hp.para_emb_path) / "manifest.json")
        stamp = {name: value for name, value in self.passage_stamp().items() if name not in NOT_COMPARED}
        shape = {"rows": manifest.get("rows"), "hidden": self.width}
        if self.hp.passage_windows == 1:
            shape["rows"] = len(self.collection)
        block_rows = manifest.get("block_rows", 0)
        if different := changes(manifest, {**manifest, **stamp, **shape, "block_rows": block_rows}):
            raise OtherVectors(self.hp.para_emb_path, "; ".join(different))
        store = VectorStore(self.hp.para_emb_path, manifest)
        if missing := len(store.missing_blocks()):
            raise UserError(
                f"{store.folder}: {missing} of {store.block_count} blocks of vectors are missing; run "
                "do_dual_infer.py again"
            )
        if self.vector_rows != store.rows:
            raise OtherVectors(self.hp.para_emb_path, f"rows: {store.rows} -> {self.vector_rows}")
        self.vectors = VectorSearch(self.hp, store, self.device, self.windows)

    # ---- the Python API

    @cached_property
    def model(self) -> DualEncoder:
        """The dual encoder with its weights."""
        return load_dual_model(self.source)

    def own_encoder(self, side: str) -> Encoder:
        """Return the encoder of one side, query or passage; it is made once."""
        with self.lock:
            if side not in self.encoders:
                self.encoders[side] = self.encoder(side, self.model)
            return self.encoders[side]

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        """Return the vectors (N, H) float32 of N questions."""
        return self._encode("query", check_texts(queries, "queries"))

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        """Return the vectors (N, H) float32 of N passages; do_dual_infer.py stores them as float16."""
        return self._encode("passage", check_texts(passages, "passages"))

    def _encode(self, side: str, texts: list[str]) -> np.ndarray:
        with self.lock:
            return self.own_encoder(side).encode(texts)

    def index(self, passages: Sequence[str]) -> None:
        """Search these passages from now on, in memory: encodes them all."""
        texts = check_texts(passages, "passages")
        if not texts:
            raise UserError("index: no passages")
        with self.lock:
            table = self.own_encoder("passage").tokenize_windows(texts)
            windows = None if table.windows is None else PassageWindows.of_counts(table.windows)
            stored = MemoryVectors(to_float16(self.own_encoder("passage").encode_tokens(table), 0))
            self.vectors, self.texts = VectorSearch(self.hp, stored, self.device, windows), texts

    def rank(self, queries: Sequence[str], topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows (N, K) int64, -1 where there are no more; scores (N, K) float64) of N questions."""
        if topk < 1:
            raise UserError(f"topk {topk}: must be at least 1")
        with self.lock:
            if self.vectors is None:
                where = (
                    f"no vectors in {self.hp.para_emb_path}; run do_dual_infer.py, or call index(passages)"
                )
                raise UserError(where if self.hp.dual_params != NONE else "no passages; call index(passages)")
            return self.vectors.find(self.encode_queries(queries), topk)

    @overload
    def search(self, query: str, topk: int = 10) -> list[Hit]: ...
    @overload
    def search(self, query: list[str], topk: int = 10) -> list[list[Hit]]: ...
    def search(self, query: str | list[str], topk: int = 10) -> list[Hit] | list[list[Hit]]:
        """Return the hits of a question, best first; of a list of questions a list of them each."""
        if isinstance(query, str):
            return self.search([query], topk)[0]
        with self.lock:
            rows, scores = self.rank(query, topk)
            return [self._hits(*found) for found in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _hits(self, rows: list[int], scores: list[float]) -> list[Hit]:
        found = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        in_memory = self.vectors is not None and self.vectors.in_memory
        texts, ids = (self.texts, None) if in_memory else (self.collection, self._ids)
        return [
            Hit(rank, row, "" if ids is None else ids[row].decode(), score, texts[row])
            for rank, (row, score) in enumerate(found, start=1)
        ]

    @cached_property
    def _ids(self) -> np.ndarray | None:
        return self.passage_ids()

    # ---- what the programs need

    def encoder(self, side: str, model: DualEncoder) -> Encoder:
        """Return the encoder of one side, query or passage, with its tower on the device."""
        settings, hp = self.source.settings, self.hp
        tower: Any = model.tower(side).eval()
        tower.to(self.device)
        pooling, limits = (
            (settings["pooling"], settings["normalize"]),
            (hp.batch_size, token_budget(0, self.device), hp.vector_dims),
        )
        how = (self.source.tokenizer, self.rules[side], *pooling, self.device, self.precision)
        encoder = encoder_on_gpu(Encoder(tower, *how, *limits), f"{side} encoder")
        return self._compiled(encoder) if side == "passage" and hp.encoder_engine == OPENVINO else encoder

    def _compiled(self, plain: Encoder) -> Encoder:
        """Return the encoder with its tower compiled by OpenVINO, or `plain` where their vectors differ."""
        rows = evenly_spaced(len(self.collection), CHECKED_TEXTS)
        table = plain.tokenize([self.collection[row] for row in rows])
        try:
            tower: Any = OpenVinoTower(plain.tower, self.precision)
            compiled = replace(plain, tower=tower, tokens_per_batch=TOKENS)
            cosine = smallest_cosine(compiled.encode_tokens(table), plain.encode_tokens(table))
            reason = "" if cosine >= MIN_COSINE else f"cosine {cosine:.4f} with the vectors of torch"
        except Exception as error:  # the conversion raises classes of its own
            reason = first_line(error)[:150] or type(error).__name__
        if not reason:
            return compiled
        warn(f"--encoder_engine openvino: not usable for this model ({reason}); torch is used")
        plain.tower.to(self.device)
        return plain

    def truncation(self, queries: list[str]) -> list[Truncation]:
        """Return how many of the queries, if any, and of the passages are truncated."""
        queries = [queries[row] for row in sampled(len(queries))]
        passages = [self.collection[row] for row in sampled(len(self.collection))]
        return truncation_of_texts(self.source.tokenizer, queries, passages, self.rules)
