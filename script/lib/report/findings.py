"""What the report finds in the runs: differences, figures by length, passages that probably lack a label."""

from dataclasses import dataclass, field

import numpy as np

from metric.evaluation import MEASURES, MRR_DEPTH, per_query
from script.lib.paired_test import SEED, Difference, compare, interval
from script.lib.report.data import RERANKER, RETRIEVER, Report, Stage, first_ranks, outcomes

BUCKETS = 4  # of about as many queries each
TOP = 3  # ranks where passages without a label are looked for
Values = dict[str, np.ndarray]  # metric -> (Q,) of the reference's queries


@dataclass(frozen=True)
class Unlabeled:
    """A passage that the judge ranks above all gold ones of its query, with the score of a right one."""

    query: str
    qid: str
    row: int
    score: float  # the judge's
    gold_row: int  # the gold passage that the judge ranks first, or else any; -1: not in the collection

    @property
    def rows(self) -> list[int]:
        """Its row, and that of the gold passage if the collection has it."""
        return [self.row] if self.gold_row < 0 else [self.row, self.gold_row]


@dataclass(frozen=True)
class Bucket:
    """The queries whose length, or whose gold passage's length, is within bounds."""

    shortest: int  # characters
    longest: int
    queries: int
    mrr: list[float]  # MRR@10 of each stage
    low: float  # 95 % interval of the last figure: MRR@10 of the judge
    high: float
    found: float  # recall@50 of the retriever


@dataclass
class Findings:
    """The figures of a report that has a reference."""

    values: list[Values]  # of each stage
    differences: list[Difference | None]  # of MRR@10, against the retriever, which has none
    judge: int  # place of the better of retriever and re-ranker among the stages
    unlabeled: list[Unlabeled]  # highest score first
    if_labeled: float  # MRR@10 of the judge if all of them were gold
    by_query: list[Bucket] = field(default_factory=list)
    by_passage: list[Bucket] = field(default_factory=list)

    @property
    def queries(self) -> int:
        return len(self.values[0][MEASURES[0]])

    @property
    def missed(self) -> np.ndarray:
        """Which queries have no gold passage in the retriever's top 50."""
        return self.values[0]["recall@50"] == 0


def find(report: Report) -> Findings:
    """Return the findings of a report with a reference."""
    values = [stage_values(report, stage) for stage in report.stages]
    mrr = [of_stage["MRR@10"] for of_stage in values]
    models = [at for at, stage in enumerate(report.stages) if stage.name in (RETRIEVER, RERANKER)]
    judge = max(models, key=lambda at: mrr[at].mean())
    differences = [None, *(compare(mrr[0], other) for other in mrr[1:])]
    # a retriever's high score means the same subject, not an answer
    unlabeled: tuple[list[Unlabeled], float] = [], float(mrr[judge].mean())
    if report.stages[judge].name == RERANKER:
        unlabeled = probably_right(report, report.stages[judge])
    findings = Findings(values, differences, judge, *unlabeled)
    by_qid = {qid: at for at, qid in enumerate(report.reference)}
    lengths = {by_qid[qid]: len(query) for query, qid in report.queries() if qid in by_qid}
    findings.by_query = buckets(lengths, findings)
    findings.by_passage = buckets(gold_lengths(report, by_qid), findings)
    return findings


def stage_values(report: Report, stage: Stage) -> Values:
    """Return the metrics of a stage."""
    own = list(per_query(report.reference, report.result(stage)).values())
    return {name: np.array([values[name] for values in own]) for name in MEASURES}


def gold_lengths(report: Report, by_qid: dict[str, int]) -> dict[int, int]:
    """Return {place of a query: characters of its gold passage}: the mean of several, rounded."""
    lengths = {}
    for _, qid in report.queries():
        rows = [report.rows[pid] for pid in report.reference.get(qid, ()) if pid in report.rows]
        if rows:
            lengths[by_qid[qid]] = round(float(np.mean([len(report.collection[row]) for row in rows])))
    return lengths


def buckets(lengths: dict[int, int], findings: Findings) -> list[Bucket]:
    """Return the metrics of the queries in BUCKETS groups by length; equal lengths are in one group."""
    if not lengths:
        return []
    places, sizes = np.array(list(lengths)), np.array(list(lengths.values()))
    shares = np.arange(1, BUCKETS + 1) / BUCKETS
    uppers = np.unique(np.quantile(sizes, shares, method="inverted_cdf"))
    group = np.searchsorted(uppers, sizes)
    made = []
    for number in range(len(uppers)):
        inside = places[group == number]
        mrr = [float(values["MRR@10"][inside].mean()) for values in findings.values]
        low, high = interval(findings.values[findings.judge]["MRR@10"][inside], SEED)
        own = sizes[group == number]
        recall = float(findings.values[0]["recall@50"][inside].mean())
        made.append(Bucket(int(own.min()), int(own.max()), len(inside), mrr, low, high, recall))
    return made


def probably_right(report: Report, judge: Stage) -> tuple[list[Unlabeled], float]:
    """Return (passages without a label that are probably right, MRR@10 of the judge if they were gold).

    They are in the judge's first TOP, above every gold passage of their query, and score at least as high as
    half of the gold passages that the judge puts first.
    """
    ranks, found = first_ranks(report, judge), []
    right = [judge.ranked[query][1][0] for query, qid in report.queries() if ranks.get(qid) == 1]
    limit = float(np.median(right)) if right else float("inf")
    total = sum(1 / rank for rank in ranks.values() if 0 < rank <= MRR_DEPTH)
    for query, qid in report.queries():
        gold = report.reference.get(qid)
        rows, scores = judge.ranked.get(query, ([], []))
        if not gold or not rows or scores[0] < limit or ranks[qid] == 1:
            continue
        first = ranks[qid]
        gold_rows = [report.rows[pid] for pid in sorted(gold) if pid in report.rows]
        gold_row = rows[first - 1] if first else gold_rows[0] if gold_rows else -1
        above = list(zip(rows, scores, strict=True))[: min(TOP, first - 1) if first else TOP]
        found += [Unlabeled(query, qid, row, score, gold_row) for row, score in above if score >= limit]
        total += 1 - (1 / first if 0 < first <= MRR_DEPTH else 0)
    found.sort(key=lambda each: -each.score)
    return found, total / len(ranks)


def chosen_queries(report: Report, findings: Findings | None, limit: int) -> set[str] | None:
    """Return the queries for the browser, None for all: first those that a reader would look at."""
    queries = list(report.stages[0].ranked)
    if not limit or len(queries) <= limit:
        return None
    wanted: dict[str, None] = {}
    if findings:
        wanted |= dict.fromkeys(each.query for each in findings.unlabeled)
        kinds = outcomes(report)
        for query, qid in report.queries():
            if qid in kinds and kinds[qid][0]:
                wanted[query] = None
    return set(list({**wanted, **dict.fromkeys(queries)})[:limit])
