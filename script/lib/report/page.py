"""The HTML page of script/report.py: its sections, its tables and the data that its query browser reads."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metric.evaluation import MEASURES, compute_metrics
from script.lib.report import curves, data, plots
from script.lib.report.curves import Lengths
from script.lib.report.data import CHUNK, Passages, Report
from script.lib.report.findings import TOP, Bucket, Findings, chosen_queries
from script.lib.report.hparams import ReportHparams
from script.lib.report.origin import Origin, read_origin
from script.lib.report.verdict import Verdict
from script.lib.report.words import Both, Html, escaped, same, text
from torch_src.data.terms import IS_UNSPACED, PIECES
from torch_src.runtime.commands import command
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import duration

MAX_SECONDS = 1e9  # of a stage in run_all.json
LENGTH_SAMPLE = 2000  # queries and passages, drawn at random, whose lengths are measured
UNLABELED_SHOWN, UNLABELED_OPEN = 20, 4  # passages that are probably right: on the page, without unfolding
SEARCH_PAGE = "http://127.0.0.1:7860/?q="  # script/demo.py
TEMPLATE = Path(__file__).with_name("page.html")
# Characters that may end a script element, that JavaScript reads as line breaks, or that UTF-8 cannot encode.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def as_json(value: object) -> str:
    """Return JSON that is safe in a script element and in UTF-8, whatever the texts contain."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", plain)


def script_element(name: str, value: object) -> str:
    return f'<script type="application/json" id="{name}">{as_json(value)}</script>\n'


def note(line: object) -> str:
    return f'<p class="note">{text(line)}</p>'


def omitted(reason: object) -> str:
    """Return a note that a section is omitted; reasons that programs print are in English only."""
    known = reason if isinstance(reason, Both) else same(reason)
    return note(Both(f"Omitted: {known.en}.", f"略去：{known.zh}。"))


def table(head: list[Any], rows: list[list[Any]]) -> str:
    """Return a table whose first column holds names."""
    lines = ["<table><thead><tr>"]
    lines += [f'<th scope="col">{text(name)}</th>' for name in head] + ["</tr></thead><tbody>"]
    for first, *cells in rows:
        shown = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{shown}</tr>')
    return "".join([*lines, "</tbody></table>"])


def bar(share: float) -> Html:
    """Return a figure between 0 and 1 with a bar behind it."""
    return Html(f'<span class="share" style="--share:{100 * share:.1f}%">{share:.4f}</span>')


def figures(svgs: list[str], small: int = 0) -> str:
    """Return a row of plots, of which the last `small` ones are small."""
    kinds = [""] * (len(svgs) - small) + [' class="small"'] * small
    inner = "".join(f"<figure{kind}>{svg}</figure>" for kind, svg in zip(kinds, svgs, strict=True))
    return f'<div class="plots">{inner}</div>' if svgs else ""


