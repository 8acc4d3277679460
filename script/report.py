"""Write one HTML page about a finished run: a verdict, figures, missing labels, queries, curves, times.

    python -m pip install -r requirements-demo.txt
    python script/report.py                                   output/report.html, for the run in output/
    python script/report.py --output_dir output/my            another output folder
    python script/report.py --debug                           the sample, after sh script/quickstart.sh
    python script/report.py --data_dir D --dual_run A/res.top50 --cross_run B/res.rerank50 --to report.html

Settings: script/lib/report/hparams.py, or `--name value`; `--help` lists them. The page is one file, in
English and Chinese, and needs no network. The data, the model of a run, its curves and its settings are read
from the folder of the run; runs of BM25 and fused ones are looked for in bm25/, fused/ and hybrid/ of the
output folder, and in bm25/ and hybrid/ beside it. What is missing or unreadable (a re-ranked run, a
reference, run_all.json) is omitted, and the page gives the reason.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.lib.report.hparams import ReportHparams
from torch_src import hparams
from torch_src.inputs import check_named
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log
from torch_src.runtime.outputs import Output, begins, check_outputs
from torch_src.runtime.program import exit_status, exit_with
from torch_src.saved_settings import read_saved

DATA = ("data_dir", "passage_dir", "passage_ids", "dev_q", "dev_q2qid")
PAGE = begins(rb"(?s)<!DOCTYPE html>.*<title>Report of ")


def run(hp: ReportHparams) -> None:
    """Read the run and write the page."""
    from script.lib.report import data, page, plots  # here: --help takes no second
    from script.lib.report.findings import find
    from script.lib.report.verdict import judge

    check_outputs([Output(hp.to_path, PAGE)], hp.inputs)
    plots.matplotlib()  # first: a missing library is reported before a minute of reading
    start, report = time.monotonic(), data.read_report(hp)
    for line in report.notes:
        log(line.en)
    findings = find(report) if report.reference else None
    lengths = page.lengths_of(report)
    verdict = judge(report, findings, hp.output_dir, lengths[0])
    with atomic_write(hp.to_path) as file:
        file.writelines(page.render(hp, report, findings, verdict, lengths))
    for sentence in verdict.sentences:
        log(sentence.en)
    size, took = Path(hp.to_path).stat().st_size / 1e6, duration(time.monotonic() - start)
    log(f"wrote {hp.to_path} ({len(report.qids):,} queries, {size:.1f} MB) in {took}")


def settings(argv: list[str]) -> ReportHparams:
    """Return the settings: options, else the data that do_dual_infer.py saved with the run, else defaults."""
    hp = hparams.parse(ReportHparams, argv)
    check_named(hp)
    if "data_dir" in hparams.parse_options(ReportHparams, argv):
        return hp
    saved = read_saved(str(hp.dual_run_path.parent), "dual_infer_hparams.json")
    data = {name: saved[name] for name in DATA if saved.get(name) not in (None, hparams.NONE)}
    return hparams.parse(ReportHparams, argv, data)


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(settings(argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
