"""One HTML page about a finished run: measures, curves, scores, lengths, times, and a browser of its errors.

    python -m pip install -r requirements-tools.txt
    python script/report.py --data_dir D                      output/report.html, of the run in output/
    python script/report.py --debug                           the sample, after sh script/quickstart.sh
    python script/report.py --data_dir D --dual_run A/res.top50 --cross_run B/res.rerank50 --to report.html

Settings: script/lib/report/hparams.py, or `--name value`; `--help` lists them. The page is one file that
needs no network. A model, its curves and its settings are looked for beside its run. What is not there (a
re-ranked run, a reference, run_all.json) or cannot be read is left out, and the page says so.
"""

import html
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from metric.common import InputError
from metric.evaluation import MEASURES, compute_metrics
from script.lib.report import curves as report_curves
from script.lib.report import data as report_data
from script.lib.report import plots as report_plots
from script.lib.report.data import Found, Shelf
from script.lib.report.hparams import DEBUG, ReportHparams
from script.lib.terms import PIECES
from torch_src import hparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import atomic_write, read_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.program import exit_status, leave

LONGEST_STAGE = 1e9  # seconds
TEMPLATE = Path(__file__).with_name("lib") / "report/page.html"
# What would end the script element, what JavaScript once took for a line end, and what no file can hold.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def text(value) -> str:
    """Return a value as text between tags or quotes of the page; half characters become ?."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def as_json(value) -> str:
    """Return JSON that can stand in a script element and be written as UTF-8, whatever the texts hold."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", plain)


def note(line: str) -> str:
    return f'<p class="note">{text(line)}</p>'


def table(head: list[str], rows: list[list]) -> str:
    """Return a table: a name and figures a row."""
    lines = ["<table><thead><tr>"]
    lines += [f'<th scope="col">{text(name)}</th>' for name in head] + ["</tr></thead><tbody>"]
    for first, *figures in rows:
        cells = "".join(f"<td>{text(figure)}</td>" for figure in figures)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    return "".join([*lines, "</tbody></table>"])


def plots(drawn: list[str]) -> str:
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    return f'<div class="plots">{figures}</div>' if drawn else ""


def metrics_section(found: Found) -> str:
    """Return the table of both stages, and the hit rate against k."""
    if not found.reference:
        return note("Not scored: there is no reference.")
    rows, curves = [], {}
    for stage in found.stages:
        metrics = compute_metrics(found.reference, found.result(stage))
        figures = [f"{metrics[name]:.4f}" for name in MEASURES]
        rows.append([stage.name, *figures, f"{metrics['QueriesRanked']:,}", stage.path])
        curves[stage.name] = report_data.hit_rates(report_data.first_ranks(found, stage))
    caption = f"Means over the {len(found.reference):,} queries of the reference; recall@k is a hit rate."
    head = ["stage", *MEASURES, "queries ranked", "run"]
    return note(caption) + table(head, rows) + plots([report_plots.hit_rate(curves)])


def training_section(found: Found) -> str:
    """Return the curves of both models."""
    parts = []
    for at, (stage, name) in enumerate(zip(found.stages, ("dual", "cross"), strict=False)):
        curves, why = report_curves.read_curves(stage.path.parent, name)
        if curves is None:
            parts.append(note(f"No curves of the {stage.name}: {why}."))
            continue
        parts.append(plots(report_plots.training(curves, at, stage.name)))
        if curves.lacks:
            parts.append(note(f"Curves of the {stage.name}: {curves.lacks}."))
        if "dev/MRR@10" not in curves.points:
            parts.append(note(f"The {stage.name} was not evaluated on dev while it was trained."))
    return "".join(parts)


def scores_section(found: Found) -> str:
    """Return the distributions of both stages' scores."""
    if not found.reference:
        return note("Left out: without a reference, gold passages are not known.")
    drawn = [report_plots.score_histogram(stage.name, *report_data.split_scores(found, stage))
             for stage in found.stages]  # fmt: skip
    return plots(drawn) + note(
        "Of the passages in the runs, of queries with a reference; each group adds up to 100 %. "
        "A passage without a label counts as not gold, though it may answer the query."
    )