def facts_section(origin: Origin) -> str:
    """Return the facts of the header, and the settings in a box to unfold."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in origin.facts)
    title = Both("Files, and settings that differ from the defaults", "文件，以及与默认值不同的设置")
    head = [Both("program", "程序"), Both("setting", "设置"), Both("value", "取值"), Both("default", "默认")]
    inner = table([Both("run", "结果"), Both("file", "文件")], [list(row) for row in origin.files])
    inner += table(head, [list(row) for row in origin.settings]) if origin.settings else ""
    unfold = f"<details><summary>{text(title)}</summary>{inner}</details>"
    return f'<dl class="facts">{rows}</dl>{unfold}'


def verdict_section(verdict: Verdict) -> str:
    """Return the verdict and what to do next."""
    lines = "".join(f"<p>{text(sentence)}</p>" for sentence in verdict.sentences)
    steps = "".join(f"<li>{text(step)}</li>" for step in verdict.steps)
    title = text(Both("What to do next", "下一步"))
    return f'<div class="verdict {verdict.kind}">{lines}<h3>{title}</h3><ol>{steps}</ol></div>'


def metrics_section(report: Report, findings: Findings | None) -> str:
    """Return the metrics of all runs as a table, and the plot of hit rate against k."""
    if findings is None:
        return note(Both("No metrics: there is no reference.", "没有标注，因此没有指标。"))
    rows, hit_rates = [], {}
    for stage, difference in zip(report.stages, findings.differences, strict=True):
        metrics = compute_metrics(report.reference, report.result(stage))
        row: list[Any] = [stage.name, *(f"{metrics[name]:.4f}" for name in MEASURES)]
        if difference:
            row += [f"{difference.mean:+.4f}", f"{difference.low:+.4f} … {difference.high:+.4f}",
                    f"{difference.p:.4f}",
                    f"{difference.better} / {difference.worse} / {difference.same}"]  # fmt: skip
        elif len(report.stages) > 1:
            row += ["", "", "", ""]
        rows.append([*row, f"{metrics['QueriesRanked']:,}"])
        hit_rates[stage.name] = data.hit_rates(data.first_ranks(report, stage))
    queries = f"{findings.queries:,}"
    caption = Both(
        f"Means over the {queries} queries of the reference; recall@k is a hit rate. The difference is that "
        "of MRR@10 to the retriever, p a two-sided paired randomization test, the interval a bootstrap over "
        "queries (as script/compare_runs.py prints them).",
        f"{queries} 个有标注的问题的平均值；recall@k 是命中率。差值指与检索相比的 MRR@10；"
        "p 来自双侧配对随机化检验，区间由对问题做自助抽样得到（与 script/compare_runs.py 相同）。",
    )
    head: list[Any] = [Both("run", "结果"), *MEASURES]
    if len(report.stages) > 1:
        head += [Both("difference", "差值"), Both("95 % interval", "95% 区间"), "p",
                 Both("better / worse / same", "变好 / 变差 / 不变")]  # fmt: skip
    head += [Both("queries ranked", "有结果的问题")]
    return table(head, rows) + note(caption) + figures([plots.hit_rate(hit_rates)])


def unlabeled_section(report: Report, findings: Findings | None) -> str:
    """Return the text above the list of passages that are probably right."""
    if findings is None:
        return omitted(Both("there is no reference", "没有标注"))
    name, count = report.stages[findings.judge].name, len(findings.unlabeled)
    if name != data.RERANKER:
        return omitted(
            Both("there is no re-ranker that ranks better than the retriever", "没有比检索排得更好的精排结果")
        )
    rule = Both(
        f"Passages without a label that the {name.en} puts in its first {TOP} and above every gold passage "
        "of the query, with a score as high as that of half of the gold passages it puts first. "
        "Read them: what answers the query is a missing label, the rest are errors of the re-ranker.",
        f"没有标注的段落，但{name.zh}把它排进前 {TOP}，且在该问题所有正例之上，"
        "分数又不低于半数排在第一的正例。读一下：能回答问题的是漏标，其余是精排的错误。",
    )
    if not count:
        return note(rule) + note(Both("There are none.", "没有这样的段落。"))
    now = float(findings.values[findings.judge]["MRR@10"].mean())
    shown = min(count, UNLABELED_SHOWN)
    more = Both(
        f"There are {count:,}; the {shown} with the highest scores are listed. If all of them were labeled, "
        f"MRR@10 of the {name.en} would be {findings.if_labeled:.4f} instead of {now:.4f}.",
        f"共 {count:,} 段，下面列出分数最高的 {shown} 段。如果都标为正例，{name.zh}的 MRR@10 会是 "
        f"{findings.if_labeled:.4f}，而不是 {now:.4f}。",
    )
    rest = text(Both(f"{shown - UNLABELED_OPEN} more", f"其余 {shown - UNLABELED_OPEN} 段"))
    unfold = f'<details><summary>{rest}</summary><ol class="unlabeled"></ol></details>'
    return f'{note(rule)}{note(more)}<ol class="unlabeled"></ol>{unfold if shown > UNLABELED_OPEN else ""}'


def buckets_section(report: Report, findings: Findings | None) -> str:
    """Return the metrics by length of query and of gold passage."""
    if findings is None:
        return omitted(Both("there is no reference", "没有标注"))
    judge_name = report.stages[findings.judge].name
    tables = []
    for title, buckets in (
        (Both("By length of the query", "按问题长度"), findings.by_query),
        (Both("By length of the gold passage", "按正例段落长度"), findings.by_passage),
    ):
        head = [Both("characters", "字数"), Both("queries", "问题"),
                *(Both(f"MRR@10 {stage.name.en}", f"{stage.name.zh} MRR@10") for stage in report.stages),
                Both(f"95 % interval ({judge_name.en})", f"95% 区间（{judge_name.zh}）"),
                Both("recall@50 retriever", "检索 recall@50")]  # fmt: skip
        rows = [bucket_row(bucket) for bucket in buckets]
        if rows:
            tables.append(f"<h3>{text(title)}</h3>{table(head, rows)}")
    return "".join(tables) + note(
        Both(
            "Groups of about as many queries each. Intervals that overlap do not show a difference. The "
            "length of several gold passages is their mean.",
            "各组问题数大致相同。区间重叠就不能说明有差别。一个问题有多个正例时取平均长度。",
        )
    )


def bucket_row(bucket: Bucket) -> list[Any]:
    """Return a row of the table of lengths."""
    ends = dict.fromkeys((f"{bucket.shortest:,}", f"{bucket.longest:,}"))
    inner = f"{bucket.low:.4f} … {bucket.high:.4f}"
    return [" – ".join(ends), f"{bucket.queries:,}", *map(bar, bucket.mrr), inner, bar(bucket.found)]


def training_section(report: Report) -> str:
    """Return the training curves of both models."""
    parts = []
    trained = ((data.RETRIEVER, "dual"), (data.RERANKER, "cross"))
    for at, (name, model) in enumerate(trained):
        stage = report.stage(name)
        if stage is None:
            continue
        found, reason = curves.read_curves(stage.path.parent, model)
        if found is None:
            parts.append(
                note(Both(f"No curves of the {name.en}: {reason}.", f"没有{name.zh}的曲线：{reason}。"))
            )
            continue
        parts.append(figures(plots.training(found, at, name), small=int("train/lr" in found.points)))
        if found.missing:
            parts.append(
                note(
                    Both(f"Curves of the {name.en}: {found.missing}.", f"{name.zh}的曲线：{found.missing}。")
                )
            )
        if "dev/MRR@10" not in found.points:
            parts.append(
                note(
                    Both(
                        f"The training of the {name.en} had no dev evaluation.",
                        f"{name.zh}的训练没有在开发集上评测。",
                    )
                )
            )
    return "".join(parts)


def scores_section(report: Report) -> str:
    """Return the score distributions of all stages."""
    if not report.reference:
        return omitted(Both("gold passages are unknown without a reference", "没有标注，不知道哪些是正例"))
    svgs = [plots.score_histogram(stage.name, *data.split_scores(report, stage)) for stage in report.stages]
    return figures(svgs) + note(
        Both(
            "Passages of the runs, for queries with a reference; each group adds up to 100 %. "
            "A passage without a label counts as not gold, although it may answer the query.",
            "有标注的问题的结果段落；每组合计 100%。没有标注的段落算作非正例，尽管它可能回答了问题。",
        )
    )


def lengths_of(report: Report) -> tuple[dict[str, Lengths], str]:
    """Return the lengths of a sample of queries and passages, or why there are none."""
    folder, queries = report.stages[0].path.parent, list(report.qids)
    return curves.measure_lengths(folder, queries, report.collection, LENGTH_SAMPLE, 42)


def lengths_section(measured: dict[str, Lengths], reason: str) -> str:
    """Return the lengths of queries and passages in tokens."""
    if not measured:
        return omitted(reason)
    svgs, rows = [], []
    names = {"queries": Both("queries", "问题"), "passages": Both("passages", "段落")}
    for key, lengths in measured.items():
        name, knob = names[key], f"{key[0]}_max_seq_len"
        svgs.append(plots.length_histogram(name, knob, lengths))
        counts = f"{len(lengths.tokens):,}", f"{lengths.of:,}"
        sample = Both(f"{counts[0]} of {counts[1]}", f"{counts[1]} 中的 {counts[0]}")
        rows.append([name, sample, f"{lengths.tokens.mean():.1f}", int(lengths.tokens.max()),
                     f"{knob} = {lengths.limit}", f"{100 * lengths.truncated:.1f} %"])  # fmt: skip
    head = [Both("texts", "文本"), Both("random sample", "随机样本"), Both("mean (tokens)", "平均 token 数"),
            Both("maximum (tokens)", "最多 token 数"), Both("limit", "上限"),
            Both("truncated", "被截断")]  # fmt: skip
    last = Both("The last bar includes all longer texts.", "最后一条包括所有更长的文本。")
    return table(head, rows) + figures(svgs) + note(last)


def read_seconds(path: Path) -> dict[str, float]:
    """Return {stage: seconds} of a run_all.json; UserError for other content."""
    seconds = read_json(path).get("seconds")
    # NaN, which Python reads from JSON, fails the comparison
    if not isinstance(seconds, dict) or not all(
        isinstance(value, int | float) and 0 <= value < MAX_SECONDS for value in seconds.values()
    ):
        raise UserError(f"{path}: expected the seconds of each stage, as script/run_all.py writes them")
    return seconds


def times_section(hp: ReportHparams) -> str:
    """Return the time of each stage, from run_all.json."""
    path = Path(hp.output_dir) / "run_all.json"
    if not path.exists():
        return omitted(
            Both(
                f"{path} does not exist (script/run_all.sh writes it)",
                f"{path} 不存在（由 script/run_all.sh 写出）",
            )
        )
    try:
        seconds = read_seconds(path)
    except UserError as error:
        return omitted(error)
    total = sum(seconds.values())
    rows: list[list[Any]] = [[stage, duration(value), f"{100 * value / max(total, 1e-9):.0f} %"]
                             for stage, value in seconds.items()]  # fmt: skip
    head = [Both("stage", "阶段"), Both("time", "用时"), Both("share", "占比")]
    return table(head, [*rows, [Both("total", "合计"), duration(total), ""]]) + note(
        Both(
            "Times of the last script/run_all.sh; a stage that was up to date took seconds.",
            "最近一次 script/run_all.sh 的用时；已是最新的阶段只用几秒。",
        )
    )


def browser_data(
    hp: ReportHparams, report: Report, findings: Findings | None, passages: Passages
) -> dict[str, Any]:
    """Return what the script of the page reads, except the passages."""
    chosen = chosen_queries(report, findings, hp.max_queries)
    listed = findings.unlabeled[:UNLABELED_SHOWN] if findings else []
    return {
        "stages": [[stage.name.en, stage.name.zh] for stage in report.stages],
        "judge": findings.judge if findings else 0,
        "reranked": report.stage(data.RERANKER) is not None,
        "depth": hp.depth,
        "pieces": PIECES.pattern,
        "unspaced": IS_UNSPACED.pattern,
        "scored": bool(report.reference),
        "chunk": CHUNK,
        "search": SEARCH_PAGE,
        "queries": data.query_entries(report, passages, hp.depth, chosen),
        "open": UNLABELED_OPEN,
        "unlabeled": sorted({each.qid for each in findings.unlabeled} if findings else ()),
        "listed": [
            {"query": each.query, "qid": each.qid,
             "items": data.items_of(report, passages, each.query, each.rows, report.reference[each.qid])}
            for each in listed
        ],
    }  # fmt: skip


def shown_queries(hp: ReportHparams, report: Report) -> Both:
    """Return what the query browser contains."""
    depth, characters = f"{hp.depth}", f"{hp.characters:,}"
    line = Both(
        f"Top {depth} passages of each stage, truncated to {characters} characters.",
        f"每个阶段的前 {depth} 段，每段最多 {characters} 字。",
    )
    total = len(report.stages[0].ranked)
    if hp.max_queries and total > hp.max_queries:
        limit = f"{hp.max_queries:,}"
        line += Both(
            f" {limit} of {total:,} queries are here, those with a changed or missed answer first; "
            "--max_queries 0 shows all. The figures above are of all queries.",
            f"这里有 {total:,} 个问题中的 {limit} 个，优先放结果有变化或漏检的；--max_queries 0 放全部。"
            "上面的数字按全部问题计算。",
        )
    return line


def render(
    hp: ReportHparams,
    report: Report,
    findings: Findings | None,
    verdict: Verdict,
    lengths: tuple[dict[str, Lengths], str],
) -> Iterator[str]:
    """Yield the page in parts; passages are read and written one chunk at a time."""
    passages, folder = Passages(), report.stages[0].path.parent
    title = Both(f"Report of {folder}", f"报告：{folder}")
    parts = {
        "plain_title": escaped(title.en),
        "title": text(title),
        "facts": facts_section(read_origin(hp, report)),
        "notes": "".join(map(note, report.notes)),
        "verdict": verdict_section(verdict),
        "metrics": metrics_section(report, findings),
        "unlabeled": unlabeled_section(report, findings),
        "buckets": buckets_section(report, findings),
        "training": training_section(report),
        "scores": scores_section(report),
        "lengths": lengths_section(*lengths),
        "times": times_section(hp),
        "shown": text(shown_queries(hp, report)),
        "demo": escaped(command("script/demo.py", "--output_dir", hp.output_dir)),
        "data": script_element("data", browser_data(hp, report, findings, passages)),
    }
    for at, piece in enumerate(re.split(r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8"))):
        if at % 2 == 0:
            yield piece
        elif piece == "passages":
            for number, chunk in enumerate(passages.chunks(report.collection, hp.characters)):
                yield script_element(f"passages-{number}", chunk)
        else:
            yield parts[piece]
