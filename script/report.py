"""Write one HTML page about a finished run: a verdict, figures, missing labels, queries, curves, times.

    python -m pip install -r requirements-tools.txt
    python script/report.py --data_dir D                      output/report.html, for the run in output/
    python script/report.py --debug                           the sample, after sh script/quickstart.sh
    python script/report.py --data_dir D --dual_run A/res.top50 --cross_run B/res.rerank50 --to report.html

Settings: script/lib/report/hparams.py, or `--name value`; `--help` lists them. The page is one file, in
English and Chinese, and needs no network. The model of a run, its curves and its settings are read from the
folder of the run; runs of BM25 and fused ones are looked for in bm25/, fused/ and hybrid/ of the output
folder, and in bm25/ and hybrid/ beside it. What is missing or unreadable (a re-ranked run, a reference,
run_all.json) is omitted, and the page gives the reason.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

import torch_src  # noqa: F401 (first: it reports missing packages)

# isort: split

from script.lib.report.hparams import ReportHparams
from torch_src import hparams
from torch_src.runtime.files import atomic_write
from torch_src.runtime.log import duration, log
from torch_src.runtime.outputs import Output, begins, check_outputs
from torch_src.runtime.program import exit_status, exit_with

PAGE = begins(rb"(?s)<!DOCTYPE html>.*<title>Report of ")


def run(hp: ReportHparams) -> None:
    """Read the run and write the page."""
    from script.lib.report import data, page, plots  # here: --help takes no second

    check_outputs([Output(hp.to_path, PAGE)], hp.inputs)
    plots.matplotlib()  # first: a missing library is reported before a minute of reading
    start, report = time.monotonic(), data.read_report(hp)
    for line in report.notes:
        log(line.en)
    with atomic_write(hp.to_path) as file:
        file.writelines(page.render(hp, report))
    size, took = Path(hp.to_path).stat().st_size / 1e6, duration(time.monotonic() - start)
    log(f"wrote {hp.to_path} ({len(report.qids):,} queries, {size:.1f} MB) in {took}")


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return exit_status(lambda: run(hparams.parse(ReportHparams, argv)))


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
