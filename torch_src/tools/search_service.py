"""Search of a collection: BM25, the retriever, both, and the re-ranker.

Writes nothing but caches.
"""

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from torch_src.data.collection import PassageCollection
from torch_src.data.formats import read_query_texts
from torch_src.data.passage_ids import check_length, read_passage_ids
from torch_src.data.terms import places, terms
from torch_src.hparams import NONE
from torch_src.retrieval.fusion import Ranking, fuse_rankings, fused_scores
from torch_src.retrieval.hits import Hit
from torch_src.retrieval.score_checks import collapsed
from torch_src.runtime.errors import UserError, first_line
from torch_src.runtime.files import require
from torch_src.runtime.log import warn
from torch_src.runtime.stamps import JsonDict, checksum_text, read_checked_json, write_checked_json
from torch_src.tools.batching import Call
from torch_src.tools.demo_hparams import DemoHparams, search_settings
from torch_src.tools.page_error import NotReadyError, PageError
from torch_src.tools.search_parts import (
    OFF,
    READY,
    WORKING,
    Bm25Part,
    DensePart,
    Loaded,
    Part,
    RerankerPart,
)

LONGEST_QUESTION = 10_000  # characters; the models read far fewer
POLL_SECONDS = 1.0  # between checks of the files of a part
COLUMNS = ("bm25", "dense", "hybrid", "reranked")
HYBRID_WEIGHTS = (1.0, 1.0)  # of dense and BM25 scores, each standardized; better than ranks on two data sets
RERANKER_WEIGHT = 2.0  # of the candidates' standardized scores beside the logits
KEPT_RANKINGS = 256  # of recent questions
CALIBRATION_QUERIES, CALIBRATION_BATCH = 200, 16  # dev queries, and those encoded at a time
OFF_TOPIC_SHARE = 0.05  # of dev queries have a "low" best score
FUNCTION_WORDS = re.compile("[的了吗呢吧么是怎何哪]|多少|^.$")  # in Chinese terms
COMMON, FEW = 0.2, 2  # a term in a larger share of the passages, and in more than FEW, is not marked


@dataclass
class Answer:
    """The passages that one column ranks highest for a question."""

    question: str
    column: str
    hits: list[Hit]  # best first
    seconds: dict[str, float]  # of each step
    cut: bool = False  # the question is truncated for the retriever
    off_topic: bool = False  # the retriever's best score is lower than those of most dev queries
    warning: str = ""  # when the re-ranker's logits are all alike


@dataclass(frozen=True)
class Ranked:
    """One column's ranking of a question."""

    ranking: Ranking
    seconds: dict[str, float] = field(default_factory=dict)
    cut: bool = False
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)  # by row
    logits: dict[int, float] = field(default_factory=dict)  # by row
    warning: str = ""


