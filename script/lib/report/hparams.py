"""Settings of script/report.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass
from pathlib import Path

from torch_src.common_hparams import DevAnswers, QueryIds
from torch_src.hparams import under
from torch_src.runtime.options import AT_MOST_ALL


@dataclass(frozen=True)
class ReportHparams(QueryIds, DevAnswers):
    """One HTML page about a finished run: figures, curves, and a browser of its queries."""

    # main options
    to: str = ""  # file of the page; empty: output_dir/report.html
    depth: int = 10  # passages of each stage shown per query
    characters: int = 400  # characters shown of a passage; the rest is cut

    # data paths
    dual_run: str = ""  # the retriever's run, its model beside it; empty: output_dir/res.top50
    cross_run: str = ""  # the re-ranked run, its model beside it; empty: output_dir/res.rerank50; none

    INPUTS = {"dual_run_path": "the retriever's run", "cross_run_path": "the re-ranked run"}
    RANGES = {"depth": AT_MOST_ALL, "characters": AT_MOST_ALL}

    @property
    def to_path(self) -> str:
        return under(self.output_dir, self.to, "report.html")

    @property
    def dual_run_path(self) -> Path:
        return Path(under(self.output_dir, self.dual_run, "res.top50"))

    @property
    def cross_run_path(self) -> Path:
        return Path(under(self.output_dir, self.cross_run, "res.rerank50"))