def lengths_section(hp: ReportHparams, found: Found) -> str:
    """Return the lengths of queries and passages in tokens."""
    folder, queries = found.stages[0].path.parent, list(found.qids)
    measured, why = report_curves.measure_lengths(folder, queries, found.collection, hp.samples, hp.seed)
    if not measured:
        return note(f"Left out: {why}.")
    drawn, lines = [], []
    for name, lengths in measured.items():
        knob = f"{name[0]}_max_seq_len"
        drawn.append(report_plots.length_histogram(name, knob, lengths))
        drawn_from = f"{len(lengths.tokens):,} of {lengths.of:,}"
        lines.append([name, drawn_from, f"{lengths.tokens.mean():.1f}", int(lengths.tokens.max()),
                      f"{knob} = {lengths.limit}", f"{100 * lengths.cut:.1f} %"])  # fmt: skip
    head = ["texts", "measured (a random sample)", "mean, tokens", "longest, tokens", "limit", "cut"]
    return table(head, lines) + plots(drawn) + note("The last bar holds all longer texts, too.")


def read_seconds(path: Path) -> dict[str, float]:
    """Return {stage: seconds} of a run_all.json; UserError when it holds anything else."""
    seconds = read_json(path).get("seconds")
    # NaN, which Python reads from JSON, is in no range
    if not isinstance(seconds, dict) or not all(
        isinstance(took, int | float) and 0 <= took < LONGEST_STAGE for took in seconds.values()
    ):
        raise UserError(f"{path}: not written by script/run_all.py (seconds: {{stage: number}})")
    return seconds


def times_section(hp: ReportHparams) -> str:
    """Return the time of each stage, as script/run_all.py noted it."""
    path = Path(hp.output_dir) / "run_all.json"
    if not path.exists():
        return note(f"Left out: {path} is not there (script/run_all.sh writes it).")
    try:
        seconds = read_seconds(path)
    except UserError as error:
        return note(f"Left out: {error}.")
    whole = sum(seconds.values())
    rows = [[stage, duration(took), f"{100 * took / max(whole, 1e-9):.0f} %"]
            for stage, took in seconds.items()]  # fmt: skip
    return table(["stage", "time", "share"], [*rows, ["all", duration(whole), ""]]) + note(
        "Of the last run of script/run_all.sh: a stage that was up to date took seconds."
    )


def browser_data(hp: ReportHparams, found: Found, shelf: Shelf) -> dict:
    """Return what the page's script reads, but for the passages."""
    # The same pieces of text as script/bm25.py: its pattern, with long escapes as JavaScript writes them.
    pieces = re.sub(r"\\U000([0-9a-f]{5})", r"\\u{\1}", PIECES.pattern)
    return {
        "stages": [stage.name for stage in found.stages], "depth": hp.depth, "pieces": pieces,
        "scored": bool(found.reference), "chunk": report_data.CHUNK,
        "queries": report_data.browsed_queries(found, shelf, hp.depth),
    }  # fmt: skip


def script_element(name: str, value) -> str:
    return f'<script type="application/json" id="{name}">{as_json(value)}</script>\n'


def page(hp: ReportHparams, found: Found) -> Iterator[str]:
    """Yield the page piece by piece; the passages are read and written a chunk at a time."""
    shelf = Shelf()
    parts = {
        "title": text(f"Report of {found.stages[0].path.parent}"),
        "subtitle": text(f"{len(found.qids):,} queries, {len(found.collection):,} passages of {hp.data_dir}"),
        "notes": "".join(map(note, found.notes)),
        "metrics": metrics_section(found),
        "training": training_section(found),
        "scores": scores_section(found),
        "lengths": lengths_section(hp, found),
        "times": times_section(hp),
        "shown": text(
            f"The first {hp.depth} passages of each stage, texts cut after {hp.characters:,} characters."
        ),
        "data": script_element("data", browser_data(hp, found, shelf)),
    }
    for at, piece in enumerate(re.split(r"\{\{(\w+)\}\}", TEMPLATE.read_text(encoding="utf-8"))):
        if at % 2 == 0:
            yield piece
        elif piece == "passages":
            for number, chunk in enumerate(shelf.chunks(found.collection, hp.characters)):
                yield script_element(f"passages-{number}", chunk)
        else:
            yield parts[piece]


def run(hp: ReportHparams) -> None:
    """Write the page."""
    report_plots.matplotlib()  # first: its absence should not be found after a minute of reading
    begun, found = time.monotonic(), report_data.find(hp)
    for line in found.notes:
        log(line)
    with atomic_write(hp.to_path) as file:
        file.writelines(page(hp, found))
    size, took = Path(hp.to_path).stat().st_size / 1e6, duration(time.monotonic() - begun)
    log(f"wrote {hp.to_path} ({len(found.qids):,} queries, {size:.1f} MB) in {took}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(hparams.parse(ReportHparams, argv, DEBUG)), InputError)


if __name__ == "__main__":
    leave(lambda: main(sys.argv[1:]))
