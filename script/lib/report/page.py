"""The HTML page of script/report.py: its sections, its tables and the data that its query browser reads."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metric.evaluation import MEASURES, compute_metrics
from script.lib.report import curves, data, plots
from script.lib.report.data import Passages, Report
from script.lib.report.hparams import ReportHparams
from torch_src.data.terms import IS_UNSPACED, PIECES
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import read_json
from torch_src.runtime.log import duration

MAX_SECONDS = 1e9  # of a stage in run_all.json
LENGTH_SAMPLE = 2000  # queries and passages, drawn at random, whose lengths are measured
TEMPLATE = Path(__file__).with_name("page.html")
# Characters that may end a script element, that JavaScript reads as line breaks, or that UTF-8 cannot encode.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def text(value: object) -> str:
    """Return a value as HTML text; an unpaired surrogate becomes ?."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def as_json(value: object) -> str:
    """Return JSON that is safe in a script element and in UTF-8, whatever the texts contain."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", plain)


def script_element(name: str, value: object) -> str:
    return f'<script type="application/json" id="{name}">{as_json(value)}</script>\n'


def note(line: str) -> str:
    return f'<p class="note">{text(line)}</p>'


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a table whose first column holds names."""
    lines = ["<table><thead><tr>"]
    lines += [f'<th scope="col">{text(name)}</th>' for name in head] + ["</tr></thead><tbody>"]
    for first, *figures in rows:
        cells = "".join(f"<td>{text(figure)}</td>" for figure in figures)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    return "".join([*lines, "</tbody></table>"])


def figures(svgs: list[str]) -> str:
    inner = "".join(f"<figure>{svg}</figure>" for svg in svgs)
    return f'<div class="plots">{inner}</div>' if svgs else ""


def metrics_section(report: Report) -> str:
    """Return the metrics of both stages as a table, and the plot of hit rate against k."""
    if not report.reference:
        return note("No metrics: there is no reference.")
    rows, hit_rates = [], {}
    for stage in report.stages:
        metrics = compute_metrics(report.reference, report.result(stage))
        values = [f"{metrics[name]:.4f}" for name in MEASURES]
        rows.append([stage.name, *values, f"{metrics['QueriesRanked']:,}", stage.path])
        hit_rates[stage.name] = data.hit_rates(data.first_ranks(report, stage))
    caption = f"Means over the {len(report.reference):,} queries of the reference; recall@k is a hit rate."
    head = ["stage", *MEASURES, "queries ranked", "run"]
    return note(caption) + table(head, rows) + figures([plots.hit_rate(hit_rates)])


def training_section(report: Report) -> str:
    """Return the training curves of both models."""
    parts = []
    for at, (stage, model) in enumerate(zip(report.stages, ("dual", "cross"), strict=False)):
        found, reason = curves.read_curves(stage.path.parent, model)
        if found is None:
            parts.append(note(f"No curves of the {stage.name}: {reason}."))
            continue
        parts.append(figures(plots.training(found, at, stage.name)))
        if found.missing:
            parts.append(note(f"Curves of the {stage.name}: {found.missing}."))
        if "dev/MRR@10" not in found.points:
            parts.append(note(f"The training of the {stage.name} had no dev evaluation."))
    return "".join(parts)


def scores_section(report: Report) -> str:
    """Return the score distributions of both stages."""
    if not report.reference:
        return note("Omitted: gold passages are unknown without a reference.")
    svgs = [plots.score_histogram(stage.name, *data.split_scores(report, stage)) for stage in report.stages]
    return figures(svgs) + note(
        "Passages of the runs, for queries with a reference; each group adds up to 100 %. "
        "A passage without a label counts as not gold, although it may answer the query."
    )


def lengths_section(report: Report) -> str:
    """Return the lengths of queries and passages in tokens."""
    folder, queries = report.stages[0].path.parent, list(report.qids)
    measured, reason = curves.measure_lengths(folder, queries, report.collection, LENGTH_SAMPLE, 42)
    if not measured:
        return note(f"Omitted: {reason}.")
    svgs, rows = [], []
    for name, lengths in measured.items():
        knob = f"{name[0]}_max_seq_len"
        svgs.append(plots.length_histogram(name, knob, lengths))
        sample = f"{len(lengths.tokens):,} of {lengths.of:,}"
        rows.append([name, sample, f"{lengths.tokens.mean():.1f}", int(lengths.tokens.max()),
                     f"{knob} = {lengths.limit}", f"{100 * lengths.truncated:.1f} %"])  # fmt: skip
    head = ["texts", "random sample", "mean (tokens)", "maximum (tokens)", "limit", "truncated"]
    return table(head, rows) + figures(svgs) + note("The last bar includes all longer texts.")


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
        return note(f"Omitted: {path} does not exist (script/run_all.sh writes it).")
    try:
        seconds = read_seconds(path)
    except UserError as error:
        return note(f"Omitted: {error}.")
    total = sum(seconds.values())
    rows = [[stage, duration(value), f"{100 * value / max(total, 1e-9):.0f} %"]
            for stage, value in seconds.items()]  # fmt: skip
    return table(["stage", "time", "share"], [*rows, ["total", duration(total), ""]]) + note(
        "Times of the last script/run_all.sh; a stage that was up to date took seconds."
    )


def browser_data(hp: ReportHparams, report: Report, passages: Passages) -> dict[str, Any]:
    """Return what the script of the page reads, except the passages."""
    return {
        "stages": [stage.name for stage in report.stages],
        "depth": hp.depth,
        "pieces": PIECES.pattern,
        "unspaced": IS_UNSPACED.pattern,
        "scored": bool(report.reference),
        "chunk": data.CHUNK,
        "queries": data.query_entries(report, passages, hp.depth),
    }


def render(hp: ReportHparams, report: Report) -> Iterator[str]:
    """Yield the page in parts; passages are read and written one chunk at a time."""
    passages = Passages()
    parts = {
        "title": text(f"Report of {report.stages[0].path.parent}"),
        "subtitle": text(
            f"{len(report.qids):,} queries, {len(report.collection):,} passages of {hp.data_dir}"
        ),
        "notes": "".join(map(note, report.notes)),
        "metrics": metrics_section(report),
        "training": training_section(report),
        "scores": scores_section(report),
        "lengths": lengths_section(report),
        "times": times_section(hp),
        "shown": text(f"Top {hp.depth} passages of each stage, truncated to {hp.characters:,} characters."),
        "data": script_element("data", browser_data(hp, report, passages)),
    }
    for at, piece in enumerate(re.split(r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8"))):
        if at % 2 == 0:
            yield piece
        elif piece == "passages":
            for number, chunk in enumerate(passages.chunks(report.collection, hp.characters)):
                yield script_element(f"passages-{number}", chunk)
        else:
            yield parts[piece]
