"""The verdict of the report: what the runs show, in a sentence or two, and what to do next."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from script.lib.paired_test import SEED, Difference, compare, interval
from script.lib.report.curves import Lengths
from script.lib.report.data import BM25, FUSED, RERANKER, Report
from script.lib.report.findings import Findings
from script.lib.report.words import Both
from torch_src.hparams import Hparams
from torch_src.runtime.files import from_root

FEW_QUERIES = 100  # below: the interval is too wide for most decisions
MANY_TRUNCATED = 0.01  # share of texts
MANY_MISSED = 0.05  # share of queries above which recall is worth a step
FUSE = "do_cross_infer.py --fuse_retriever_weight"

GOOD, BAD, OPEN = "good", "bad", "open"


@dataclass(frozen=True)
class Verdict:
    """Sentences, what they amount to (good, bad or open), and the next steps."""

    kind: str
    sentences: list[Both]
    steps: list[Both]


def certainty(found: Difference) -> Both:
    """Return a difference in brackets, with its interval and p."""
    figures = f"{found.low:+.4f} to {found.high:+.4f}"
    return Both(
        f"{found.mean:+.4f}, 95 % interval {figures}, p {found.p:.4f}",
        f"{found.mean:+.4f}，95% 置信区间 {figures.replace(' to ', ' 至 ')}，p = {found.p:.4f}",
    )


def moves(subject: Both, found: Difference) -> Both:
    """Return a sentence about a difference: `subject` raises or lowers MRR@10, or nothing is proved."""
    how, span = certainty(found), f"{found.first:.4f} to {found.second:.4f}"
    span_zh = f"从 {found.first:.4f} 变为 {found.second:.4f}"
    if not found.is_significant:
        return Both(
            f"{subject.en} makes no proven difference: MRR@10 goes from {span} ({how.en}).",
            f"{subject.zh}没有带来可以确认的变化：MRR@10 {span_zh}（{how.zh}）。",
        )
    verb, verb_zh = ("raises", "提高了") if found.mean > 0 else ("lowers", "降低了")
    return Both(
        f"{subject.en} {verb} MRR@10 from {span} ({how.en}).",
        f"{subject.zh}{verb_zh} MRR@10：{span_zh}（{how.zh}）。",
    )


def judge(report: Report, findings: Findings | None, output: str, lengths: Mapping[str, Lengths]) -> Verdict:
    """Return the verdict on the runs of a report; `lengths` of queries and passages, if they are known."""
    if findings is None:
        sentence = Both(
            "No verdict: the queries of this run have no reference answers.",
            "没有结论：这次结果的问题没有标注答案。",
        )
        step = Both(
            "Pass a file of queries with answers: --dev_set dev.json.",
            "用 --dev_set dev.json 给出带答案的问题。",
        )
        return Verdict(OPEN, [sentence], [step])
    names = [stage.name for stage in report.stages]
    of_stage = dict(zip(names, findings.differences, strict=True))
    reranked = of_stage.get(RERANKER)
    if reranked is None:
        kind, sentences = OPEN, [retriever_alone(findings)]
    else:
        kind = OPEN if not reranked.is_significant else GOOD if reranked.mean > 0 else BAD
        sentences = [moves(Both("Re-ranking", "重排"), reranked)]
    sentences += others(report, findings)
    steps = next_steps(report, findings, reranked, output) + about_truncation(lengths)
    return Verdict(kind, sentences, steps)


def retriever_alone(findings: Findings) -> Both:
    """Return a sentence about a run without re-ranking."""
    values = findings.values[0]
    mean, (low, high) = values["MRR@10"].mean(), interval(values["MRR@10"], SEED)
    recall = values["recall@50"].mean()
    return Both(
        f"The retriever reaches MRR@10 {mean:.4f} (95 % interval {low:.4f} to {high:.4f}) and recall@50 "
        f"{recall:.4f} on {findings.queries:,} queries.",
        f"检索的 MRR@10 为 {mean:.4f}（95% 置信区间 {low:.4f} 至 {high:.4f}），recall@50 为 {recall:.4f}，"
        f"共 {findings.queries:,} 个问题。",
    )


def others(report: Report, findings: Findings) -> list[Both]:
    """Return a sentence about the fused run, or else about BM25."""
    names = [stage.name for stage in report.stages]
    means = [float(values["MRR@10"].mean()) for values in findings.values]
    if FUSED in names:
        fused = names.index(FUSED)
        best = max((at for at in range(len(names)) if at != fused), key=lambda at: means[at])
        difference = findings.differences[fused]
        assert difference is not None
        sentences = [moves(Both("Fusing", "融合"), difference)]
        if best:
            found = compare(findings.values[best]["MRR@10"], findings.values[fused]["MRR@10"])
            single = names[best]
            sentences.append(
                Both(
                    f"Compared with the best single run ({single.en}): {certainty(found).en}.",
                    f"与最好的单个结果（{single.zh}）相比：{certainty(found).zh}。",
                )
            )
        return sentences
    if BM25 in names:
        against = findings.differences[names.index(BM25)]
        assert against is not None
        return [
            Both(
                f"BM25 alone reaches {against.second:.4f} (against the retriever {certainty(against).en}).",
                f"单用 BM25 为 {against.second:.4f}（与检索相比 {certainty(against).zh}）。",
            )
        ]
    return []


def next_steps(report: Report, findings: Findings, reranked: Difference | None, output: str) -> list[Both]:
    """Return what to do next, most important first."""
    names = [stage.name for stage in report.stages]
    fused = findings.differences[names.index(FUSED)] if FUSED in names else None
    steps = [about_reranking(findings, reranked, fused, output)]
    queries = findings.queries
    if findings.missed.sum() > MANY_MISSED * queries:
        steps.append(about_missed(report, findings))
    if findings.unlabeled:
        count = len({each.qid for each in findings.unlabeled})
        steps.append(
            Both(
                f"Read the passages below that the re-ranker prefers to the gold ({count:,} queries): "
                "those that answer are missing labels, the others are errors to learn from.",
                f"看一下后面精排明显排在正例之前的段落（{count:,} 个问题）：能回答问题的是漏标，"
                "其余是精排的错误。",
            )
        )
    if queries < FEW_QUERIES:
        steps.append(
            Both(
                f"Label more queries: with {queries:,} only large differences can be told from chance.",
                f"多标一些问题：只有 {queries:,} 个时，只有很大的差别才能与偶然区分开。",
            )
        )
    return steps


def about_reranking(
    findings: Findings, found: Difference | None, fused: Difference | None, output: str
) -> Both:
    """Return the step that follows from the differences of re-ranker and fused run to the retriever."""
    if found is None:
        params = Path(output) / "cross_params.bin"
        command = "do_cross_infer.py" if params.exists() else "do_cross_train.py, then do_cross_infer.py"
        if Path(output).resolve() == Path(from_root(Hparams.DEBUG["output_dir"])).resolve():
            command = command.replace(".py", ".py --debug")
        return Both(f"Re-rank: run {command}.", f"接着重排：运行 {command.replace(', then', '，再运行')}。")
    train = Both(
        "Train the re-ranker on negatives that this retriever finds (script/mine_negatives.py).",
        "用召回模型自己找出的负例训练精排模型（script/mine_negatives.py）。",
    )
    fuse = Both(
        f" Or mix in the retriever's score: {FUSE} W, with the W that script/fuse_curve.py finds on "
        "training queries.",
        f"也可以把检索的分数按权重加进来：{FUSE} W，W 用 script/fuse_curve.py 在训练问题上选。",
    )
    if fused and fused.is_gain and (fused.mean > found.mean or not found.is_gain):
        use = Both(
            "Use the fused run, a proven gain over the retriever. ", "用融合的结果：可以确认比检索好。"
        )
        return use if found.is_gain else use + train
    if found.is_gain:
        keep = Both("Keep the re-ranker.", "保留重排。")
        return keep if fused else keep + fuse
    if found.is_significant:
        head = Both(
            "Do not use this re-ranker as it is: keep the retriever's order. ",
            "先不要用这个精排模型：保持检索的顺序。",
        )
    else:
        half = (found.high - found.low) / 2
        head = Both(
            f"Do not decide on this difference: with {findings.queries:,} queries one below about {half:.3f} "
            "cannot be told from chance. ",
            f"不要凭这个差别做决定：{findings.queries:,} 个问题时，小于约 {half:.3f} 的差别与偶然无法区分。",
        )
    return head + train + (Both("", "") if fused else fuse)


def about_truncation(lengths: Mapping[str, Lengths]) -> list[Both]:
    """Return a step for each kind of texts of which the retriever truncates many."""
    steps = []
    for name, name_zh in (("queries", "问题"), ("passages", "段落")):
        found = lengths.get(name)
        if found and found.truncated > MANY_TRUNCATED:
            share, knob = f"{100 * found.truncated:.0f}", f"{name[0]}_max_seq_len"
            enough = int(np.quantile(found.tokens, 1 - MANY_TRUNCATED, method="inverted_cdf"))
            steps.append(
                Both(
                    f"{share} % of the {name} are truncated at {found.limit} tokens: --{knob} {enough} fits "
                    f"99 % of them{', or pass --passage_windows' if name == 'passages' else ''}.",
                    f"{share}% 的{name_zh}在 {found.limit} 个 token 处被截断：--{knob} {enough} 能放下 99%"
                    f"{'，或者用 --passage_windows' if name == 'passages' else ''}。",
                )
            )
    return steps


def about_missed(report: Report, findings: Findings) -> Both:
    """Return the step that follows from queries without a gold passage in the retriever's run."""
    missed = int(findings.missed.sum())
    share, names = 100 * missed / findings.queries, [stage.name for stage in report.stages]
    found = {name: int(findings.values[names.index(name)]["recall@50"][findings.missed].sum())
             for name in (FUSED, BM25) if name in names}  # fmt: skip
    other = Both("", "")
    if found.get(FUSED):
        other = Both(
            f" The fused run finds {found[FUSED]:,} of them: re-rank that one "
            "(do_cross_infer.py --retrieval_result).",
            f"其中 {found[FUSED]:,} 个融合结果能找到：重排这个结果（do_cross_infer.py --retrieval_result）。",
        )
    elif found.get(BM25):
        other = Both(
            f" BM25 finds {found[BM25]:,} of them: fuse both runs (script/bm25.py fuse), re-rank the result.",
            f"其中 {found[BM25]:,} 个 BM25 能找到：先融合两个结果（script/bm25.py fuse）再重排。",
        )
    return Both(
        f"{missed:,} of {findings.queries:,} queries ({share:.0f} %) have no gold passage in the retriever's "
        "top 50, which no re-ranking can repair: train the retriever on mined negatives "
        f"(script/mine_negatives.py).{other.en}",
        f"{findings.queries:,} 个问题中有 {missed:,} 个（{share:.0f}%）的正例不在检索的前 50 里，"
        f"重排无法补救：用挖掘的负例继续训练检索（script/mine_negatives.py）。{other.zh}",
    )
