"""Settings of script/demo.py. Edit a default here, or pass `--name value`."""

from dataclasses import dataclass
from pathlib import Path

from torch_src.common_hparams import Queries, Run
from torch_src.hparams import NONE, under
from torch_src.inference_de_hparams import RetrieverHparams
from torch_src.runtime.errors import UserError


@dataclass(frozen=True)
class DemoHparams(RetrieverHparams, Queries, Run):
    """Search page on this machine: trained models and passage vectors -> a page at http://127.0.0.1:7860."""

    # main options
    topk: int = 50  # passages retrieved for a question, and re-ranked
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: other machines can send queries
    port: int = 7860  # port to listen on; 0: any free one
    cross_params: str = ""  # trained re-ranker; empty: output_dir/cross_params.bin; none: no re-ranker

    RANGES = {"topk": (1, 1000), "port": (0, 65535), "search_memory_gb": (0,)}

    @property
    def cross_params_path(self) -> str:
        return under(self.output_dir, self.cross_params, "cross_params.bin")

    @property
    def reranks(self) -> bool:
        """Return whether there is a re-ranker, or an option names one."""
        named = bool(self.cross_params) or Path(self.cross_params_path).exists()
        return named and self.cross_params != NONE

    def check(self) -> None:
        super().check()
        if self.search_params and not self.index:
            raise UserError("--search_params is for an approximate --index")
