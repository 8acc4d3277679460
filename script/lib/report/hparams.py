"""Settings of script/report.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass
from pathlib import Path

from torch_src.hparams import SAMPLE_DIR, OfficialLayout, check_range, under

NONE = "none"  # --cross_run none, --dev_set none: without it


@dataclass(frozen=True)
class ReportHparams(OfficialLayout):
    """One HTML page about a finished run: figures, curves, and a browser of its queries."""

    # the knobs most people change first
    to: str = ""  # the page that is written; empty: output_dir/report.html
    depth: int = 10  # passages of each stage that the page shows for a query
    characters: int = 400  # of a passage that the page shows; the rest is cut

    # files
    data_dir: str = "dureader-retrieval-baseline-dataset"  # official layout; empty paths below follow it
    output_dir: str = "output"  # of the run; both stages, their models and curves are looked for there
    dual_run: str = ""  # the retriever's run, its model beside it; empty: output_dir/res.top50
    cross_run: str = ""  # the re-ranked run, its model beside it; empty: output_dir/res.rerank50; none
    dev_q: str = ""  # queries, 4 columns or test1.json; empty: data_dir/dev/dev.q.format
    dev_q2qid: str = ""  # query text -> qid (JSON); empty: beside dev_q; none: nothing can be scored
    dev_set: str = ""  # queries with answers; empty: data_dir/dev/dev.json; none: no scoring
    passage_dir: str = ""  # the collection, part-00.. or all_doc; empty: data_dir/passage-collection
    passage_ids: str = ""  # row -> pid (JSON); empty: passage_dir/passage2id.map.json

    # the run
    samples: int = 2000  # queries and passages, drawn at random, whose lengths are measured
    seed: int = 42  # of that draw
    debug: bool = False  # the sample collection, after the four programs with --debug

    @property
    def to_path(self) -> str:
        return under(self.output_dir, self.to, "report.html")

    @property
    def dual_run_path(self) -> Path:
        return Path(under(self.output_dir, self.dual_run, "res.top50"))

    @property
    def cross_run_path(self) -> Path:
        return Path(under(self.output_dir, self.cross_run, "res.rerank50"))

    def check(self) -> None:
        """UserError for a value out of range."""
        for name in ("depth", "characters", "samples"):
            check_range(name, getattr(self, name), 1)
        check_range("seed", self.seed, 0)


# --debug lowers these defaults; an explicit option still wins.
DEBUG = dict(data_dir=SAMPLE_DIR, output_dir="output/debug")