class SearchService:
    """The parts of a search, and answers from those that are ready. Usable from several threads."""

    def __init__(self, options: Mapping[str, Any], settings: type[DemoHparams] = DemoHparams):
        """`options`: settings that override those saved in the output folder. UserError without passages."""
        self.hp = hp = search_settings(settings, options)
        self.cache = Path(hp.output_dir) / "cache"
        self.collection = PassageCollection(hp.passage_dir_path, self.cache)
        self.ids = self._passage_ids()
        self.queries = dev_queries(hp)
        how = (options, self.collection, settings)
        self.bm25, self.dense, self.reranker = Bm25Part(*how), DensePart(*how), RerankerPart(*how)
        self.parts: dict[str, Part[Any]] = {
            "bm25": self.bm25, "dense": self.dense, "reranker": self.reranker,
        }  # fmt: skip
        self.best_scores: list[float] = []  # of dev queries with the model `calibrated`, ascending
        self.calibrated: object = None
        self.recent: dict[tuple, Ranked] = {}
        self.bm25_lock = threading.Lock()
        self.stopped = threading.Event()

    def _passage_ids(self) -> np.ndarray | None:
        if self.hp.passage_ids == NONE:
            return None
        path = require(self.hp.passage_ids_path, "row -> pid", "pass --passage_ids none to omit pids")
        ids = read_passage_ids(path, self.cache)
        check_length(path, len(ids), len(self.collection))
        return ids

    # ---- parts

    def refresh(self) -> None:
        """Load every part whose files are there."""
        for part in self.parts.values():
            self._refresh(part)

    def _refresh(self, part: Part) -> None:
        part.refresh()
        if part is self.dense and self.dense.loaded is not self.calibrated:
            self._calibrate()

    def start(self) -> None:
        """Load the parts in threads of their own, and again whenever their files change."""
        for name, part in self.parts.items():
            threading.Thread(target=self._watch, args=[part], name=name, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self, part: Part) -> None:
        while not self.stopped.is_set():
            self._refresh(part)
            self.stopped.wait(POLL_SECONDS)

    def _calibrate(self) -> None:
        """Learn which best scores are low, after the retriever is ready for questions."""
        dense, self.best_scores = self.dense.loaded, []
        try:
            self.best_scores = self._best_scores() if dense else []
        except (UserError, OSError, RuntimeError) as error:  # the page works without the hint
            warn(f"no hint for off-topic questions: {first_line(error)}")
        self.calibrated = dense

    def _best_scores(self) -> list[float]:
        """Return the best scores of some dev queries, ascending; they are cached."""
        dense = require_ready(self.dense, "dense")
        step = max(1, len(self.queries) // CALIBRATION_QUERIES)
        queries = self.queries[::step][:CALIBRATION_QUERIES]
        if not queries:
            return []
        path = self.cache / "best_scores.json"
        how = {
            "vectors": dense.vectors.store.manifest_checksum,
            "query": dense.retriever.vector_stamp("query"),
        }
        stamp = {**how, "index": dense.hp.index, "queries": checksum_text("\n".join(queries))}
        known: JsonDict = read_checked_json(path) or {}
        if stamp.items() <= known.items():
            return known["scores"]
        scores: list[float] = []
        for at in range(0, len(queries), CALIBRATION_BATCH):  # a question need not wait for all
            scores += dense.best_scores(queries[at : at + CALIBRATION_BATCH])
        scores.sort()
        write_checked_json(path, {**stamp, "scores": scores})
        return scores

    def status(self) -> dict[str, Any]:
        """Return what is searched, by what, and the state of each column, as JSON."""
        dense, reranker = self.dense.loaded, self.reranker.loaded
        return {
            "passages": len(self.collection),
            "data_dir": self.hp.data_dir,
            "output_dir": self.hp.output_dir,
            "topk": self.hp.topk,
            "retriever": dense.name if dense else "",
            "search": dense.vectors.how if dense else "",
            "search_zh": dense.vectors.how_zh if dense else "",
            "normalized": bool(dense and dense.retriever.source.settings["normalize"]),
            "reranker": reranker.name if reranker else "",
            "reranker_weight": self.reranker_weight,
            "calibration_queries": len(self.best_scores),
            "columns": {name: self._column_status(name) for name in COLUMNS},
            "version": sum(part.version for part in self.parts.values()),
        }

    def _column_status(self, name: str) -> dict[str, Any]:
        if name == "hybrid":
            states = [self.bm25.state, self.dense.state]
            waits_for = next((state for state in states if state != READY), READY)
            return {"state": waits_for, "message": "", "zh": "", "done": 0, "total": 0}
        state = self.parts["reranker" if name == "reranked" else name].describe()
        if name == "reranked" and self.reranker.loaded and not (self.bm25.loaded or self.dense.loaded):
            comes = WORKING in (self.bm25.state, self.dense.state)  # else their messages say why not
            return {**state, "state": WORKING if comes else OFF}
        return state

    @property
    def reranker_weight(self) -> float:
        """Weight of the candidates' standardized scores beside the re-ranker's logits."""
        hp = self.reranker.loaded.hp if self.reranker.loaded else self.hp
        weight = hp.fuse_retriever_weight
        return RERANKER_WEIGHT if weight is None else weight

    # ---- answers

    def answer(self, question: str, column: str, topk: int = 0) -> Answer:
        """Return the best passages of a column; UserError when it is not ready, and for a bad question."""
        return self.answers([question], column, topk, Call())[0]

    def answers(self, questions: list[str], column: str, topk: int, call: Call) -> list[Answer]:
        """Return the answer to each question, as answer(); `call`: the request that they are part of."""
        if column not in COLUMNS:
            raise UserError(f"column {column!r}: expected one of {', '.join(COLUMNS)}")
        questions = [clean(question) for question in questions]
        answers = []
        for question, ranked in zip(questions, self._ranked(questions, column, call), strict=True):
            began = time.perf_counter()
            hits = self._hits(ranked, topk or self.hp.topk)
            seconds = {**ranked.seconds, "read": time.perf_counter() - began}
            off_topic = column != "bm25" and self._off_topic(question, call)
            answers.append(Answer(question, column, hits, seconds, ranked.cut, off_topic, ranked.warning))
        return answers

    @property
    def first_stage(self) -> str:
        """The best column that is ready without a re-ranker; `dense` when none is."""
        lists = [name for name in ("bm25", "dense") if self.parts[name].loaded]
        return "hybrid" if len(lists) > 1 else next(iter(lists), "dense")

    def _ranked(self, questions: list[str], column: str, call: Call) -> list[Ranked]:
        versions = tuple(part.version for part in self.parts.values())
        known = {question: self.recent.get((question, column, versions)) for question in questions}
        if new := [question for question, ranked in known.items() if ranked is None]:
            for question, ranked in zip(new, getattr(self, f"_rank_{column}")(new, call), strict=True):
                known[question] = self.recent[question, column, versions] = ranked
            for old in list(self.recent)[:-KEPT_RANKINGS]:
                self.recent.pop(old, None)
        return [cast(Ranked, known[question]) for question in questions]

    def _rank_bm25(self, questions: list[str], _: Call) -> list[Ranked]:
        index, found = require_ready(self.bm25, "bm25"), []
        for question in questions:
            with self.bm25_lock:
                began = time.perf_counter()
                ranking = index.search(question, self.hp.topk)
            found.append(Ranked(ranking, {"bm25": time.perf_counter() - began}))
        return found

    def _rank_dense(self, questions: list[str], call: Call) -> list[Ranked]:
        dense = require_ready(self.dense, "dense")
        found = call.results(dense.submit(question, self.hp.topk) for question in questions)
        return [Ranked(each.ranking, each.seconds, each.cut) for each in found]

    def _rank_hybrid(self, questions: list[str], call: Call) -> list[Ranked]:
        lists = (self._ranked(questions, "dense", call), self._ranked(questions, "bm25", call))
        return [self._fused(dense, bm25) for dense, bm25 in zip(*lists, strict=True)]

    def _fused(self, dense: Ranked, bm25: Ranked) -> Ranked:
        fused = fuse_rankings([dense.ranking, bm25.ranking], HYBRID_WEIGHTS)[: self.hp.topk]
        seconds = {**bm25.seconds, **dense.seconds}
        return Ranked(fused, seconds, dense.cut, ranks_in({"dense": dense, "bm25": bm25}))

    def _rank_reranked(self, questions: list[str], call: Call) -> list[Ranked]:
        """Rank the best list that is ready: the logits plus the weighted, standardized scores of the list."""
        reranker, name = require_ready(self.reranker, "reranked"), self.first_stage
        lists = self._ranked(questions, name, call)
        began = time.perf_counter()
        logits = call.results(
            reranker.submit(question, [self.collection[row] for row, _ in first.ranking])
            for question, first in zip(questions, lists, strict=True)
        )
        seconds = {"re-rank": time.perf_counter() - began}
        return [
            self._reranked(name, first, scored, seconds) for first, scored in zip(lists, logits, strict=True)
        ]

    def _reranked(self, name: str, first: Ranked, logits: np.ndarray, seconds: dict[str, float]) -> Ranked:
        rows, scores = [row for row, _ in first.ranking], np.array([score for _, score in first.ranking])
        span = [slice(0, len(rows))]
        fused = fused_scores(logits, scores, span, self.reranker_weight)
        order = np.argsort(-fused, kind="stable").tolist()
        ranking = [(rows[at], float(fused[at])) for at in order]
        by_row = dict(zip(rows, logits.tolist(), strict=True))
        warning = collapsed(logits, span) or ""
        return Ranked(
            ranking, {**first.seconds, **seconds}, first.cut, ranks_in({name: first}), by_row, warning
        )

    def _hits(self, ranked: Ranked, topk: int) -> list[Hit]:
        hits = []
        for rank, (row, score) in enumerate(ranked.ranking[:topk], start=1):
            ranks, logit = ranked.ranks.get(row, {}), ranked.logits.get(row)
            hits.append(Hit(rank, row, self.pid(row), score, self.collection[row], ranks, logit))
        return hits

    def pid(self, row: int) -> str:
        """Return the id of a passage; empty with --passage_ids none."""
        return "" if self.ids is None else self.ids[row].decode()

    def _off_topic(self, question: str, call: Call) -> bool:
        scores = self.best_scores  # another thread replaces them
        if not scores or not self.dense.loaded:
            return False
        low = scores[int(OFF_TOPIC_SHARE * len(scores))]
        ranking = self._ranked([question], "dense", call)[0].ranking
        return bool(ranking) and ranking[0][1] < low

    def marked_terms(self, question: str) -> set[str]:
        """Return the terms of a question that are worth marking in a passage.

        Not those that many passages contain, and not the words that only make it a question.
        """
        found = set(terms(question))
        if len(found) > 1:
            found = {term for term in found if not FUNCTION_WORDS.search(term)}
        index, most = self.bm25.loaded, max(COMMON, FEW / len(self.collection))
        return found if index is None else {term for term in found if index.share(term) <= most}


def require_ready(part: Part[Loaded], column: str) -> Loaded:
    """Return what the part has loaded; UserError before that."""
    if part.loaded is None:
        en = f"{column} is not ready" + (f": {part.message}" if part.message else "")
        raise NotReadyError(en, "还没有准备好" + (f"：{part.zh or part.message}" if part.message else ""))
    return part.loaded


def ranks_in(columns: Mapping[str, Ranked]) -> dict[int, dict[str, int]]:
    """Return {row: {column: rank}}."""
    found: dict[int, dict[str, int]] = {}
    for name, ranked in columns.items():
        for rank, (row, _) in enumerate(ranked.ranking, start=1):
            found.setdefault(row, {})[name] = rank
    return found


def clean(question: str) -> str:
    """Return the question on one line, without surrounding white space; UserError if empty or too long."""
    question = question.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form
    question = re.sub(r"[\t\r\n\0]+", " ", question).strip()
    if not question:
        raise PageError("the question is empty", "问题是空的")
    if len(question) > LONGEST_QUESTION:
        raise PageError(
            f"the question has {len(question):,} characters (at most {LONGEST_QUESTION:,})",
            f"问题有 {len(question):,} 个字符（最多 {LONGEST_QUESTION:,} 个）",
        )
    return question


def marks(text: str, wanted: set[str]) -> list[tuple[int, int]]:
    """Return the (start, end) of the characters that the terms in `wanted` cover, joined where they touch."""
    found: list[tuple[int, int]] = []
    for begin, end, term in places(text):
        if term not in wanted:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def dev_queries(hp: DemoHparams) -> list[str]:
    """Return the dev queries; empty without such a file."""
    if hp.dev_q == NONE or not Path(hp.dev_q_path).exists():
        return []
    try:
        return read_query_texts(hp.dev_q_path)
    except UserError as error:
        warn(f"no example questions: {error}")
        return []
