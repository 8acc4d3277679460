"""Settings of script/report.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass
from pathlib import Path

from torch_src.common_hparams import DevAnswers, QueryIds
from torch_src.hparams import under
from torch_src.runtime.options import AT_MOST_ALL, COUNT_OR_OFF


@dataclass(frozen=True)
class ReportHparams(QueryIds, DevAnswers):
    """One HTML page about a finished run: figures, curves, and a browser of its queries."""

    # main options
    to: str = ""  # file of the page; empty: output_dir/report.html
    depth: int = 10  # passages of each stage shown per query
    characters: int = 400  # characters shown of a passage; the rest is cut
    max_queries: int = 1000  # queries in the browser, those with an error first; 0: all

    # data paths
    dual_run: str = ""  # the retriever's run, its model beside it; empty: output_dir/res.top50
    cross_run: str = ""  # the re-ranked run, its model beside it; empty: output_dir/res.rerank50; none
    fused_run: str = ""  # re-ranker or BM25 fused with the retriever; empty: fused/ or hybrid/; none
    bm25_run: str = ""  # run of script/bm25.py; empty: bm25/res.top50 in or beside output_dir; none

    INPUTS = {"dual_run_path": "the retriever's run", "cross_run_path": "the re-ranked run",
              "fused_run": "the fused run", "bm25_run": "BM25's run"}  # fmt: skip
    RANGES = {"depth": AT_MOST_ALL, "characters": AT_MOST_ALL, "max_queries": COUNT_OR_OFF}

    @property
    def to_path(self) -> str:
        return under(self.output_dir, self.to, "report.html")

    @property
    def dual_run_path(self) -> Path:
        return Path(under(self.output_dir, self.dual_run, "res.top50"))

    @property
    def cross_run_path(self) -> Path:
        return Path(under(self.output_dir, self.cross_run, "res.rerank50"))

    @property
    def fused_places(self) -> list[Path]:
        """Where a fused run is looked for without --fused_run."""
        names = ("fused/res.top50", "fused/res.rerank50", "hybrid/res.top50", "../hybrid/res.top50")
        return [Path(self.output_dir) / name for name in names]

    @property
    def bm25_places(self) -> list[Path]:
        """Where BM25's run is looked for without --bm25_run."""
        return [Path(self.output_dir) / name for name in ("bm25/res.top50", "../bm25/res.top50")]
